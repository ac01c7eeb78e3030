"""The function that is exported, its parameters, and the card that goes with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.models.timesformer import TimeSformer, class_probabilities, with_parameters
from timesformer_jax.transforms.preprocess import normalise, resample

VIDEO = "video"

FRAMES_READ = {
    "stride": "frames at a fixed distance: T frames over frame_stride * T / 30 seconds, of which"
    " the first and the last are taken; the clip lies where start says (middle, or first)",
    "segments": "the middle frame of each of T equal parts of the whole video",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What every format holds.

    Attributes:
      run: from parameters and clips (B, T, H, W, 3) to `output`, (B, classes) float32.
      parameters: by the name of their place in the model, such as "blocks/0/mlp/fc1/kernel".
      shape: of the clips: numbers, and names of the axes whose size is free.
      dtype: of the clips: "uint8" with preprocessing, else "float32".
      output: "probabilities" with preprocessing, else "logits".
      card: see `make_card`.
    """

    run: Callable[[dict[str, jax.Array], jax.Array], jax.Array]
    parameters: dict[str, jax.Array]
    shape: tuple[int | str, ...]
    dtype: str
    output: str
    card: dict[str, Any]

    def symbolic_input(self) -> jax.ShapeDtypeStruct:
        """The clips as JAX traces them, with free axes."""
        names = ", ".join(map(str, self.shape))
        return jax.ShapeDtypeStruct(jax.export.symbolic_shape(names), jnp.dtype(self.dtype))


def program(metadata: CheckpointMetadata, params: dict, preprocess: bool) -> Program:
    """The program of a checkpoint. It computes in float32, whatever dtype training had.

    Args:
      metadata, params: of the checkpoint.
      preprocess: whether it takes frames of any size, uint8 RGB, of which it crops the centre
        square, and gives probabilities. Otherwise it takes what `preprocess` gives, and gives
        logits.
    """
    config = dataclasses.replace(metadata.model, dtype="float32", remat="none", scan_layers=False)
    spec = metadata.clip
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    graph, state = nnx.split(_with_fused_projections(with_parameters(config, params)))
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]

    def run(parameters: dict[str, jax.Array], video: jax.Array) -> jax.Array:
        leaves = [
            (path, leaf.replace(parameters[name]))
            for name, (path, leaf) in zip(paths, nnx.to_flat_state(state))
        ]
        model = nnx.merge(graph, nnx.from_flat_state(leaves))
        if not preprocess:
            return model(video)
        return class_probabilities(model(centre_crops(video, spec)), metadata.multilabel)

    parameters = {
        name: leaf.get_value() for name, (_, leaf) in zip(paths, nnx.to_flat_state(state))
    }
    side = ("height", "width") if preprocess else (spec.crop, spec.crop)
    shape = ("batch", spec.frames, *side, 3)
    dtype, output = ("uint8", "probabilities") if preprocess else ("float32", "logits")
    card = make_card(metadata, shape, dtype, output)
    return Program(run, parameters, shape, dtype, output, card)


def centre_crops(frames: jax.Array, spec: ClipSpec) -> jax.Array:
    """`preprocess` of the centre square, for frames whose size is not known yet.

    Args:
      frames: (B, T, H, W, 3) uint8 RGB; B, H and W may be symbolic.

    Returns:
      (B, T, crop, crop, 3) float32, normalised.
    """
    b, t, height, width, _ = frames.shape
    # jax2onnx loses a reshape of one number, so that it is broadcast.
    high, wide = (jnp.full(1, jnp.asarray(size, jnp.float32)) for size in (height, width))
    side = jnp.minimum(high, wide)
    box = jnp.concatenate([(high - side) / 2, (wide - side) / 2, side])
    rows = frames.reshape(b * t, height, width, 3).astype(jnp.float32)
    clips = resample(rows, box, spec.crop).reshape(b, t, spec.crop, spec.crop, 3)
    return normalise(clips / 255, spec)


def _with_fused_projections(model: TimeSformer) -> TimeSformer:
    """The model with one linear layer for each pair of `proj` and `temporal_fc`.

    Nothing lies between the two in inference: (x W + b) W' + b' = x (W W') + (b W' + b').
    """
    for block in model.blocks:
        for layer in block.attention.values():
            last = layer.temporal_fc
            if last is None:
                continue
            kernel, bias = last.kernel[...], last.bias[...]
            first = layer.proj.bias[...]
            layer.proj.bias.set_value(jnp.matmul(first, kernel, precision="highest") + bias)
            fused = jnp.matmul(layer.proj.kernel[...], kernel, precision="highest")
            layer.proj.kernel.set_value(fused)
            layer.temporal_fc = None
    return model


def make_card(
    metadata: CheckpointMetadata, shape: tuple[int | str, ...], dtype: str, output: str
) -> dict[str, Any]:
    """What whoever runs the program must know: its input, sampling, classes and license."""
    clip = dataclasses.asdict(metadata.clip)
    return {
        "input": {"name": VIDEO, "shape": list(shape), "dtype": dtype},
        "output": {"name": output, "shape": ["batch", metadata.model.num_classes]},
        "sampling": FRAMES_READ[metadata.clip.sampling],
        "clip": clip,
        "labels": list(metadata.labels),
        "multilabel": metadata.multilabel,
        "attention": metadata.model.attention,
        "license": metadata.license,
        "license_note": metadata.license_note,
    }


def license_text(card: dict[str, Any]) -> str:
    """The LICENSE file of a folder, "" if no license is known."""
    if not card["license"]:
        return ""
    return f"License: {card['license']}\nSource of this statement: {card['license_note']}\n"


def size_of(parameters: dict[str, jax.Array]) -> int:
    """Bytes of all parameters."""
    return sum(x.nbytes for x in parameters.values())
