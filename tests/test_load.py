"""`load`: the one way to a checkpoint of any kind, by path."""

import pathlib
import sys

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import timesformer_jax as tsf
from timesformer_jax.checkpoints import store
from timesformer_jax.checkpoints.convert import convert
from timesformer_jax.checkpoints.load import load
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.models import schemes
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


def test_a_checkpoint_without_a_head_is_refused(tmp_path):
    state = torch.load(GOLDENS / "timm_vit.pth", weights_only=True)
    torch.save({k: v for k, v in state.items() if not k.startswith("head.")}, tmp_path / "v.pth")
    with pytest.raises(tsf.InputError, match=r"v\.pth is an image model.*config\.pretrained="):
        load(tmp_path / "v.pth", num_heads=4)
    metadata, _ = load(tmp_path / "v.pth", num_heads=4, needs_head=False)
    assert metadata.model.hidden_size == 48


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_nan_and_infinity_are_refused_unless_allowed(number, ours, tmp_path):
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


SCHEME = """
from timesformer_jax.models import schemes
schemes.register_scheme("{name}", schemes.Scheme((schemes.TEMPORAL, schemes.SPATIAL)))
"""


def test_a_scheme_from_outside_is_found_again_or_named(ours, tmp_path, monkeypatch):
    (tmp_path / "their_schemes.py").write_text(SCHEME.format(name="theirs"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(schemes, "SCHEMES", dict(schemes.SCHEMES))
    monkeypatch.setattr("timesformer_jax.models.config.SCHEMES", schemes.SCHEMES)
    monkeypatch.setattr(schemes, "MODULES", {})
    import their_schemes  # noqa: F401

    config = tsf.preset(
        "timesformer_tiny", attention="theirs", depth=1, hidden_size=16, num_heads=1, num_classes=2
    )
    model = tsf.TimeSformer(config, rngs=nnx.Rngs(0))
    metadata = CheckpointMetadata(config, ClipSpec(crop=32), (), {})
    store.save_parameters(tmp_path / "run", parameters(model), metadata)
    # In a process that did not import it, it is named; nothing is imported because a file says so.
    del schemes.SCHEMES["theirs"], sys.modules["their_schemes"]
    with pytest.raises(tsf.InputError, match="'theirs' is registered by their_schemes, which was"):
        load(tmp_path / "run")
    assert "their_schemes" not in sys.modules
    monkeypatch.setenv("TIMESFORMER_IMPORT", "their_schemes")
    assert load(tmp_path / "run")[0].model == config
    # A file does as well as a module; one that cannot be imported is one line.
    del schemes.SCHEMES["theirs"]
    monkeypatch.setenv("TIMESFORMER_IMPORT", str(tmp_path / "their_schemes.py"))
    assert load(tmp_path / "run")[0].model == config
    del schemes.SCHEMES["theirs"]
    monkeypatch.setenv("TIMESFORMER_IMPORT", "no_such_module")
    with pytest.raises(tsf.InputError, match="TIMESFORMER_IMPORT=no_such_module cannot be impo"):
        load(tmp_path / "run")
