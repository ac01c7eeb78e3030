"""Clips of different lengths in one batch: each has the numbers that it has alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import CHANNELS, HEADS, LAYERS

from timesformer_jax.errors import InputError
from timesformer_jax.models import padding, schemes
from timesformer_jax.models.attention import Tokens
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.ops import long_attention
from timesformer_jax.models.timesformer import abstract, parameters, with_parameters

pytestmark = pytest.mark.compiles

FRAMES = 5


def tiny(attention, **fields):
    return TimeSformerConfig(
        attention=attention,
        **{
            "num_classes": 3, "image_size": 4, "num_frames": FRAMES, "patch_size": 2,
            "hidden_size": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "scan_layers": True,
            **fields,
        },
    )  # fmt: skip


def random_parameters(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: (rng.standard_normal(x.shape) * 0.5).astype(np.float32),
        parameters(abstract(config)),
    )


def logits_and_gradient(config, params, video, direction, **valid):
    """Of the clips' logits along a direction; no gradient without one."""

    def run(params):
        return with_parameters(config, params)(video, **valid)

    if direction is None:
        return run(params), None
    out, backward = jax.vjp(run, params)
    return out, backward(direction)[0]


def alone(config, params, clip, direction):
    """As `logits_and_gradient`, of a clip (1, k, H, W, 3), by a model for k frames."""
    k, embedding = clip.shape[1], dict(params["embedding"])
    if time := "time" in embedding:
        embedding["time"] = embedding["time"][:k]
    shorter = dataclasses.replace(config, num_frames=k)
    run = jax.jit(functools.partial(logits_and_gradient, shorter))
    out, gradient = run(params | {"embedding": embedding}, clip, direction)
    if time and gradient:
        table = gradient["embedding"]["time"]
        gradient["embedding"]["time"] = jnp.pad(table, ((0, config.num_frames - k), (0, 0)))
    return out, gradient


@pytest.mark.parametrize(
    ("name", "k", "gradients", "fields"),
    [
        ("divided", 3, True, {}),
        ("divided", 1, False, {"scan_layers": False}),
        ("joint", 3, True, {"blocks": True, "remat": "block"}),
        ("joint", 1, False, {}),
        ("space", 3, False, {}),
        ("local_global", 1, False, {}),
        ("axial", 2, False, {}),
        ("time", 4, False, {}),
        ("space_then_time", 2, False, {}),
    ],
    ids=str,
)
def test_a_clip_that_is_filled_up_has_the_numbers_of_the_clip_alone(
    name, k, gradients, fields, monkeypatch
):
    fields = dict(fields)
    if fields.pop("blocks", False):
        take_blocks(monkeypatch)
    config = tiny(name, **fields)
    params, rng = random_parameters(config), np.random.default_rng(1)
    video = rng.standard_normal((2, FRAMES, 4, 4, 3)).astype(np.float32)
    direction = rng.standard_normal((1, 3)).astype(np.float32) if gradients else None
    both = None if direction is None else np.concatenate([0 * direction, direction])
    run = jax.jit(functools.partial(logits_and_gradient, config))
    found, gradient = run(params, video, both, valid_frames=np.array([FRAMES, k]))
    expected, other = alone(config, params, video[1:, :k], direction)
    np.testing.assert_allclose(found[1:], expected, rtol=1e-4, atol=1e-5)
    if gradients:
        largest = max(np.abs(g).max() for g in jax.tree.leaves(other))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest),
            gradient, other,
        )  # fmt: skip


def take_blocks(monkeypatch):
    monkeypatch.setattr(long_attention, "SHORT", 1)
    monkeypatch.setattr(long_attention, "BLOCK", 8)


def masked(qkv, number, valid, t, n):
    """Attention of the patches of one clip, written out with a mask of all pairs, in float64."""
    q, k, v = np.moveaxis(qkv.reshape(t * n, 3, HEADS, CHANNELS), 1, 0)
    frame = np.repeat(np.arange(t), n)
    number = number.ravel()
    pairs = (number[:, None] == number) & valid[frame]
    out = np.zeros((t * n, HEADS, CHANNELS))
    for i in np.flatnonzero(valid[frame]):
        for h in range(HEADS):
            s = np.exp(q[i, h] @ k[:, h].T * CHANNELS**-0.5) * pairs[i]
            out[i, h] = s @ v[:, h] / s.sum()
    return out.reshape(t, n, -1)


@pytest.mark.parametrize(
    ("name", "blocks"), [("temporal", False), ("joint", True), ("global", False), ("local", True)]
)
def test_padding_is_not_attended_to(name, blocks, monkeypatch):
    if blocks:
        take_blocks(monkeypatch)
    layer, t, grid = LAYERS[name]._replace(joins_cls=False), 5, (3, 2)
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((3, t, 6, 3, HEADS, CHANNELS)).astype(np.float32)
    valid = np.arange(t) < np.array([5, 1, 4])[:, None]
    found = jax.jit(lambda x: layer.attend(Tokens(None, x, jnp.asarray(valid)), grid))(qkv)
    assert np.isfinite(found.patches).all()
    number = layer.partition(t, grid)
    for clip, ours, there in zip(qkv.astype(np.float64), found.patches, valid):
        expected = masked(clip, number, there, t, 6)
        np.testing.assert_allclose(ours[there], expected[there], rtol=1e-4, atol=1e-5)


def test_without_valid_frames_nothing_of_it_is_traced(monkeypatch):
    """The program that kernels and plans are made for, whatever can be done with padding."""
    config, video = tiny("divided"), jax.ShapeDtypeStruct((2, FRAMES, 4, 4, 3), jnp.float32)
    params = parameters(abstract(config))

    def program(**valid):
        def run(params, video):
            return with_parameters(config, params)(video, **valid).sum()

        return str(jax.make_jaxpr(jax.grad(run))(params, video))

    selections = program(valid_frames=np.array([5, 2])).count("select_n")
    for name in ("mask", "over_valid", "present", "check_partition"):
        monkeypatch.setattr(padding, name, None)
    assert program().count("select_n") < selections


@pytest.mark.parametrize(
    ("valid", "said"),
    [
        ([3, 0], "valid_frames must be from 1 to the 5 frames of the clips, not 0 to 3"),
        ([6, 5], "valid_frames must be from 1 to the 5 frames of the clips, not 5 to 6"),
        ([3], r"valid_frames must be 2 integers, one for each clip, not int64 of shape \(1,\)"),
        ([3.0, 2.0], "valid_frames must be 2 integers, one for each clip, not float64 of shape"),
    ],
)
def test_wrong_valid_frames_are_one_line(valid, said):
    with pytest.raises(InputError, match=said):
        padding.mask(np.array(valid), (2, 5, 6, 6, 3))


def by_half(t, grid):
    return np.repeat(np.arange(t) * 2 // t, grid[0] * grid[1]).reshape(t, -1)


def by_window(t, grid):
    return np.repeat(np.arange(t) // 3, grid[0] * grid[1]).reshape(t, -1)


def test_a_scheme_whose_sequences_change_with_the_length_is_refused():
    with pytest.raises(InputError, match="attention layer 'half' puts other frames together in a"):
        padding.check_partition("half", by_half)
    for layer in (by_window, *(layer.partition for layer in LAYERS.values())):
        padding.check_partition("fine", layer)
