"""`load`: the one way to a checkpoint of any kind, by path."""

import pathlib

import jax
import numpy as np
import pytest
import torch

import timesformer_jax as tsf
from timesformer_jax.checkpoints import store
from timesformer_jax.checkpoints.convert import convert
from timesformer_jax.checkpoints.load import load
from timesformer_jax.models.timesformer import parameters

GOLDENS = pathlib.Path(__file__).parent / "data" / "goldens"
RELEASE = GOLDENS / "official_joint_space_time.pyth"


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The release's tiny joint model, converted to our format."""
    path = tmp_path_factory.mktemp("ours") / "model"
    convert(RELEASE, path, num_heads=4, labels=[f"name {i}" for i in range(10)])
    return path


def test_a_file_a_folder_and_our_own_are_one_model(ours, caplog):
    caplog.clear()
    metadata, params = load(ours)
    assert "read only" not in caplog.text
    for source in (RELEASE, GOLDENS / "hf_joint_space_time"):
        overrides = {} if source.is_dir() else {"num_heads": 4}
        found, theirs = load(source, **overrides)
        assert (found.model, found.clip) == (metadata.model, metadata.clip)
        if source == RELEASE:
            assert_equal(theirs, params)
    model = tsf.from_pretrained(ours)
    assert_equal(parameters(model), params)
    assert model.config == metadata.model
    assert model.labels == metadata.labels == tuple(f"name {i}" for i in range(10))
    assert model.clip == metadata.clip


def test_parameters_go_where_the_sharding_says(ours):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    for source, overrides in ((ours, {}), (RELEASE, {"num_heads": 4})):
        _, params = load(source, sharding=sharding, **overrides)
        assert all(x.sharding == sharding for x in jax.tree.leaves(params))


def test_classes_are_not_made_up(tmp_path):
    state = torch.load(GOLDENS / "timm_vit.pth", weights_only=True)
    torch.save({k: v for k, v in state.items() if not k.startswith("head.")}, tmp_path / "v.pth")
    with pytest.raises(tsf.InputError, match=r"v\.pth has no classifier, .*config\.pretrained="):
        load(tmp_path / "v.pth", num_heads=4)
    metadata, _ = load(tmp_path / "v.pth", num_heads=4, needs_head=False)
    assert metadata.model.hidden_size == 48


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused_unless_asked_for(number, ours, tmp_path):
    content = torch.load(RELEASE, weights_only=True)
    content["model_state"]["model.norm.bias"][3] = number
    torch.save(content, tmp_path / "x.pyth")
    metadata, params = load(ours)
    params["norm"]["bias"] = params["norm"]["bias"].at[3].set(number)
    store.save_parameters(tmp_path / "ours", params, metadata)
    for source, overrides in (("x.pyth", {"num_heads": 4}), ("ours", {})):
        with pytest.raises(tsf.InputError, match="1 of 48 numbers of norm/bias are infinite") as e:
            load(tmp_path / source, **overrides)
        assert "\n" not in str(e.value)
        with pytest.raises(tsf.InputError, match="norm/bias"):
            convert(tmp_path / source, tmp_path / "out", to="hf", **overrides)
        assert not (tmp_path / "out").exists()
        _, found = load(tmp_path / source, allow_nonfinite=True, **overrides)
        assert not np.isfinite(found["norm"]["bias"][3])
