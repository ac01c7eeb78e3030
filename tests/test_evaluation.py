"""Evaluation counts every video once, however many records and views it has."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input.pipeline import eval_batches
from timesformer_jax.data.records.open import open_split
from timesformer_jax.distributed.mesh import make_mesh
from timesformer_jax.evaluation.metrics import average_pieces
from timesformer_jax.evaluation.multi_view import evaluate
from timesformer_jax.evaluation.step import make_probabilities
from timesformer_jax.models.timesformer import TimeSformer, TimeSformerConfig, parameters

pytestmark = pytest.mark.decodes


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 99))
def test_pieces_are_averaged_whatever_their_order(video, seed):
    video = np.array(video)
    probabilities = np.random.default_rng(seed).random((len(video), 3)).astype(np.float32)
    averaged, first = average_pieces(probabilities, video)
    assert video[first].tolist() == sorted(set(video.tolist()))
    for row, number in zip(averaged, video[first]):
        pieces = [p.astype(np.float64) for p, v in zip(probabilities, video) if v == number]
        assert np.allclose(row, sum(pieces) / len(pieces), rtol=0, atol=1e-12)


def test_a_video_in_pieces_counts_once(demo_data):
    """21 records as 6 videos of 1 to 6 pieces, against the same done by hand without batches."""
    split = open_split(demo_data, "validation")
    video = np.repeat(np.arange(6), [1, 2, 3, 4, 5, 6]).astype(np.int32)
    video = np.random.default_rng(0).permutation(video)
    label = video % 8  # pieces share their video's label
    split = dataclasses.replace(split, video=video, label=label)
    clip = ClipSpec(frames=2, frame_stride=8, crop=32, short_side=40)
    model = TimeSformerConfig(
        num_classes=8, image_size=32, num_frames=2, hidden_size=16, depth=1, num_heads=2
    )
    params = parameters(TimeSformer(model, rngs=nnx.Rngs(0)))
    # A new head is too even for a clear order of classes.
    params["head"] = jax.tree.map(lambda x: x + np.linspace(-1, 1, 8) + 9 * x, params["head"])

    mesh = make_mesh()
    found = evaluate(
        jax.device_put(params, NamedSharding(mesh, P())),
        model, clip, split, mesh, batch_size=8, views=2, crops=3,
    )  # fmt: skip

    probabilities = jax.jit(make_probabilities(model, clip))
    by_video = {number: [] for number in range(6)}
    for batch in eval_batches(split, clip, batch_size=1, views=2, crops=3):
        p = probabilities(params, batch["frames"], batch["crop_boxes"])[0]
        by_video[video[batch["record"][0]]].append(np.asarray(p, np.float64))
    assert sorted(map(len, by_video.values())) == [1, 2, 3, 4, 5, 6]
    ranks = {
        number: np.argsort(-np.mean(pieces, axis=0)).tolist().index(number % 8)
        for number, pieces in by_video.items()
    }
    assert found.videos.tolist() == [1] * 6 + [0] * 2
    assert found.top1.tolist() == [int(ranks.get(i, 9) < 1) for i in range(8)]
    assert found.top5.tolist() == [int(ranks.get(i, 9) < 5) for i in range(8)]
    assert 0 < found.top5.sum() < 6  # neither answer would come out of no model at all
