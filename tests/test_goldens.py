"""The released model's outputs on random weights (tests/data/goldens)."""

import pathlib

import jax
import numpy as np
import pytest

import timesformer_jax as tsf

GOLDENS = pathlib.Path(__file__).parent / "data" / "goldens"
SCHEMES = {"divided_space_time": "divided", "joint_space_time": "joint", "space_only": "space"}


def difference(ours, theirs):
    """max|a - b| as a share of max|b|."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope="module")
def goldens():
    return np.load(GOLDENS / "official.npz")


@pytest.mark.parametrize("name", SCHEMES)
def test_release_checkpoint_gives_the_released_models_outputs(name, goldens):
    model = tsf.from_pretrained(GOLDENS / f"official_{name}.pyth", num_heads=4)
    assert model.config.attention == SCHEMES[name]
    assert (model.config.image_size, model.config.patch_size) == (32, 8)
    assert (model.config.hidden_size, model.config.depth, model.config.num_classes) == (48, 3, 10)
    for case in ("native", "more_frames", "fewer_frames", "larger", "wide"):
        video = goldens[f"{name}/{case}/video"]
        assert difference(model(video), goldens[f"{name}/{case}/logits"]) < 1e-4, case
        assert difference(model.features(video), goldens[f"{name}/{case}/features"]) < 1e-4, case


@pytest.mark.parametrize("name", SCHEMES)
def test_goldens_hold_under_jit_and_in_bfloat16(name, goldens):
    path = GOLDENS / f"official_{name}.pyth"
    video, logits = goldens[f"{name}/native/video"], goldens[f"{name}/native/logits"]
    model = tsf.from_pretrained(path, num_heads=4)
    assert difference(jax.jit(lambda v: model(v))(video), logits) < 1e-4
    half = tsf.from_pretrained(path, num_heads=4, dtype="bfloat16")
    out = half(video)
    assert out.dtype == np.float32
    assert 1e-5 < difference(out, logits) < 0.05  # computed in bfloat16, and near
