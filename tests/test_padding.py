"""Clips of different lengths in one batch: each has the numbers that it has alone."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import CHANNELS, HEADS, LAYERS

from timesformer_jax.checkpoints import schema
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input import pipeline, sampling
from timesformer_jax.data.records.open import open_split
from timesformer_jax.errors import InputError
from timesformer_jax.inference.clip_model import ClipModel
from timesformer_jax.models import padding
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
def test_wrong_valid_frames_give_one_line_errors(valid, said):
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


# ---- from the data to the model ------------------------------------------------------------------


@hypothesis.given(
    n=st.integers(1, 400), fps=st.sampled_from([5.0, 24.0, 30.0]), frames=st.integers(1, 20),
    stride=st.integers(1, 40), position=st.floats(0, 0.999),
)  # fmt: skip
@hypothesis.settings(deadline=None, derandomize=True)
def test_a_masked_clip_has_the_frames_of_a_repeated_one_up_to_the_videos_end(
    n, fps, frames, stride, position
):
    spec = ClipSpec(frames, stride, short="mask")
    found = sampling.train_indices(n, fps, spec, position, np.zeros(frames))
    repeated = dataclasses.replace(spec, short="repeat")
    whole = sampling.train_indices(n, fps, repeated, position, np.zeros(frames))
    assert (found == whole[: len(found)]).all()
    # The frames of the clip as real numbers, from 0: a video that has all of them is not short.
    span = stride * frames / 30 * fps
    inside = [i for i in range(frames) if i * max(span - 1, 0) / max(frames - 1, 1) < n]
    assert len(found) == (frames if n >= span else len(inside))
    assert (whole[len(found) :] == n - 1).all()


def test_a_masked_clip_of_segments_has_every_frame_of_a_shorter_video_once():
    spec = ClipSpec(8, sampling="segments", short="mask")
    assert sampling.test_indices(5, 30.0, spec, views=2).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert sampling.train_indices(8, 30.0, spec, 0.5, np.zeros(8)).shape == (8,)


def test_a_batch_says_how_many_frames_of_each_clip_count(demo_data):
    split = open_split(demo_data, "train")
    split = dataclasses.replace(
        split, num_frames=split.num_frames // np.arange(1, 9).repeat(8)[: len(split)]
    )
    options = {"batch_size": 8, "short_side_range": (32, 40), "flip": False, "seed": 0}
    spec = ClipSpec(16, 2, crop=32, short="mask")
    request = next(pipeline.train_requests(split, spec, **options))
    assert len(set(request.valid_frames.tolist())) > 2
    for row, (indices,), valid in zip(request.record, request.indices, request.valid_frames):
        assert indices.shape == (16,)
        assert (indices[valid - 1 :] == indices[valid - 1]).all()
        assert (np.diff(indices[:valid]) >= 0).all()
        assert indices.max() < split.num_frames[row]
    repeated = next(
        pipeline.train_requests(split, dataclasses.replace(spec, short="repeat"), **options)
    )
    assert repeated.valid_frames is None
    count = np.arange(16) < request.valid_frames[:, None, None]
    assert (np.where(count, repeated.indices - request.indices, 0) == 0).all()


def test_a_short_video_is_predicted_as_if_it_were_alone():
    config = tiny("divided")
    params, rng = random_parameters(config), np.random.default_rng(2)
    spec = ClipSpec(FRAMES, crop=4, short_side=4, short="mask")
    metadata = CheckpointMetadata(config, spec, ("a", "b", "c"), {})
    model = ClipModel(metadata, params, crops=1, batch_size=2, attention_kernels="auto")
    boxes = np.array([[0.0, 0.0, 4.0]])
    clips = [(rng.integers(0, 256, (k, 4, 4, 3), np.uint8), boxes) for k in (FRAMES, 2)]
    expected = []
    for frames, _ in clips:
        video = ((frames / 255 - 0.45) / 0.225).astype(np.float32)[None]
        expected.append(jax.nn.softmax(alone(config, params, video, None)[0][0]))
    np.testing.assert_allclose(model.classify(clips), expected, rtol=1e-4, atol=1e-5)
    frames = model.encode(clips, frames=True)["frames"]
    assert np.isnan(frames).any(axis=(1, 3)).tolist() == [[False] * 5, [False] * 2 + [True] * 3]


def test_the_spec_keeps_what_fills_up_short_clips():
    spec = ClipSpec(short="mask")
    assert schema.clip_spec(dataclasses.asdict(spec)) == spec
    older = {k: v for k, v in dataclasses.asdict(spec).items() if k != "short"}
    assert schema.clip_spec(older).short == "repeat"
    with pytest.raises(InputError, match="short must be repeat or mask, not 'pad'"):
        ClipSpec(short="pad")
