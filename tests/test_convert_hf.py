"""Hugging Face's port: layer by layer against the live model, its directories in and out."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from transformers import TimesformerConfig, TimesformerForVideoClassification

import timesformer_jax as tsf
from timesformer_jax.checkpoints.convert import convert
from timesformer_jax.models.attention import Tokens
from timesformer_jax.models.timesformer import parameters

pytestmark = pytest.mark.compiles

GOLDENS = pathlib.Path(__file__).parent / "data" / "goldens"
SCHEMES = {"divided_space_time": "divided", "joint_space_time": "joint", "space_only": "space"}


def port(attention, **fields):
    """Their model with every parameter random: their own start has zeros that would hide errors."""
    shape = {
        "image_size": 24, "patch_size": 8, "num_frames": 3, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 5,
    }  # fmt: skip
    config = TimesformerConfig(attention_type=attention, **shape | fields)
    model = TimesformerForVideoClassification(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def same_parameters(a, b):
    a, b = parameters(a), parameters(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        jax.tree.leaves(jax.tree.map(np.array_equal, a, b))
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories as transformers writes them, by attention type."""

    @functools.cache
    def save(attention):
        path = tmp_path_factory.mktemp(attention)
        port(attention).save_pretrained(path)
        return path

    return save


def their_layers(model, video):
    with torch.no_grad():
        out = model(torch.from_numpy(video).permute(0, 1, 4, 2, 3), output_hidden_states=True)
    return [x.numpy() for x in out.hidden_states], out.logits.numpy()


def our_layers(model, video):
    grid = video.shape[2] // model.config.patch_size, video.shape[3] // model.config.patch_size

    def run(video):
        states = [model.embedding(video)]
        for block in model.blocks:
            states.append(block(states[-1], grid))
        return states, model(video)

    return jax.jit(run)(video)


def as_theirs(x: Tokens):
    """(B, D) and (B, T, N, D) to (B, 1 + N T, D), time running fastest."""
    patches = np.asarray(x.patches).transpose(0, 2, 1, 3)
    cls = np.asarray(x.cls)[:, None]
    return np.concatenate([cls, patches.reshape(len(cls), -1, cls.shape[-1])], axis=1)


@pytest.mark.parametrize("attention", ["divided_space_time", "joint_space_time"])
def test_every_layer_equals_the_live_models(attention, saved):
    video = np.random.default_rng(0).normal(size=(2, 3, 24, 24, 3)).astype(np.float32)
    theirs, their_logits = their_layers(port(attention), video)
    ours, our_logits = our_layers(tsf.from_pretrained(saved(attention)), video)
    assert len(ours) == len(theirs) == 3
    for layer, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert np.abs(as_theirs(a) - b).max() < 1e-5 * np.abs(b).max(), layer
    assert np.abs(our_logits - their_logits).max() < 1e-5 * np.abs(their_logits).max()


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "whole"])
def test_all_ways_to_store_a_directory_are_the_same(safe, sharded, saved, tmp_path):
    whole = saved("divided_space_time")
    if safe:
        size = "40KB" if sharded else "1GB"
        port("divided_space_time").save_pretrained(tmp_path, max_shard_size=size)
    else:
        save_bin(port("divided_space_time"), tmp_path, shards=3 if sharded else 1)
    assert (len(list(tmp_path.glob("*0000*"))) > 1) == sharded
    assert same_parameters(tsf.from_pretrained(tmp_path), tsf.from_pretrained(whole))


def save_bin(model, path, shards):
    """As transformers before 5 wrote them."""
    model.config.save_pretrained(path)
    state = model.state_dict()
    if shards == 1:
        torch.save(state, path / "pytorch_model.bin")
        return
    files = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    shard_of = {name: files[i % shards] for i, name in enumerate(state)}
    for file in files:
        torch.save({k: v for k, v in state.items() if shard_of[k] == file}, path / file)
    index = {"metadata": {}, "weight_map": shard_of}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_half_precision_weights_are_read_as_float32(saved, tmp_path):
    port("joint_space_time").to(torch.bfloat16).save_pretrained(tmp_path)
    half = tsf.from_pretrained(tmp_path).head.kernel[...]
    whole = tsf.from_pretrained(saved("joint_space_time")).head.kernel[...]
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, whole, rtol=1e-2)


def test_model_without_head_gets_a_new_one(saved, tmp_path, caplog):
    port("divided_space_time").timesformer.save_pretrained(tmp_path)
    model = tsf.from_pretrained(tmp_path, num_classes=7)
    assert model.head.kernel.shape == (32, 7)
    assert "has no head" in caplog.text
    whole = tsf.from_pretrained(saved("divided_space_time"))
    assert np.array_equal(model.norm.scale[...], whole.norm.scale[...])


@pytest.mark.parametrize("attention", SCHEMES)
def test_there_and_back_bit_for_bit(attention, saved, tmp_path):
    source = saved(attention)
    convert(source, tmp_path / "ours", to="native")
    convert(tmp_path / "ours", tmp_path / "release.pyth", to="release")
    convert(tmp_path / "release.pyth", tmp_path / "hf", to="hf")
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    config = tsf.from_pretrained(tmp_path / "hf").config
    assert config.attention == SCHEMES[attention]
    assert config == tsf.from_pretrained(source).config


@pytest.mark.parametrize("attention", SCHEMES)
def test_transformers_loads_what_we_write_strictly(attention, tmp_path):
    labels = [f"doing {i}" for i in range(10)]
    source = GOLDENS / f"official_{attention}.pyth"
    convert(source, tmp_path / "hf", to="hf", num_heads=4, num_frames=4, labels=labels)
    model, loading = TimesformerForVideoClassification.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert model.config.id2label[9] == "doing 9"
    assert model.config.attention_type == attention
    assert model.config.num_attention_heads == 4
    if attention != "space_only":  # which there gives one row a frame
        goldens = np.load(GOLDENS / "official.npz")
        _, logits = their_layers(model.eval(), goldens[f"{attention}/native/video"])
        theirs = goldens[f"{attention}/native/logits"]
        assert np.abs(logits - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_frames_are_normalised_there_as_here(saved, tmp_path):
    convert(saved("divided_space_time"), tmp_path / "hf", to="hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert tuple(processor.image_mean) == (0.45,) * 3
    assert tuple(processor.image_std) == (0.225,) * 3
    assert dict(processor.crop_size) == {"height": 24, "width": 24}


def test_class_names_travel(saved, tmp_path):
    labels = {str(i): name for i, name in enumerate(["a", "b", "c", "d", "e"])}
    source = tmp_path / "named"
    port("divided_space_time").save_pretrained(source)
    config = json.loads((source / "config.json").read_text()) | {"id2label": labels}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["id2label"] == labels


def test_weights_for_other_arithmetic_are_refused(saved, tmp_path):
    port("joint_space_time", layer_norm_eps=1e-5).save_pretrained(tmp_path)
    with pytest.raises(tsf.InputError, match="layer_norm_eps = 1e-05"):
        tsf.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTModel"])
def test_an_image_vit_of_transformers_gives_its_features(kind, tmp_path):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=16, patch_size=8, id2label={0: "cat", 1: "dog", 2: "é"},
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path)
    image = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    inputs = torch.from_numpy(image.transpose(0, 3, 1, 2))
    ours = tsf.from_pretrained(tmp_path, attention="space", num_frames=1)
    with torch.no_grad():
        if kind == "ViTModel":
            expected = theirs(inputs).last_hidden_state[:, 0]
            found = ours.features(image[:, None])
        else:
            expected, found = theirs(inputs).logits, ours(image[:, None])
            assert ours.labels == ("cat", "dog", "é")
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
