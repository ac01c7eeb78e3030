"""Long clips: attention by blocks, pieces of frames, and memory that is linear in the frames."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import ONE, assert_same_training, mesh_of, tiny, trained
from test_attention import LAYERS

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.distributed import pieces
from timesformer_jax.models.attention import Tokens
from timesformer_jax.models.ops import long_attention
from timesformer_jax.models.ops.kernels import measure, select
from timesformer_jax.models.ops.reference import use_references
from timesformer_jax.models.timesformer import TimeSformerConfig
from timesformer_jax.planning.memory import compiled_memory
from timesformer_jax.planning.plan import make_plan
from timesformer_jax.planning.program import build
from timesformer_jax.planning.report import as_text
from timesformer_jax.recipes import kinetics400
from timesformer_jax.transforms.augment import augment
from timesformer_jax.transforms.augmentation import Augmentation
from timesformer_jax.transforms.preprocess import preprocess

pytestmark = pytest.mark.compiles


@pytest.fixture
def short(monkeypatch):
    """Everything is long: sequences of 4 tokens, blocks of 8, clips and pieces of 32 tokens."""
    monkeypatch.setattr(long_attention, "SHORT", 3)
    monkeypatch.setattr(long_attention, "BLOCK", 8)
    monkeypatch.setattr(pieces, "LONG", 32)
    monkeypatch.setattr(pieces, "PIECE", 32)
    jax.clear_caches()
    yield
    jax.clear_caches()


def expected(qkv, g):
    """Attention along axis 1 of (A, L, S, 3, h, d), written out in float64, and its gradient."""
    q, k, v = np.moveaxis(qkv.astype(np.float64), 3, 0)
    g = g.astype(np.float64).reshape(q.shape)
    scale = q.shape[-1] ** -0.5
    s = np.einsum("aqshd,akshd->ashqk", q, k) * scale
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("ashqk,akshd->aqshd", p, v)
    dp = np.einsum("aqshd,akshd->ashqk", g, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    bars = (
        np.einsum("ashqk,akshd->aqshd", ds, k),
        np.einsum("ashqk,aqshd->akshd", ds, q),
        np.einsum("ashqk,aqshd->akshd", p, g),
    )
    return out.reshape(*out.shape[:3], -1), np.stack(bars, axis=3)


@hypothesis.settings(
    max_examples=6, deadline=None, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
)
@hypothesis.given(
    a=st.integers(1, 3), length=st.integers(1, 40), s=st.sampled_from([1, 3, 4]),
    heads=st.integers(1, 2), logits=st.sampled_from([1, 300, 2**20]), spread=st.floats(0.1, 5),
)  # fmt: skip
def test_blocks_give_the_numbers_of_attention(a, length, s, heads, logits, spread):
    rng = np.random.default_rng(length)
    qkv = (rng.standard_normal((a, length, s, 3, heads, 4)) * spread).astype(np.float32)
    g = rng.standard_normal((a, length, s, heads * 4)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_attention, "BLOCK", 8)
        patch.setattr(long_attention, "LOGITS", {"cpu": logits})

        @jax.jit
        def run(qkv, g):
            out, backward = jax.vjp(lambda x: long_attention.attention(x, "cpu"), qkv)
            return out, backward(g)[0]

        found = run(qkv, g)
    for ours, theirs in zip(found, expected(qkv, g)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * (1 + np.abs(theirs).max()))


def test_blocks_of_bfloat16_are_as_exact_as_the_short_form():
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((1, 600, 2, 3, 2, 8)), jnp.bfloat16)
    g = jnp.asarray(rng.standard_normal((1, 600, 2, 16)), jnp.bfloat16)
    out, backward = jax.vjp(lambda x: long_attention.attention(x, "cpu"), qkv)
    assert out.dtype == jnp.bfloat16
    wide = (np.asarray(x, np.float32) for x in (qkv, g))
    for ours, theirs in zip((out, backward(g)[0]), expected(*wide)):
        worst = np.abs(np.asarray(ours, np.float32) - theirs).max()
        assert worst < 0.01 * np.abs(theirs).max()


@pytest.mark.parametrize("name", ["temporal", "temporal_with_token", "joint", "local", "spatial"])
def test_every_scheme_takes_blocks_for_long_sequences(name, short, monkeypatch):
    layer, (t, grid) = LAYERS[name], (9, (3, 3))
    rng = np.random.default_rng(0)
    count = layer.partition(t, grid).max() + 1
    cls = rng.standard_normal((2, count, 3, 2, 4)) if layer.joins_cls else None
    qkv = Tokens(cls, rng.standard_normal((2, t, 9, 3, 2, 4)))
    qkv = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), qkv)
    seen, blocks = [], long_attention.attention
    monkeypatch.setattr(
        long_attention, "attention", lambda x, p: (seen.append(x.shape), blocks(x, p))[1]
    )

    def both(qkv):
        out, backward = jax.vjp(lambda x: layer.attend(x, grid), qkv)
        return out, backward(jax.tree.map(jnp.cos, out))[0]

    found = jax.jit(both)(qkv)
    assert seen
    with use_references(True):
        other = jax.jit(both)(qkv)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, other)


def test_short_clips_keep_the_short_form():
    for config in ("timesformer_base", "timesformer_l"):
        clip = kinetics400(config).clip
        assert not pieces.is_long(clip.frames, (clip.crop // 16) ** 2)
    assert not long_attention.is_long(197, 8 * 12, "cpu")
    assert not long_attention.is_long(785, 16 * 12, "gpu")  # 16 x 448
    assert long_attention.is_long(1024, 196 * 12, "gpu")


@pytest.mark.parametrize("frames", [12, 13])
def test_pieces_give_what_the_whole_clip_gives(frames, short):
    x = np.random.default_rng(0).standard_normal((2, frames, 4, 6)).astype(np.float32)
    kernel = np.random.default_rng(1).standard_normal((6, 5)).astype(np.float32)
    sizes = []

    def layer(kernel, x):
        sizes.append(x.shape[1])
        return jnp.tanh(x @ kernel)

    def run(kernel, x):
        return pieces.in_pieces(lambda x: layer(kernel, x), x, 4)

    def both(function):
        out, backward = jax.vjp(function, kernel, x)
        return out, backward(out)

    found = jax.jit(lambda: both(run))()
    assert max(sizes) <= 4  # 2 clips of 4 frames of 4 tokens
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, both(layer)
    )


def test_a_long_clip_is_preprocessed_as_a_short_one(short):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 37, 20, 24, 3), np.uint8)
    boxes, flip = np.float32([[0, 2, 20], [1.5, 3, 16]]), np.array([True, False])
    clip = ClipSpec(37, crop=16, short_side=20)
    found = preprocess(frames, boxes, clip, flip, dtype="bfloat16")
    assert found.dtype == jnp.bfloat16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LONG", 2**15)
        whole = preprocess(frames, boxes, clip, flip)
    assert whole.dtype == jnp.float32
    np.testing.assert_array_equal(found, whole.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "fields",
    [
        dict(color_jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.5, erasing=1.0),
        dict(randaugment_layers=3, mixup=0.8, label_smoothing=0.1),
    ],
)
def test_a_long_clip_is_augmented_as_a_short_one(fields, short):
    rng = np.random.default_rng(0)
    clips = rng.random((4, 37, 16, 16, 3), np.float32).astype(np.float16)
    clips = clips * np.linspace(0.3, 1, 37, dtype=np.float16)[:, None, None, None]
    mesh, seeds, labels = mesh_of(ONE), np.arange(4, dtype=np.uint32), jnp.arange(4)

    def run(clips):
        return augment(
            clips, labels, seeds, Augmentation(**fields), fill=(0.5, 0.4, 0.3), classes=5, mesh=mesh
        )

    found, targets = jax.jit(run)(clips)
    assert found.dtype == jnp.float16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LONG", 2**15)
        jax.clear_caches()
        whole, other_targets = jax.jit(run)(clips.astype(np.float32))
    assert np.abs(np.asarray(whole) - clips).max() > 0.1
    np.testing.assert_array_equal(targets, other_targets)
    # float16 between operations; a level of an equalized or posterized clip may be the next one.
    far = np.abs(np.asarray(found, np.float32) - whole) > 0.003
    assert far.mean() < 0.01


@pytest.mark.parametrize(("scheme", "sizes"), [("divided", (2, 1, 1, 4)), ("time", (1, 1, 2, 4))])
def test_devices_that_share_a_long_clip_train_as_one_with_a_short_one(scheme, sizes, short):
    # 9 positions, which 4 devices do not divide; 16 frames, 4 on each, in pieces of 2 or fewer.
    config = tiny(scheme, image_size=12, num_frames=16, drop_path=0.21, remat="block")
    run = trained(config, sizes, steps=2)
    assert {c.kind for c in run.collectives} <= {"all-to-all", "all-reduce"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_attention, "SHORT", 256)
        patch.setattr(pieces, "LONG", 2**15)
        jax.clear_caches()
        assert_same_training(run, trained(config, ONE, steps=2))


def program(frames, **fields):
    config = kinetics400("timesformer_base")
    config.clip.frames, config.clip.crop, config.data.short_side_range = frames, 32, (36, 40)
    config.batch_size = 1
    fields = dict(hidden_size=32, num_heads=2, depth=2, patch_size=8, remat="block") | fields
    config.model.update(fields)
    return config


def test_twice_the_frames_need_twice_the_memory():
    def bytes_of(frames):
        devices = jax.devices()[:1]
        step = build(program(frames, depth=1), devices, 1)
        return compiled_memory(step, step.lower().compile()).activations

    first, second = bytes_of(4096), bytes_of(8192)
    assert first * 1.5 < second < first * 2.05
    # The logits alone are 2 heads x 16 positions x 8192^2 x 4 bytes. All of the step takes 1/18 of
    # that; with the logits of one head at one position it would be more than 1/16.
    assert second < 2 * 16 * 8192**2 * 4 / 16


def test_find_frames_finds_the_edge_of_a_given_memory():
    config = program(64, depth=1)
    found = make_plan(config, "h100:1", find_frames=True, memory=0.1)
    assert found.longest_clip > 64
    assert found.longest_clip % 8 == 0
    assert found.program.clip.frames == 64
    assert f"longest clip that fits: {found.longest_clip} frames" in as_text(found)
    assert not make_plan(program(found.longest_clip + 8, depth=1), "h100:1", memory=0.1).fits


def test_kernels_for_long_clips_are_compared_with_blocks(short):
    qkv = Tokens(None, jnp.ones((1, 9, 4, 3, 2, 8), jnp.bfloat16))
    case = select.local_case("temporal", qkv, (2, 2))
    assert select.is_long(case)
    (layer,) = TimeSformerConfig(attention="time").scheme.layers
    inputs = measure._inputs(case, jax.devices()[0])
    found = measure._reference(layer.attend, case, True, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_attention, "SHORT", 256)
        jax.clear_caches()
        plain = measure._reference(layer.attend, case, True, inputs)
    assert len(found) == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, plain)
