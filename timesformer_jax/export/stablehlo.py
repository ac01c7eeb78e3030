"""StableHLO by `jax.export`: a program for CPU, GPU and TPU, and its parameters beside it."""

from __future__ import annotations

import json
import os

import jax
import jax.export
import numpy as np

from timesformer_jax.export.program import Program, license_text
from timesformer_jax.models.ops.kernels import select

PLATFORMS = ("cpu", "cuda", "tpu")


def exported(program: Program) -> jax.export.Exported:
    """The program as `jax.export` has it: a function of (parameters, video)."""
    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in program.parameters.items()}
    # A kernel of one device could not be lowered for the others.
    with select.attention_kernels("xla"):
        lower = jax.export.export(jax.jit(program.run), platforms=PLATFORMS)
        return lower(shapes, program.symbolic_input())


def write(path: str, program: Program) -> None:
    """Writes a folder: model.stablehlo, parameters.npz, card.json and, if known, LICENSE."""
    os.makedirs(path)
    with open(os.path.join(path, "model.stablehlo"), "wb") as file:
        file.write(exported(program).serialize())
    np.savez(
        os.path.join(path, "parameters.npz"),
        **{name: np.asarray(x) for name, x in program.parameters.items()},  # type: ignore[arg-type]
    )
    with open(os.path.join(path, "card.json"), "w", encoding="utf-8") as text:
        json.dump(program.card, text, indent=2)
    if license := license_text(program.card):
        with open(os.path.join(path, "LICENSE"), "w", encoding="utf-8") as text:
            text.write(license)
