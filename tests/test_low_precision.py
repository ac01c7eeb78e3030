"""bfloat16 parameters: in memory, in our format and in Hugging Face's."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import timesformer_jax as tsf
from timesformer_jax.checkpoints.convert import convert
from timesformer_jax.checkpoints.load import load
from timesformer_jax.models.timesformer import parameters

SOURCE = pathlib.Path(__file__).parent / "data" / "goldens" / "hf_divided_space_time"


def flat(params):
    return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(params, sep="/").items()}


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("to", ["native", "hf"])
def test_a_checkpoint_in_bfloat16_is_half_as_large_and_rounded_once(tmp_path, to):
    convert(SOURCE, tmp_path / "whole", to=to)
    convert(SOURCE, tmp_path / "half", to=to, dtype="bfloat16")
    before, after = (flat(load(tmp_path / name)[1]) for name in ("whole", "half"))
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].dtype == np.float32
        rounded = value.astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(after[name], rounded, err_msg=name)
    # Of a quarter of a megabyte; what is not arrays takes some, too.
    assert 0.45 < size(tmp_path / "half") / size(tmp_path / "whole") < 0.6
    if to == "hf":
        config = json.loads((tmp_path / "half" / "config.json").read_text())
        assert config["dtype"] == "bfloat16"
    # A second conversion changes nothing more.
    convert(tmp_path / "half", tmp_path / "again", to="native", dtype="bfloat16")
    assert all((after[k] == v).all() for k, v in flat(load(tmp_path / "again")[1]).items())


def test_parameters_in_bfloat16_give_nearly_the_same_probabilities():
    whole, half = tsf.from_pretrained(SOURCE), tsf.from_pretrained(SOURCE, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters(half))} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters(whole))} == {jnp.dtype("float32")}
    config = whole.config
    shape = (2, config.num_frames, config.image_size, config.image_size, 3)
    video = jax.random.normal(jax.random.key(0), shape)
    expected = np.asarray(jax.nn.softmax(jax.jit(lambda v: whole(v))(video)), np.float64)
    found = np.asarray(jax.nn.softmax(jax.jit(lambda v: half(v))(video)), np.float64)
    assert 0 < np.abs(found - expected).max() < 0.02
    metadata, params = load(SOURCE, dtype="bfloat16")
    assert metadata.model.dtype == "bfloat16"
    assert all((flat(params)[k] == v).all() for k, v in flat(parameters(half)).items())


def test_unsupported_dtypes_give_one_line_errors(tmp_path):
    with pytest.raises(tsf.InputError, match="dtype must be float32 or bfloat16, not 'int8'"):
        convert(SOURCE, tmp_path / "x", dtype="int8")
    with pytest.raises(tsf.InputError, match="release has float32 only"):
        convert(SOURCE, tmp_path / "x", to="release", dtype="bfloat16")
    with pytest.raises(tsf.InputError, match="dtype"):
        tsf.from_pretrained(SOURCE, dtype="float8")
