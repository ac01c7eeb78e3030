"""Writes checkpoints: in our format, as a Hugging Face directory, or as the authors' release."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import traverse_util
from tqdm import tqdm

from timesformer_jax import storage
from timesformer_jax.checkpoints import run_files, schema, store
from timesformer_jax.checkpoints.card import write_card
from timesformer_jax.checkpoints.catalogue import NON_COMMERCIAL
from timesformer_jax.checkpoints.convert.adapt import adapt
from timesformer_jax.checkpoints.convert.checkpoint import Checkpoint
from timesformer_jax.checkpoints.convert.formats import Format, HuggingFace, Release, hf, release
from timesformer_jax.checkpoints.convert.reader import read
from timesformer_jax.checkpoints.run_files import RunFiles
from timesformer_jax.data.annotations import read_labels
from timesformer_jax.errors import InputError

T = TypeVar("T")

LICENSE_TEXT = """\
These weights derive from the TimeSformer release of Facebook, Inc. (Bertasius, Wang and
Torresani, "Is Space-Time Attention All You Need for Video Understanding?"), and are licensed under
Creative Commons Attribution-NonCommercial 4.0 International (CC BY-NC 4.0):
https://creativecommons.org/licenses/by-nc/4.0/legalcode

They were converted to another file format; see the file's own notes for other changes.
"""


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    to: str = "native",
    dtype: str = "float32",
    resize: str = "bicubic",
    labels: str | Sequence[str] | None = None,
    license: str | None = None,
    revision: str | None = None,
    results: str | None = None,
    name: str | None = None,
    allow_nonfinite: bool = False,
    **overrides: Any,
) -> None:
    """Reads a checkpoint of any format that `from_pretrained` reads, and writes it in another.

    Args:
      src: a file or directory, or a name.
      dst: the file or directory to write; it must not exist.
      to: "native", a directory that `from_pretrained`, training and prediction read; "hf", a
        directory that transformers' `TimesformerForVideoClassification.from_pretrained` reads; or
        "release", a torch file (.pyth) in the authors' layout.
      dtype: of the arrays on disk, "float32" or "bfloat16", which takes half the space and keeps 8
        bits of each number; "native" and "hf" have it. Read again, they are float32.
      resize: how position embeddings are resized, as in `from_pretrained`.
      labels: class names in the order of the logits, or a file with one of them a line; by default
        those of src.
      license: of the weights, such as "MIT"; by default as src says, or the authors' license for
        their own weights. The output says which of these it was.
      revision: of a name on the Hugging Face Hub.
      results: results.json of `timesformer evaluate`, for the model card of "hf"; what a run
        measured itself is in it in any case.
      name: of the repository, for the model card; by default that of the directory.
      allow_nonfinite: write parameters that are infinite or not a number, too.
      **overrides: fields of `TimeSformerConfig`, as in `from_pretrained`.

    Raises:
      InputError: if src cannot be read, dst exists, or the format cannot hold the model.
    """
    dst = os.path.abspath(dst)
    _check_output(dst, to, dtype)
    checkpoint = read(src, resize, revision=revision, allow_nonfinite=allow_nonfinite, **overrides)
    checkpoint = relabelled(checkpoint, labels, license)
    about = _about(checkpoint, results)
    with written_at(dst) as partial:
        written = _WRITERS[to](os.fspath(partial), checkpoint, dtype)
        if to == "hf":
            write_card(
                partial, written.metadata, name or os.path.basename(dst), about,
                for_transformers=True,
            )  # fmt: skip
    logging.info("%s: %s written to %s", src, checkpoint.config.attention, dst)
    if checkpoint.license == NON_COMMERCIAL:
        logging.warning(
            "%s: its license is %s: no commercial use; the output says so (%s)",
            src, checkpoint.license, checkpoint.license_note,
        )  # fmt: skip
    elif not checkpoint.license and not checkpoint.is_image_model:
        logging.info("%s: no license is known; --license=... writes one down", src)


def _check_output(dst: str, to: str, dtype: str) -> None:
    if to not in _WRITERS:
        raise InputError(f"to must be one of {', '.join(_WRITERS)}, not {to!r}")
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype must be float32 or bfloat16, not {dtype!r}")
    if dtype != "float32" and to == "release":
        raise InputError("the authors' release has float32 only: write bfloat16 to native or hf")
    if os.path.exists(dst):
        raise InputError(f"{dst} exists; remove it or choose another destination")


def _about(checkpoint: Checkpoint, results: str | None) -> RunFiles:
    """What the run of a checkpoint, and a results.json, say of it."""
    about = run_files.read(checkpoint.step_folder, checkpoint.metadata)
    if results is None:
        return about
    return about._replace(evaluations=(run_files.evaluated(results), *about.evaluations))


@contextlib.contextmanager
def written_at(dst: str) -> Iterator[epath.Path]:
    """`storage.atomic_path` in a folder that is made where there is none."""
    with storage.disk_errors(dst):
        os.makedirs(os.path.dirname(dst), exist_ok=True)
        with storage.atomic_path(epath.Path(dst)) as partial:
            yield partial


def relabelled(
    checkpoint: Checkpoint, labels: str | Sequence[str] | None, license: str | None
) -> Checkpoint:
    """The checkpoint with other class names, or another license, where one is given."""
    return _with_license(_with_labels(checkpoint, labels), license)


def _with_license(checkpoint: Checkpoint, license: str | None) -> Checkpoint:
    if license is None:
        return checkpoint
    license = schema.text(license, "license")
    said = checkpoint.license or "none"
    note = f"as given when {os.path.basename(checkpoint.path)} was converted; before: {said}"
    return dataclasses.replace(checkpoint, license=license, license_note=note)


def _with_labels(checkpoint: Checkpoint, labels: str | Sequence[str] | None) -> Checkpoint:
    if labels is None:
        return checkpoint
    if isinstance(labels, str):
        labels = read_labels(labels)
    if len(labels) != checkpoint.config.num_classes:
        raise InputError(
            f"{len(labels)} labels for a head of {checkpoint.config.num_classes} classes; give one "
            "label a class"
        )
    return dataclasses.replace(checkpoint, labels=tuple(labels))


def _write_native(path: str, checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    # Popped one by one, so that the source is unmapped before Orbax fills its buffers.
    params = {
        name: jnp.array(checkpoint.params.pop(name).load(), dtype)
        for name in _progress(list(checkpoint.params))
    }
    params = traverse_util.unflatten_dict(params, sep="/")
    store.save_parameters(path, params, checkpoint.metadata)
    _write_license(path, checkpoint)
    return checkpoint


def _write_hf(path: str, checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    from safetensors.numpy import save_file

    arrays, checkpoint = _to_format(checkpoint, HuggingFace(), dtype)
    os.makedirs(path)
    # transformers needs "format"; an empty license says that none is known.
    metadata = {"format": "pt", "license": checkpoint.license}
    metadata["license_note"] = checkpoint.license_note
    metadata["clip"] = json.dumps(dataclasses.asdict(checkpoint.clip))
    weights = os.path.join(path, "model.safetensors")
    save_file(arrays, weights, metadata=metadata)
    config = hf.config_json(checkpoint.config, checkpoint.labels, checkpoint.multilabel)
    config["dtype"] = dtype
    _write_json(path, "config.json", config)
    # It comes from a temporary file, which its owner alone may read.
    shutil.copymode(os.path.join(path, "config.json"), weights)
    _write_json(path, "preprocessor_config.json", hf.preprocessor_json(checkpoint.clip))
    _write_license(path, checkpoint)
    return checkpoint


def _write_release(path: str, checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    import torch

    arrays, checkpoint = _to_format(checkpoint, Release(), dtype)
    content = {
        "epoch": 0,
        "model_state": {
            # torch warns about read-only arrays, so these few are copied.
            f"model.{name}": torch.from_numpy(np.require(value, requirements=["W"]))
            for name, value in arrays.items()
        },
        "optimizer_state": {},
        "cfg": release.cfg_text(checkpoint.config, checkpoint.clip),
        "num_heads": checkpoint.config.num_heads,  # the arrays do not tell it
        "license": checkpoint.license,
        "license_note": checkpoint.license_note,
        "labels": list(checkpoint.labels),
        "clip": dataclasses.asdict(checkpoint.clip),
        "multilabel": checkpoint.multilabel,
    }
    torch.save(content, path)
    return checkpoint


_WRITERS = {"native": _write_native, "hf": _write_hf, "release": _write_release}


def _to_format(
    checkpoint: Checkpoint, format: Format, dtype: str
) -> tuple[dict[str, np.ndarray], Checkpoint]:
    """The arrays in an external format, by its names; removes them from the checkpoint.

    Also returns the checkpoint as it is written. External models have every position embedding, so
    zeros are added for those that ours lacks; the outputs are the same.
    """
    config = dataclasses.replace(checkpoint.config, position_embedding="space_time")
    names = format.parameter_names(config)
    adapted = adapt(checkpoint, config)
    checkpoint.params.clear()
    arrays = {}
    for path, name in _progress(names.items()):
        value = format.from_jax(path, adapted.params.pop(path).load(), config)
        arrays[name] = np.ascontiguousarray(value, jnp.dtype(dtype))
    if config.position_resize != "nearest":
        logging.warning(
            "%s cannot say position_resize=%s: clips of other sizes get nearest neighbours there",
            format.name, config.position_resize,
        )  # fmt: skip
    return arrays, adapted


def _progress(items: Collection[T]) -> Iterable[T]:
    return tqdm(items, desc="converting", unit="array")


def _write_json(path: str, name: str, content: dict[str, Any]) -> None:
    with open(os.path.join(path, name), "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2)


def _write_license(path: str, checkpoint: Checkpoint) -> None:
    if not checkpoint.license:
        return
    text = LICENSE_TEXT if checkpoint.license == NON_COMMERCIAL else ""
    with open(os.path.join(path, "LICENSE"), "w", encoding="utf-8") as f:
        f.write(f"{text}License: {checkpoint.license}\n")
        f.write(f"Source of this statement: {checkpoint.license_note or 'not known'}\n")
