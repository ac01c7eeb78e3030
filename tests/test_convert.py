"""`convert`: what it writes, under which license; and one clear error for every wrong input."""

import dataclasses
import json
import pathlib
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import timesformer_jax as tsf
from timesformer_jax.checkpoints import catalogue
from timesformer_jax.checkpoints import store as checkpoints
from timesformer_jax.checkpoints.convert import convert, read
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.models.schemes import SCHEMES
from timesformer_jax.models.timesformer import abstract, parameters, with_parameters

pytestmark = pytest.mark.compiles

GOLDENS = pathlib.Path(__file__).parent / "data" / "goldens"
NAMES = ("divided_space_time", "joint_space_time", "space_only")
DIVIDED = GOLDENS / "official_divided_space_time.pyth"
VIT = GOLDENS / "timm_vit.pth"


def native(path, model, labels=(), **training):
    """A checkpoint in our own format that holds `model`."""
    clip = ClipSpec(frames=model.config.num_frames, frame_stride=4, crop=model.config.image_size)
    metadata = CheckpointMetadata(model.config, clip, labels, training)
    checkpoints.save_parameters(path, parameters(model), metadata)
    return path


def tiny(**fields):
    """A small model with every parameter random."""
    shape = {"image_size": 16, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    config = tsf.preset("timesformer_tiny", **shape | fields)
    rng = np.random.default_rng(0)

    def draw(shape):
        return jnp.asarray(rng.normal(size=shape.shape), jnp.float32)

    return with_parameters(config, jax.tree.map(draw, parameters(abstract(config))))


def same_parameters(a, b):
    a, b = parameters(a), parameters(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.mark.parametrize("name", NAMES)
def test_release_and_back_bit_for_bit(name, tmp_path):
    source = GOLDENS / f"official_{name}.pyth"
    convert(source, tmp_path / "ours", num_heads=4)
    convert(tmp_path / "ours", tmp_path / "back.pyth", to="release")
    before = torch.load(source, weights_only=True)["model_state"]
    after = torch.load(tmp_path / "back.pyth", weights_only=True)
    assert before.keys() == after["model_state"].keys()
    assert all(torch.equal(before[k], v) for k, v in after["model_state"].items())
    assert f"ATTENTION_TYPE: {name}" in after["cfg"]
    # What the release's arrays do not tell, our file in its layout does.
    assert tsf.from_pretrained(tmp_path / "back.pyth").config.num_heads == 4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_native_checkpoints_hold_every_scheme(scheme, tmp_path):
    source = tiny(attention=scheme)
    convert(native(tmp_path / "a", source), tmp_path / "b")
    model = tsf.from_pretrained(tmp_path / "b")
    assert model.config == source.config
    assert same_parameters(model, source)


@pytest.mark.parametrize("to", ["hf", "release"])
@pytest.mark.parametrize("scheme", sorted(set(SCHEMES) - {"divided", "joint", "space"}))
def test_formats_without_a_scheme_say_so(scheme, to, tmp_path):
    source = native(tmp_path / "a", tiny(attention=scheme))
    with pytest.raises(tsf.InputError, match=f"has no {scheme} attention, only divided"):
        convert(source, tmp_path / "b", to=to)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("kept", ["none", "space"])
def test_models_without_embeddings_go_out_with_zeros(kept, tmp_path):
    source = tiny(position_embedding=kept)
    convert(native(tmp_path / "a", source), tmp_path / "hf", to="hf")
    model = tsf.from_pretrained(tmp_path / "hf")
    assert not np.any(model.embedding.time[...])
    video = np.random.default_rng(0).normal(size=(1, 8, 16, 16, 3)).astype(np.float32)
    run = jax.jit(lambda v: (source(v), model(v)))
    before, after = run(video)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


def test_metadata_of_our_own_checkpoints_is_kept(tmp_path):
    source = native(tmp_path / "a", tiny(), labels=("x", "y", "z"), seed=5)
    convert(source, tmp_path / "b")
    before, after = (checkpoints.load_parameters(path)[0] for path in (source, tmp_path / "b"))
    assert (after.clip, after.labels, after.config["seed"]) == (before.clip, before.labels, 5)
    # Another length and another head change what the metadata says of them.
    convert(source, tmp_path / "c", num_frames=16, num_classes=2)
    metadata = checkpoints.load_parameters(tmp_path / "c")[0]
    assert (metadata.clip.frames, metadata.clip.frame_stride, metadata.labels) == (16, 2, ())
    assert (metadata.model.num_frames, metadata.model.num_classes) == (16, 2)


def test_another_number_of_frames_spans_the_same_time_or_is_the_papers():
    assert read(DIVIDED, num_heads=4).clip.frame_stride == 64  # of 4 frames, as the paper's 256
    assert read(DIVIDED, num_heads=4, num_frames=96).clip.frame_stride == 4


def test_any_number_of_labels_stays_with_a_model(tmp_path):
    metadata = CheckpointMetadata(
        tiny().config, ClipSpec(crop=16), ("x", "y", "z"), {}, multilabel=True
    )
    checkpoints.save_parameters(tmp_path / "a", parameters(tiny()), metadata)
    convert(tmp_path / "a", tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c", num_classes=5)
    assert checkpoints.load_parameters(tmp_path / "b")[0].multilabel
    assert not checkpoints.load_parameters(tmp_path / "c")[0].multilabel


@pytest.mark.parametrize("form", ["hf", "release"])
def test_clips_labels_and_license_come_back_from_other_formats(form, tmp_path, monkeypatch):
    """Of a model of one's own, whatever published model has its shape."""
    clip = ClipSpec(
        frames=8, frame_stride=3, crop=16, sampling="segments", channel_order="bgr",
        mean=(0.1, 0.2, 0.3), start="first", short_side=40,
    )  # fmt: skip
    metadata = CheckpointMetadata(tiny().config, clip, ("x", "y", "z"), {}, multilabel=True)
    checkpoints.save_parameters(tmp_path / "a", parameters(tiny()), metadata)
    known = catalogue.by_name("TimeSformer_divST_8x32_224_K400.pyth")
    monkeypatch.setattr(catalogue, "authors_model", lambda config: known)
    convert(tmp_path / "a", tmp_path / "b", to=form)
    convert(tmp_path / "b", tmp_path / "c")
    found = checkpoints.load_parameters(tmp_path / "c")[0]
    assert found.clip == clip
    assert found.labels == ("x", "y", "z")
    assert found.multilabel
    assert found.license == ""


def test_license_of_the_authors_stays_with_their_weights(tmp_path, caplog, monkeypatch):
    """Theirs are known by their names and shapes, here those of a tiny model."""
    known = catalogue.by_name("TimeSformer_divST_8x32_224_K400.pyth")
    known = dataclasses.replace(known, clip=ClipSpec(frames=4, crop=32))
    shape = read(DIVIDED).config
    monkeypatch.setattr(catalogue, "authors_model", lambda config: config == shape and known)
    convert(DIVIDED, tmp_path / "ours")
    monkeypatch.undo()
    assert "its license is CC-BY-NC-4.0: no commercial use" in caplog.text
    note = checkpoints.load_parameters(tmp_path / "ours")[0].license_note
    assert note.startswith("its names and shapes are those of TimeSformer_divST_8x32_224_K400")
    convert(tmp_path / "ours", tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "r.pyth", to="release")
    assert checkpoints.load_parameters(tmp_path / "ours")[0].license == "CC-BY-NC-4.0"
    assert torch.load(tmp_path / "r.pyth", weights_only=True)["license"] == "CC-BY-NC-4.0"
    with safe_open(tmp_path / "hf" / "model.safetensors", "np") as f:
        assert f.metadata()["license"] == "CC-BY-NC-4.0"
    for folder in ("ours", "hf"):
        text = (tmp_path / folder / "LICENSE").read_text()
        assert "NonCommercial" in text
        assert note in text


def test_a_license_that_is_given_is_written_down_with_what_was_there_before(tmp_path):
    labels = [f"é {i}" for i in range(10)]
    convert(DIVIDED, tmp_path / "a", license="CC-BY-NC-4.0")
    convert(tmp_path / "a", tmp_path / "hf", to="hf", license="MIT")
    convert(tmp_path / "hf", tmp_path / "r.pyth", to="release", labels=labels)
    convert(tmp_path / "r.pyth", tmp_path / "b")
    metadata = checkpoints.load_parameters(tmp_path / "b")[0]
    assert metadata.license == "MIT"
    assert metadata.license_note == "as given when a was converted; before: CC-BY-NC-4.0"
    assert metadata.labels == tuple(labels)
    assert metadata.license_note in (tmp_path / "b" / "LICENSE").read_text()


def test_own_weights_and_image_models_get_no_license(tmp_path, caplog):
    convert(native(tmp_path / "a", tiny()), tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "r.pyth", to="release")
    convert(tmp_path / "r.pyth", tmp_path / "b")
    convert(VIT, tmp_path / "vit", num_heads=4)
    convert(DIVIDED, tmp_path / "of_the_authors_names_alone")
    assert not list(tmp_path.rglob("LICENSE"))
    assert "CC-BY-NC" not in caplog.text


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(tsf.InputError, match="exists; remove it"):
        convert(DIVIDED, tmp_path / "there")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(tsf.InputError, match="disk full at"):
        convert(DIVIDED, tmp_path / "new", to="hf")
    assert [x.name for x in tmp_path.iterdir()] == ["there"]


def test_options_are_checked(tmp_path):
    for options, message in {
        "to": ({"to": "onnx"}, "to must be one of native, hf, release, not 'onnx'"),
        "labels": ({"labels": ["a"]}, "1 labels for a head of 10 classes"),
        "resize": ({"resize": "nearest"}, "resize must be one of bicubic, official"),
        "field": ({"num_frame": 8}, "no model field 'num_frame'; did you mean 'num_frames'?"),
        "fixed": (
            {"patch_size": 16, "depth": 5},
            "patch_size is 8, not 16, depth is 3, not 5, which cannot be changed",
        ),
        "scheme": ({"attention": "joint"}, "a divided model cannot become a joint one"),
        "heads": ({"num_heads": 5}, "hidden_size 48 is not divisible by num_heads 5"),
        "size": ({"image_size": 36}, "image_size 36 is not divisible by patch_size 8"),
    }.values():
        with pytest.raises(tsf.InputError, match=re.escape(message)):
            convert(DIVIDED, tmp_path / "out", **options)


def test_heads_that_a_checkpoint_tells_are_not_changed(tmp_path):
    ours = native(tmp_path / "a", tiny())
    for form in ("hf", "release"):
        convert(ours, tmp_path / form, to=form)
    for path in (ours, tmp_path / "hf", tmp_path / "release"):
        assert read(path, num_heads=2).config.num_heads == 2
        assert "num_heads is 2, not 4, which cannot be changed" in error(path, num_heads=4)
    assert read(DIVIDED, num_heads=2).config.num_heads == 2  # it tells none


# What can be wrong with a file.


def error(path, **overrides):
    """The message of loading `path`, which is one line and begins with the path."""
    with pytest.raises(tsf.InputError) as caught:
        tsf.from_pretrained(path, **overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def changed(path, change, container="model_state"):
    content = torch.load(DIVIDED, weights_only=True)
    change(content[container] if container else content)
    torch.save(content, path)
    return path


def test_missing_array_is_named(tmp_path):
    key = "model.blocks.1.temporal_attn.proj.weight"
    path = changed(tmp_path / "x.pyth", lambda state: state.pop(key))
    message = error(path)
    assert "blocks.1.temporal_attn.proj.weight is missing" in message
    assert "the file is incomplete" in message


def test_missing_block_is_named(tmp_path):
    def without_block(state):
        for name in [k for k in state if ".blocks.1." in k]:
            del state[name]

    assert "blocks.1." in error(changed(tmp_path / "x.pyth", without_block))


def test_array_of_another_shape_is_named(tmp_path):
    key = "model.blocks.0.attn.qkv.weight"
    path = changed(tmp_path / "x.pyth", lambda state: state.update({key: torch.ones(100, 48)}))
    message = error(path)
    assert "blocks.0.attn.qkv.weight has shape (100, 48)" in message
    assert "(144, 48)" in message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pos_embed", torch.ones(1, 19, 48), "pos_embed has 19 rows; one and a square"),
        ("pos_embed", torch.ones(17, 48), "pos_embed has shape (17, 48); 3 axes"),
        ("patch_embed.proj.weight", torch.ones(48, 1, 8, 8), "8 x 8 in 1 channels"),
        ("patch_embed.proj.weight", torch.ones(48, 3, 8, 4), "8 x 4 in 3 channels"),
        ("head.weight", torch.ones(10), "head.weight has shape (10,)"),
    ],
)
def test_shapes_that_make_no_model_are_named(key, value, message, tmp_path):
    path = changed(tmp_path / "x.pyth", lambda state: state.update({f"model.{key}": value}))
    assert message in error(path)


def test_left_over_arrays_are_named(tmp_path):
    key = "model.blocks.2.ls1.gamma"
    path = changed(tmp_path / "x.pyth", lambda state: state.update({key: torch.ones(48)}))
    assert "blocks.2.ls1.gamma has no place in a divided model" in error(path)


def test_unknown_names_are_shown(tmp_path):
    save_file({"conv1.weight": torch.ones(3, 3)}, tmp_path / "resnet.safetensors")
    message = error(tmp_path / "resnet.safetensors")
    assert "conv1.weight" in message
    assert "rename them to timm's" in message


class Code:
    def __reduce__(self):
        return print, ("this ran",)


def test_pickle_of_anything_but_tensors_is_not_run(tmp_path, capsys):
    torch.save({"model_state": {"cls_token": torch.ones(1)}, "cfg": Code()}, tmp_path / "x.pyth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps({"cls_token": Code()}))
    for name in ("x.pyth", "y.pth"):
        message = error(tmp_path / name)
        assert "torch.save(model.state_dict(), path)" in message
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "holds a Tensor, not a dict"),
        ({}, "it holds no arrays"),
        ({"epoch": 3}, "'epoch' is a int, not a tensor"),
        ({"model": {"head": {"weight": torch.ones(2)}}}, "'head' is a dict, not a tensor"),
    ],
)
def test_torch_files_without_a_state_dict(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    assert message in error(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "npz"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(kind, share, tmp_path):
    state = {name: value.contiguous() for name, value in torch.load(VIT).items()}
    path = tmp_path / "whole"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "npz":
        with open(path, "wb") as f:
            np.savez(f, **{k: v.numpy() for k, v in state.items()})
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(content[: int(len(content) * share)])
    message = error(cut)
    assert "damaged" in message or "holds more than tensors" in message


def test_npz_with_flipped_bits_and_with_objects(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(1000), b=np.zeros(10))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[500] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    assert "Bad CRC-32" in error(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", a=np.array([{}], dtype=object))
    assert "damaged, or no checkpoint" in error(tmp_path / "y.npz")


def test_paths_that_hold_no_checkpoint(tmp_path):
    assert "no checkpoint there" in error(tmp_path / "nothing.pyth")
    (tmp_path / "text.pth").write_text("a page that says 404, not found, and so on")
    assert "damaged, or no checkpoint" in error(tmp_path / "text.pth")
    (tmp_path / "empty").mkdir()
    assert "no finished checkpoint there" in error(tmp_path / "empty")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert "a config.json and no weights; one of model.safetensors" in error(tmp_path / "hf")


def test_directories_with_something_missing(tmp_path):
    source = GOLDENS / "hf_joint_space_time"
    arrays = load_file(source / "model.safetensors")
    index = {"weight_map": {name: "a.safetensors" for name in arrays}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(tsf.InputError, match=r"a\.safetensors: missing, though .* lists it"):
        tsf.from_pretrained(tmp_path)
    name = "timesformer.encoder.layer.1.output.dense.bias"
    save_file({k: v for k, v in arrays.items() if k != name}, tmp_path / "a.safetensors")
    assert f"{name} is not in a.safetensors" in error(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map"')
    assert "damaged" in error(tmp_path)
