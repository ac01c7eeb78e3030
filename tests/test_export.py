"""Exported programs, run by onnxruntime, JAX alone and TensorFlow, against the model itself."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from timesformer_jax.checkpoints import store
from timesformer_jax.checkpoints.convert import convert, from_pretrained
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.cli.main import load_command
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input.sampling import test_crop_boxes as crop_boxes
from timesformer_jax.export import onnx_file, stablehlo
from timesformer_jax.export.export import WRITERS, export
from timesformer_jax.export.program import program
from timesformer_jax.models.schemes import SCHEMES
from timesformer_jax.models.timesformer import (
    TimeSformerConfig,
    abstract,
    class_probabilities,
    parameters,
    with_parameters,
)
from timesformer_jax.transforms.preprocess import preprocess

LABELS = ("jump", "run", "swim", "\u8d70\u308b", "sit, stand")
CLIP = ClipSpec(3, frame_stride=4, crop=32, short_side=40, mean=(0.4, 0.45, 0.5))


def weights(attention="divided", multilabel=False, clip=CLIP):
    """The metadata and random parameters, of all kinds, of a tiny model."""
    config = TimeSformerConfig(
        attention=attention, depth=1, hidden_size=16, num_heads=2, num_classes=5, image_size=32,
        num_frames=3, patch_size=8,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), jnp.float32),
        parameters(abstract(config)),
    )
    metadata = CheckpointMetadata(
        config, clip, LABELS, {}, license="MIT", license_note="a test", multilabel=multilabel
    )
    return metadata, params


def clips(dtype=np.float32, size=(32, 32), batch=2):
    rng = np.random.default_rng(1)
    shape = batch, 3, *size, 3
    return rng.integers(0, 256, shape).astype(np.uint8) if dtype == np.uint8 else (
        rng.normal(size=shape).astype(np.float32)
    )  # fmt: skip


def probabilities(model, frames, multilabel=False, clip=CLIP):
    """As prediction computes them, of the centre crop."""
    boxes = np.repeat(crop_boxes(*frames.shape[2:4], 1), len(frames), axis=0)
    video = preprocess(frames, boxes.astype(np.float32), clip)
    return class_probabilities(jax.jit(model.__call__)(video), multilabel)


def assert_close(found, wanted):
    """Within 1e-4 of the largest number."""
    wanted = np.asarray(wanted)
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def run_onnx(path, video):
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path))
    return session.run(None, {"video": video})[0], session


def run_stablehlo(path, video):
    with open(path / "model.stablehlo", "rb") as file:
        program = jax.export.deserialize(bytearray(file.read()))
    with np.load(path / "parameters.npz") as arrays:
        return np.asarray(program.call(dict(arrays), video)), program


def run_saved_model(path, video):
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path / "1"))
    (found,) = loaded.signatures["serving_default"](video=tf.constant(video)).items()
    return found[1].numpy(), loaded


pytestmark = [
    pytest.mark.compiles,
    # jax2onnx 0.13 is older than the JAX that is pinned.
    pytest.mark.filterwarnings("ignore:jax[.].* is deprecated:DeprecationWarning"),
]

RUNS = {"onnx": run_onnx, "stablehlo": run_stablehlo, "saved_model": run_saved_model}


@pytest.fixture
def lowered_once(monkeypatch):
    monkeypatch.setattr(stablehlo, "exported", functools.cache(stablehlo.exported))


@pytest.mark.usefixtures("lowered_once")
@pytest.mark.parametrize("attention", sorted(SCHEMES))
def test_logits_of_every_scheme(tmp_path, attention):
    metadata, params = weights(attention)
    wanted = jax.jit(with_parameters(metadata.model, params).__call__)(clips())
    exported = program(metadata, params, preprocess=False)
    for to, run in RUNS.items():
        WRITERS[to](os.fspath(tmp_path / to), exported)
        found, _ = run(tmp_path / to, clips())
        assert_close(found, wanted)


@pytest.mark.usefixtures("lowered_once")
def test_frames_of_any_size_and_number_to_probabilities(tmp_path):
    clip = dataclasses.replace(CLIP, channel_order="bgr")
    metadata, params = weights(multilabel=True, clip=clip)
    model = with_parameters(metadata.model, params)
    exported = program(metadata, params, preprocess=True)
    for to, run in RUNS.items():
        WRITERS[to](os.fspath(tmp_path / to), exported)
        for size, batch in (((40, 57), 1), ((61, 33), 3)):
            frames = clips(np.uint8, size, batch)
            found, _ = run(tmp_path / to, frames)
            assert_close(found, probabilities(model, frames, multilabel=True, clip=clip))


def test_command_writes_programs_with_card_labels_and_license(tmp_path):
    metadata, params = weights()
    wanted = jax.jit(with_parameters(metadata.model, params).__call__)(clips())
    store.save_parameters(tmp_path / "run", params, metadata)
    for to, name in (("onnx", "out.onnx"), ("stablehlo", "hlo"), ("saved_model", "tf")):
        load_command(["export", str(tmp_path / "run"), str(tmp_path / name), f"--to={to}"])()
    found, session = run_onnx(tmp_path / "out.onnx", clips())
    assert_close(found, wanted)
    properties = session.get_modelmeta().custom_metadata_map
    card = json.loads((tmp_path / "out.json").read_text())
    assert {k: v if isinstance(card[k], str) else json.loads(v) for k, v in properties.items()} == (
        card
    )
    assert card["labels"] == list(LABELS)
    assert card["license"] == "MIT"
    assert card["clip"]["mean"] == list(CLIP.mean)
    assert card["input"] == {"name": "video", "shape": ["batch", 3, 32, 32, 3], "dtype": "float32"}
    assert json.loads((tmp_path / "hlo" / "card.json").read_text()) == card
    assert "MIT" in (tmp_path / "hlo" / "LICENSE").read_text()
    assets = tmp_path / "tf" / "1" / "assets"
    assert json.loads((assets / "card.json").read_text()) == card
    assert tuple((assets / "labels.txt").read_text().splitlines()) == LABELS
    assert_runs_without_this_package(tmp_path / "hlo", wanted)


def assert_runs_without_this_package(folder, wanted):
    """In a process that finds JAX, and neither this package nor Flax."""
    np.save(folder / "video.npy", clips())
    code = """
        import sys
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("timesformer_jax", "flax", "orbax", "etils"):
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Refuse())
        import jax, jax.export, numpy as np
        with open("model.stablehlo", "rb") as file:
            program = jax.export.deserialize(bytearray(file.read()))
        assert program.platforms == ("cpu", "cuda", "tpu"), program.platforms
        with np.load("parameters.npz") as arrays:
            logits = program.call(dict(arrays), np.load("video.npy"))
        np.save("logits.npy", logits)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=folder)
    assert_close(np.load(folder / "logits.npy"), wanted)


def test_another_length_and_size(tmp_path):
    metadata, params = weights()
    store.save_parameters(tmp_path / "run", params, metadata)
    export(tmp_path / "run", tmp_path / "x.onnx", to="onnx", num_frames=4, image_size=48)
    model = from_pretrained(tmp_path / "run", num_frames=4, image_size=48)
    video = np.random.default_rng(2).normal(size=(1, 4, 48, 48, 3)).astype(np.float32)
    assert_close(run_onnx(tmp_path / "x.onnx", video)[0], jax.jit(model.__call__)(video))
    assert json.loads((tmp_path / "x.json").read_text())["clip"]["frames"] == 4


def test_hf_is_what_convert_writes(tmp_path):
    metadata, params = weights()
    store.save_parameters(tmp_path / "run", params, metadata)
    export(tmp_path / "run", tmp_path / "a", to="hf")
    convert(tmp_path / "run", tmp_path / "b", to="hf")
    names = sorted(os.listdir(tmp_path / "a"))
    assert "model.safetensors" in names
    assert names == sorted(os.listdir(tmp_path / "b"))
    for name in names:
        if name.endswith(".json"):
            assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    arrays, wanted = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert arrays.keys() == wanted.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, wanted[name])


def test_refusals(tmp_path, refusal, monkeypatch):
    metadata, params = weights()
    store.save_parameters(tmp_path / "run", params, metadata)
    (tmp_path / "there.json").write_text("mine")
    run = ("export", tmp_path / "run")
    assert "to must be one of" in refusal(*run, tmp_path / "x", "--to=tflite")
    assert "--preprocess" in refusal(*run, tmp_path / "x", "--to=hf", "--preprocess")
    assert "there.json exists" in refusal(*run, tmp_path / "there.onnx", "--to=onnx")
    for module, to in (("jax2onnx", "onnx"), ("tensorflow", "saved_model")):
        monkeypatch.setitem(sys.modules, module, None)
        message = refusal(*run, tmp_path / "x", f"--to={to}")
        assert "pip install" in message
        assert "[export]" in message
    monkeypatch.setattr(onnx_file, "MAX_BYTES", 100)
    assert "2 GiB" in refusal(*run, tmp_path / "x", "--to=onnx")
    assert sorted(os.listdir(tmp_path)) == ["run", "there.json"]
    assert (tmp_path / "there.json").read_text() == "mine"
