"""Chooses the attention kernels of a program, before it is traced, by trying them.

The attentions of a model are found by tracing one block, so that every scheme's are, registered
ones too. Each is measured at the size that one device will have (`ops.kernels.measure`), unless the
user's cache has the figures.
"""

from __future__ import annotations

import dataclasses
import time
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from timesformer_jax.distributed import hosts
from timesformer_jax.distributed.sharding import target_device
from timesformer_jax.errors import InputError
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.ops.kernels import measure, select
from timesformer_jax.models.ops.kernels.registry import KERNELS, Case
from timesformer_jax.models.timesformer import abstract


def using(name: str) -> AbstractContextManager:
    """A context whose programs use "auto" (the fastest), "xla" or a kernel by its name.

    Raises:
      InputError: if there is no such kernel.
    """
    select.check_name(name)
    return select.attention_kernels(name)


Found = dict[Case, measure.Implementation]


def choose_kernels(
    model: TimeSformerConfig,
    clips: int,
    frames: int,
    side: int,
    *,
    gradients: bool,
    masked: bool = False,
) -> list[dict[str, Any]]:
    """Chooses the kernels of a program that is traced after this, for the current mesh.

    On several hosts all call this, and take the choice of process 0. On a CPU there is nothing to
    choose, and nothing is done.

    Args:
      model: the model.
      clips: how many go through the model at a time, on all devices together.
      frames, side: of a clip, the side in pixels.
      gradients: whether the program needs gradients of the attentions, as training does.
      masked: whether the program gives the model `valid_frames`: attention across frames, which
        leaves the padding out, has no kernels.

    Returns:
      The entries of `ops.kernels.cache` that the choice was made from.

    Raises:
      InputError: if the kernel that `select.attention_kernels` names cannot run.
      DeviceLost: if a kernel made the device useless; the next process passes over it.
    """
    name = select.attention_kernels.value
    if name == "xla" or (name == "auto" and _device() is None):
        return []
    found = _attentions(model, clips, frames, side, masked)
    if name != "auto":
        _check(name, found, masked)
    if name != "auto" or not found:
        return []
    names = {case: _candidates(case) for case in found}
    entries = _measured(found, names, gradients) if jax.process_index() == 0 else {}
    known = [["xla", *names[case]] for case in found]
    chosen = [
        among.index(entries[case]["chosen"]) if case in entries else 0
        for among, case in zip(known, found)
    ]
    for among, case, i in zip(known, found, hosts.of_first(np.array(chosen, np.int32))):
        if names[case]:
            select.choose(case, select.Choice(among[i], gradients))
    return list(entries.values())


def _device() -> jax.Device | None:
    """A device of this process that programs are traced for and that some kernel is for."""
    target = target_device()
    kernels = [kernel for of_kind in KERNELS.values() for kernel in of_kind.values()]
    if not any(kernel.runs_on(target) for kernel in kernels):
        return None
    alike = (d for d in jax.local_devices() if d.device_kind == target.device_kind)
    return next(alike, None)


def _attentions(
    model: TimeSformerConfig, clips: int, frames: int, side: int, masked: bool
) -> Found:
    """Every attention that may have a kernel, on one device, with its formulation "xla"."""
    # All blocks have the same.
    block = dataclasses.replace(model, depth=1, remat="none", scan_layers=False)
    video = jax.ShapeDtypeStruct((clips, frames, side, side, 3), jnp.float32)
    valid = jax.ShapeDtypeStruct((clips,), jnp.int32) if masked else None

    def run(model: Any, video: jax.Array, valid: jax.Array | None) -> jax.Array:
        return model(video, valid_frames=valid)

    recorder = select.Recorder()
    with select.recorder(recorder):
        nnx.eval_shape(run, abstract(block), video, valid)
    return recorder.found


def _check(name: str, found: Found, masked: bool) -> None:
    """Raises InputError unless a kernel has an attention of the model, and can compute it."""
    for case in found:
        select.select_implementation(case)
    if not any(name in KERNELS[case.kind] for case in found):
        kinds = ", ".join(kind for kind, kernels in KERNELS.items() if name in kernels)
        why = "which this model does not have"
        if masked:
            why += ", or not for clips that are filled up (clip.short=mask)"
        raise InputError(f"attention_kernels={name} is for {kinds} attention, {why}; use auto")


def _candidates(case: Case) -> list[str]:
    return [name for name in KERNELS[case.kind] if not select.unsupported(case, name)]


def _measured(
    found: Found, names: dict[Case, list[str]], gradients: bool
) -> dict[Case, dict[str, Any]]:
    """The entry of each case that there are kernels for; a line of the log if any is new."""
    device, begin = _device(), time.monotonic()
    assert device is not None
    entries, measured = {}, []
    for case, xla in found.items():
        if names[case]:
            entry, new = measure.fastest(case, names[case], xla, gradients, device)
            select.choose(case, select.Choice(entry["chosen"], gradients))  # for those around it
            entries[case] = entry
            measured += [entry] if new else []
    if measured:
        logging.info(
            "attention on %s, %s: %s; measured in %.0f s",
            device.device_kind,
            "with gradients" if gradients else "without gradients",
            "; ".join(map(describe, measured)),
            time.monotonic() - begin,
        )
    return entries


def describe(entry: dict[str, Any]) -> str:
    """An entry as text: the fastest first, then the others, then what was passed over and why."""
    about, tried = entry["about"], entry["tried"]
    times = sorted((s, name) for name, s in tried.items() if not isinstance(s, str))
    parts = [f"{name} {seconds * 1e3:.3g} ms" for seconds, name in times]
    parts += [f"not {name}: {why}" for name, why in tried.items() if isinstance(why, str)]
    size = " x ".join(map(str, about["shape"][:3]))
    return f"{about['kind']} of {size} patches by {', '.join(parts)}"
