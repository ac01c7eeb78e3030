"""Every attention against a brute-force mask over all tokens in float64, forward and gradient."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_costs import equations

from timesformer_jax.errors import InputError
from timesformer_jax.models import attention, schemes
from timesformer_jax.models.attention import Tokens
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.ops import long_attention
from timesformer_jax.models.ops.dot_product_attention import dot_product_attention
from timesformer_jax.models.schemes import AttentionLayer

LAYERS = {
    "temporal": schemes.TEMPORAL,
    "temporal_with_token": schemes.TIME,
    "spatial": schemes.SPATIAL,
    "joint": schemes.JOINT,
    "width": schemes.WIDTH,
    "height": schemes.HEIGHT,
    "local": schemes.LOCAL,
    "global": schemes.GLOBAL,
}
# The attention that follows from the partition alone, as a layer of one's own has it.
LAYERS |= {f"{name} by its partition": layer._replace(attention_fn=None)
           for name, layer in LAYERS.items() if layer.attention_fn}  # fmt: skip
# Frames, patches down, patches across: one of each, one patch, non-square, odd, even.
SHAPES = [(1, 1, 1), (3, 1, 1), (1, 2, 3), (5, 3, 5), (2, 4, 2), (3, 1, 4)]
HEADS, CHANNELS = 2, 3


def sequences(name: str, frames: int, height: int, width: int) -> list[list[tuple]]:
    """The (frame, y, x) of the patches of every sequence, written out from the definitions."""

    def listed(many_frames, many_y, many_x):
        return [(t, y, x) for t in many_frames for y in many_y for x in many_x]

    t, h, w = range(frames), range(height), range(width)
    upper, lower = h[: math.ceil(height / 2)], h[math.ceil(height / 2) :]
    left, right = w[: math.ceil(width / 2)], w[math.ceil(width / 2) :]
    out = {
        "temporal": lambda: [listed(t, [y], [x]) for y in h for x in w],
        "spatial": lambda: [listed([f], h, w) for f in t],
        "joint": lambda: [listed(t, h, w)],
        "width": lambda: [listed([f], [y], w) for f in t for y in h],
        "height": lambda: [listed([f], h, [x]) for f in t for x in w],
        "local": lambda: [listed(t, ys, xs) for ys in (upper, lower) for xs in (left, right)],
        "global": lambda: [
            listed(t[f::2], h[y::2], w[x::2]) for f in (0, 1) for y in (0, 1) for x in (0, 1)
        ],
    }[name.split(" ")[0].removesuffix("_with_token")]()
    return [sequence for sequence in out if sequence]


def brute_force(name: str, cls: torch.Tensor | None, patches: torch.Tensor) -> tuple:
    """One clip: every token against every token, all pairs of different sequences masked out.

    Takes (S, 3, h, d) and (T, H, W, 3, h, d); returns (S, h * d) and (T, H, W, h * d).
    """
    size = patches.shape[:3]
    lists = sequences(name, *size)
    number = {patch: i for i, sequence in enumerate(lists) for patch in sequence}
    of_patch = [number[tuple(index)] for index in np.ndindex(*size)]
    owner = torch.tensor((list(range(len(lists))) if cls is not None else []) + of_patch)
    qkv = patches.reshape(-1, *patches.shape[3:])
    qkv = qkv if cls is None else torch.cat([cls, qkv])
    out = []
    for head in range(qkv.shape[2]):
        q, k, v = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
        logits = q @ k.T / math.sqrt(q.shape[-1])
        logits = logits.masked_fill(owner[:, None] != owner[None, :], -math.inf)
        out.append(torch.softmax(logits, dim=-1) @ v)
    out = torch.cat(out, dim=-1)
    tokens = 0 if cls is None else len(lists)
    return (None if cls is None else out[:tokens]), out[tokens:].reshape(*size, -1)


@pytest.mark.parametrize(
    ("name", "shape"),
    # Those that follow from the partition share one function: half of the shapes are enough.
    [(name, shape) for name in LAYERS for shape in SHAPES[:: 2 if "partition" in name else 1]],
    ids=str,
)
def test_attention_and_its_gradient_equal_a_brute_force_mask(name, shape):
    layer, (t, h, w), b = LAYERS[name], shape, 2
    s = len(sequences(name, t, h, w))
    rng = np.random.default_rng(0)
    width = HEADS * CHANNELS
    cls = rng.standard_normal((b, s, 3, HEADS, CHANNELS)) if layer.joins_cls else None
    patches = rng.standard_normal((b, t, h, w, 3, HEADS, CHANNELS))
    direction = Tokens(
        rng.standard_normal((b, s, width)) if layer.joins_cls else None,
        rng.standard_normal((b, t, h * w, width)),
    )

    @jax.jit
    def forward_and_gradient(qkv, direction):
        out, vjp = jax.vjp(lambda qkv: layer.attend(qkv, (h, w)), qkv)
        return out, vjp(direction)[0]

    with jax.enable_x64(True):
        qkv = Tokens(cls, patches.reshape(b, t, h * w, 3, HEADS, CHANNELS))
        ours = jax.tree.map(np.asarray, forward_and_gradient(qkv, direction))
    assert ours[0].patches.dtype == np.float64

    leaves = [None if x is None else torch.tensor(x, requires_grad=True) for x in (cls, patches)]
    total = torch.zeros((), dtype=torch.float64)
    for clip in range(b):
        out_cls, out = brute_force(name, None if cls is None else leaves[0][clip], leaves[1][clip])
        np.testing.assert_allclose(
            ours[0].patches[clip], out.detach().reshape(t, h * w, -1), atol=1e-12
        )
        total = total + (out.reshape(t, h * w, -1) * torch.tensor(direction.patches[clip])).sum()
        if layer.joins_cls:
            np.testing.assert_allclose(ours[0].cls[clip], out_cls.detach(), atol=1e-12)
            total = total + (out_cls * torch.tensor(direction.cls[clip])).sum()
    total.backward()
    gradient = leaves[1].grad.reshape(ours[1].patches.shape)
    np.testing.assert_allclose(ours[1].patches, gradient, atol=1e-12)
    if layer.joins_cls:
        np.testing.assert_allclose(ours[1].cls, leaves[0].grad, atol=1e-12)


sizes = st.integers(1, 7)


@hypothesis.given(st.sampled_from(sorted(LAYERS)), sizes, sizes, sizes)
@hypothesis.settings(deadline=None, derandomize=True)
def test_sequences_are_numbered_as_the_definitions_list_them(name, t, h, w):
    number = LAYERS[name].partition(t, (h, w))
    assert number.shape == (t, h * w)
    lists = sequences(name, t, h, w)
    assert sorted(np.unique(number)) == list(range(len(lists)))
    for i, sequence in enumerate(lists):
        assert sequence == [tuple(index) for index in np.argwhere(number.reshape(t, h, w) == i)]


def traced(layer: AttentionLayer, t: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The size of the largest array in the traced program, and how many logits blocks compute."""
    s = layer.partition(t, grid).max() + 1
    qkv = Tokens(
        jax.ShapeDtypeStruct((1, s, 3, 1, 4), jnp.float32) if layer.joins_cls else None,
        jax.ShapeDtypeStruct((1, t, math.prod(grid), 3, 1, 4), jnp.float32),
    )
    logits, by_blocks = [0], long_attention.attention

    def noted(qkv, platform):
        a, length, s, _, heads, _ = qkv.shape
        logits.append(a * s * heads * length**2)
        return by_blocks(qkv, platform)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_attention, "attention", noted)
        jaxpr = jax.make_jaxpr(lambda qkv: layer.attend(qkv, grid))(qkv)
    sizes = [v.aval.size for eqn in equations(jaxpr) for v in (*eqn.invars, *eqn.outvars)]
    return max(sizes), sum(logits)


LONG_CLIPS = pytest.mark.parametrize(("t", "grid"), [(16, (16, 16)), (15, (15, 17))])


@pytest.mark.parametrize("name", LAYERS)
@LONG_CLIPS
def test_sparse_attention_holds_no_square_of_all_patches(name, t, grid, monkeypatch):
    monkeypatch.setattr(long_attention, "SHORT", math.inf)  # all weights of a sequence at once
    largest, by_blocks = traced(LAYERS[name], t, grid)
    square = (t * math.prod(grid)) ** 2
    assert largest > square if name.startswith("joint") else largest < square / 3
    assert by_blocks == 0


@pytest.mark.parametrize("name", LAYERS)
@LONG_CLIPS
def test_attention_by_blocks_never_holds_all_logits_and_sparse_attention_does_not_compute_them(
    name, t, grid
):
    largest, by_blocks = traced(LAYERS[name], t, grid)
    square = (t * math.prod(grid)) ** 2
    assert largest < square / 3
    assert by_blocks > square if name.startswith("joint") else by_blocks < square / 3
    longest = np.bincount(LAYERS[name].partition(t, grid).reshape(-1)).max()
    assert (by_blocks > 0) == (longest + LAYERS[name].joins_cls > long_attention.SHORT)


def test_a_scheme_is_registered_once_and_checked():
    alone = schemes.Scheme((schemes.LOCAL._replace(name="alone"),))
    try:
        assert schemes.register_scheme("alone", alone) is schemes.SCHEMES["alone"]
        schemes.register_scheme("alone", alone)  # as when its module is imported again
        assert TimeSformerConfig(attention="alone").scheme is alone
        with pytest.raises(InputError, match="scheme 'alone' already"):
            schemes.register_scheme("alone", schemes.SCHEMES["joint"])
    finally:
        del schemes.SCHEMES["alone"]


def with_gaps(t, grid):
    return 2 * schemes.by_frame(t, grid)


def by_half(t, grid):
    """At every position the frames of each half of the clip."""
    half = np.arange(t)[:, None] * 2 // t
    return half * grid[0] * grid[1] + schemes.by_position(t, grid)


def reversed_(t, grid):
    return schemes.by_position(t, grid)[:, ::-1]


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ((schemes.SPATIAL, schemes.SPATIAL), "two layers of one name"),
        ((schemes.TEMPORAL,), "no layer of scheme 'new' joins the classification token"),
        ((AttentionLayer("gaps", with_gaps),), "without gaps"),
        ((AttentionLayer("flat", lambda t, grid: np.zeros(t, int)),), "patches"),
        ((AttentionLayer("rows", schemes.by_clip, within="frame"),), "has within='frame'; set"),
        ((AttentionLayer("halves", by_half, within="position"),), "has within='position'; set"),
        ((AttentionLayer("back", reversed_, within="position"),), "has within='position'; set"),
        ((AttentionLayer("all", schemes.by_clip, within="video"),), "has within='video'; set"),
    ],
)
def test_a_scheme_that_cannot_work_is_refused_in_a_line(layers, says):
    with pytest.raises(InputError, match=says) as raised:
        schemes.register_scheme("new", schemes.Scheme(layers))
    assert "\n" not in str(raised.value)
    assert "new" not in schemes.SCHEMES


def test_softmax_is_taken_in_float32_when_the_model_computes_in_bfloat16():
    qkv = jax.random.normal(jax.random.key(0), (40, 3, 2, 8))
    half = attention.attend(qkv.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    jaxpr = jax.make_jaxpr(attention.attend)(qkv.astype(jnp.bfloat16))
    exponentials = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "exp"]
    assert [eqn.outvars[0].aval.dtype for eqn in exponentials] == [jnp.float32]
    np.testing.assert_allclose(half.astype(jnp.float32), attention.attend(qkv), atol=0.03)


@pytest.mark.parametrize("size", [1, 30, 1e4])  # of the logits: 1e4 is a softmax of zeros and a one
@pytest.mark.parametrize("length", [1, 8, 64, 65, 130])
def test_attention_of_any_length_and_its_gradient_equal_pytorchs(length, size):
    rng = np.random.default_rng(length)
    qkv = rng.standard_normal((3, length, HEADS, CHANNELS)) * [[[[size]]], [[[1]]], [[[1]]]]
    direction = rng.standard_normal((length, HEADS, CHANNELS))
    theirs = torch.tensor(qkv, requires_grad=True)
    weights = torch.softmax(torch.einsum("qhd,khd->hqk", theirs[0], theirs[1]), dim=-1)
    expected = torch.einsum("hqk,khd->qhd", weights, theirs[2])
    expected.backward(torch.tensor(direction))

    with jax.enable_x64(True):
        out, vjp = jax.vjp(dot_product_attention, *jnp.asarray(qkv))
        gradient = vjp(jnp.asarray(direction))
    np.testing.assert_allclose(out, expected.detach(), atol=1e-12)
    for ours, exact in zip(gradient, theirs.grad):
        np.testing.assert_allclose(ours, exact, atol=1e-12 * max(size, 1))
