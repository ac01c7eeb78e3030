"""Size and speed of exported programs, beside transformers' own ONNX export of its model.

    python experiments/export.py [--preset=timesformer_base] [--json=docs/export.json]

Random weights, one clip, the CPU. The contenders take turns, so that the load of the machine is
the same for all; the time of each is its fastest. Needs the extra `export`, and for transformers'
export torch, transformers and onnxscript. Prints the table of docs/deploy.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from timesformer_jax.checkpoints import store
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.export.export import export
from timesformer_jax.models.presets import preset
from timesformer_jax.models.timesformer import TimeSformer, parameters

PRESET = flags.DEFINE_string("preset", "timesformer_base", "name of the model's preset")
DEPTH = flags.DEFINE_integer("depth", None, "blocks; by default the preset's")
REPETITIONS = flags.DEFINE_integer("repetitions", 3, "runs of each contender")
JSON = flags.DEFINE_string("json", None, "file to write the figures to")

Run = Callable[[], np.ndarray]


def size(path: pathlib.Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def onnx(path: pathlib.Path, video: np.ndarray) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path))
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: video})[0]


def stablehlo(path: pathlib.Path, video: np.ndarray) -> Run:
    program = jax.export.deserialize(bytearray((path / "model.stablehlo").read_bytes()))
    arrays = jax.device_put(dict(np.load(path / "parameters.npz")))
    call = jax.jit(program.call)
    return lambda: np.asarray(call(arrays, video))


def saved_model(path: pathlib.Path, video: np.ndarray) -> Run:
    import tensorflow as tf

    served = tf.saved_model.load(os.fspath(path / "1")).signatures["serving_default"]
    return lambda: next(iter(served(video=tf.constant(video)).values())).numpy()


def transformers_onnx(folder: pathlib.Path, path: pathlib.Path, video: np.ndarray) -> Run:
    """Writes transformers' model of the same weights by torch's exporter; returns its run."""
    import torch
    from transformers import TimesformerForVideoClassification

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = TimesformerForVideoClassification.from_pretrained(folder).eval()

        def forward(self, video):
            return self.model(video).logits

    example = torch.zeros(2, *np.moveaxis(video, -1, 2).shape[1:])
    torch.onnx.export(
        Logits(), (example,), os.fspath(path), input_names=["video"], dynamo=True,
        external_data=False, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
    )  # fmt: skip
    return onnx(path, np.ascontiguousarray(np.moveaxis(video, -1, 2)))


def main(_: list[str]) -> None:
    config = preset(PRESET.value)
    if DEPTH.value:
        config = dataclasses.replace(config, depth=DEPTH.value)
    clip = ClipSpec(config.num_frames, crop=config.image_size)
    shape = 1, clip.frames, clip.crop, clip.crop, 3
    video = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        params = parameters(TimeSformer(config, rngs=nnx.Rngs(0)))
        store.save_parameters(folder / "run", params, CheckpointMetadata(config, clip, (), {}))
        del params
        runs, sizes = {}, {}
        for to, run in (("onnx", onnx), ("stablehlo", stablehlo), ("saved_model", saved_model)):
            export(folder / "run", folder / to, to=to)
            runs[to], sizes[to] = run(folder / to, video), size(folder / to)
        export(folder / "run", folder / "hf", to="hf")
        peer, path = "transformers' model by torch.onnx", folder / "peer.onnx"
        runs[peer], sizes[peer] = transformers_onnx(folder / "hf", path, video), size(path)
        figures = measure(runs, sizes)
    print("| program | MB | seconds a clip |\n|---|---|---|")
    for name, row in figures.items():
        print(f"| {name} | {row['bytes'] / 1e6:.0f} | {row['seconds']:.2f} |")
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(figures, indent=2) + "\n")


def measure(runs: dict[str, Run], sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """The fastest run of each, in turns; and how far the logits are apart."""
    logits = {name: run() for name, run in runs.items()}  # compiles, too
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPETITIONS.value):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    wanted = logits["stablehlo"]
    return {
        name: {
            "bytes": sizes[name],
            "seconds": min(times[name]),
            "all_seconds": times[name],
            "difference": float(np.abs(logits[name] - wanted).max() / np.abs(wanted).max()),
        }
        for name in runs
    }


if __name__ == "__main__":
    app.run(main)
