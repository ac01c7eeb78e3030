"""Checkpoints out: ours, Hugging Face's directory, the authors' layout."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util
from tqdm import tqdm

from timesformer_jax.checkpoints import store as checkpoints
from timesformer_jax.checkpoints.convert import hf, release
from timesformer_jax.checkpoints.convert.checkpoint import NON_COMMERCIAL, Checkpoint, adapted, read
from timesformer_jax.data.annotations import read_labels
from timesformer_jax.errors import InputError

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
    to: str = "ours",
    resize: str = "bicubic",
    labels: str | Sequence[str] | None = None,
    **overrides: Any,
) -> None:
    """Writes a checkpoint of any format that `from_pretrained` reads in one of three.

    Args:
      src: a file or directory.
      dst: what to write; it must not exist.
      to: "ours", a directory that `from_pretrained`, training and prediction read; "hf", a
        directory that transformers' `TimesformerForVideoClassification.from_pretrained` reads; or
        "release", a torch file (.pyth) in the authors' layout.
      resize: how embeddings are resized, as in `from_pretrained`.
      labels: class names in the order of the logits, or a file of them, one a line; by default
        those that src carries.
      **overrides: fields of `TimeSformerConfig`, as in `from_pretrained`.

    Raises:
      InputError: if src cannot be read, dst exists, or the format cannot hold the model.
    """
    dst = os.path.abspath(dst)
    if to not in _WRITERS:
        raise InputError(f"to must be one of {', '.join(_WRITERS)}, not {to!r}")
    if os.path.exists(dst):
        raise InputError(f"{dst} exists; remove it or choose another destination")
    checkpoint = _labelled(read(src, resize, **overrides), labels)
    with _whole_or_not_at_all(dst) as partial:
        _WRITERS[to](partial, checkpoint)
    logging.info("%s: %s written to %s", src, checkpoint.config.attention, dst)
    if checkpoint.license == NON_COMMERCIAL:
        logging.warning(
            "%s: weights in this layout are the authors', or derive from them, and stay under "
            "their license %s: no commercial use; the output says so",
            src, checkpoint.license,
        )  # fmt: skip


def _labelled(checkpoint: Checkpoint, labels: str | Sequence[str] | None) -> Checkpoint:
    if labels is None:
        return checkpoint
    if isinstance(labels, str):
        labels = read_labels(labels)
    if len(labels) != checkpoint.config.num_classes:
        raise InputError(
            f"{len(labels)} labels for a head of {checkpoint.config.num_classes} classes"
        )
    return dataclasses.replace(checkpoint, labels=tuple(labels))


@contextlib.contextmanager
def _whole_or_not_at_all(dst: str):
    """A path to write to, which takes its name `dst` once all is written."""
    partial = f"{dst}.partial"
    _remove(partial)
    os.makedirs(os.path.dirname(dst), exist_ok=True)
    try:
        yield partial
        os.replace(partial, dst)
    except OSError as e:
        raise InputError(f"cannot write {dst}: {e.strerror or e}") from e
    finally:
        _remove(partial)


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def _write_ours(path: str, checkpoint: Checkpoint) -> None:
    # Taken out one by one: with the last the source is unmapped, before Orbax fills its buffers.
    params = {
        name: jnp.array(checkpoint.params.pop(name).load())
        for name in _progress(list(checkpoint.params))
    }
    metadata = checkpoints.CheckpointMetadata(
        model=checkpoint.config,
        clip=checkpoint.clip,
        labels=checkpoint.labels,
        config=checkpoint.training,
        license=checkpoint.license,
    )
    checkpoints.save_parameters(path, traverse_util.unflatten_dict(params, sep="/"), metadata)
    _write_license(path, checkpoint)


def _write_hf(path: str, checkpoint: Checkpoint) -> None:
    from safetensors.numpy import save_file

    arrays, checkpoint = _foreign(checkpoint, hf)
    os.makedirs(path)
    # "format" is what transformers asks for; an empty license says that none is known.
    metadata = {"format": "pt", "license": checkpoint.license}
    save_file(arrays, os.path.join(path, "model.safetensors"), metadata=metadata)
    _write_json(path, "config.json", hf.config_json(checkpoint.config, checkpoint.labels))
    _write_json(path, "preprocessor_config.json", hf.preprocessor_json(checkpoint.clip))
    _write_license(path, checkpoint)


def _write_release(path: str, checkpoint: Checkpoint) -> None:
    import torch

    arrays, checkpoint = _foreign(checkpoint, release)
    content = {
        "epoch": 0,
        "model_state": {
            # torch warns of arrays that cannot be written to; those few are copied.
            f"model.{name}": torch.from_numpy(np.require(value, requirements=["W"]))
            for name, value in arrays.items()
        },
        "optimizer_state": {},
        "cfg": release.cfg_text(checkpoint.config),
        "num_heads": checkpoint.config.num_heads,  # which the arrays do not tell
        "license": checkpoint.license,
    }
    torch.save(content, path)


_WRITERS = {"ours": _write_ours, "hf": _write_hf, "release": _write_release}


def _foreign(checkpoint: Checkpoint, form: ModuleType) -> tuple[dict[str, np.ndarray], Checkpoint]:
    """The arrays under a format's names, in its layout; takes them out of the checkpoint."""
    # Foreign models have every embedding; one of zeros is as good as none.
    config = dataclasses.replace(checkpoint.config, position_embedding="space_time")
    names = form.names(config)
    full = adapted(checkpoint, config)
    checkpoint.params.clear()
    arrays = {}
    for ours, theirs in _progress(names.items()):
        value = form.to_theirs(ours, full.params.pop(ours).load(), config)
        arrays[theirs] = np.ascontiguousarray(value)
    if config.position_resize != "nearest":
        logging.warning(
            "%s cannot say position_resize=%s: clips of other sizes get nearest neighbours there",
            form.NAME, config.position_resize,
        )  # fmt: skip
    return arrays, full


def _progress(items):
    return tqdm(items, desc="converting", unit="array")


def _write_json(path: str, name: str, content: dict[str, Any]) -> None:
    with open(os.path.join(path, name), "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2)


def _write_license(path: str, checkpoint: Checkpoint) -> None:
    if checkpoint.license == NON_COMMERCIAL:
        with open(os.path.join(path, "LICENSE"), "w", encoding="utf-8") as f:
            f.write(LICENSE_TEXT)
