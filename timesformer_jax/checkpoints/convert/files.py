"""Reads files of named arrays: torch, safetensors and npz, one file or a Hugging Face directory.

The kind is told from a file's first bytes, not from its name. Arrays stay on disk until asked for,
so that a conversion holds few of them at a time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from timesformer_jax.errors import InputError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a directory; with .index.json if sharded
_CONTAINERS = ("model_state", "state_dict", "model")
_PREFIXES = ("module.", "model.")


class Stored(NamedTuple):
    """An array that is read when it is asked for."""

    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]


class File(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      state: the arrays by their names, without wrappers and prefixes.
      about: what stands beside them: "config" and "preprocessor" of a directory, "cfg", "license"
        and "num_heads" of a torch file; "video" is True in the wrapping of the authors' release.
    """

    state: dict[str, Stored]
    about: dict[str, Any]


def read(path: str) -> File:
    """The arrays of a file or directory.

    Raises:
      InputError: if it is missing, damaged, or holds anything but tensors.
    """
    if os.path.isdir(path):
        return _read_directory(path)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such checkpoint")
    readers = {"safetensors": _read_safetensors, "npz": _read_npz, "torch": _read_torch}
    with _damage(path):
        state, about = readers[_kind(path)](path)
    if not state:
        raise InputError(f"{path}: not a checkpoint: it holds no arrays")
    return File(state, about)


def is_weights_directory(path: str) -> bool:
    """Whether `path` is a directory as Hugging Face libraries write it."""
    names = [name + end for name in WEIGHTS for end in ("", ".index.json")]
    return any(os.path.isfile(os.path.join(path, name)) for name in [*names, "config.json"])


def _kind(path: str) -> str:
    with open(path, "rb") as f:
        head = f.read(128)
    if head[:2] == b"PK":
        first_entry = head[30 : 30 + int.from_bytes(head[26:28], "little")]
        return "npz" if first_entry.endswith(b".npy") else "torch"
    return "safetensors" if head[8:9] == b"{" else "torch"


@contextlib.contextmanager
def _damage(path: str) -> Iterator[None]:
    """Turns what the libraries raise on a damaged file into one line."""
    try:
        yield
    except ImportError as e:
        raise InputError(f"{path} needs {e.name} to be read: pip install {e.name}") from None
    except pickle.UnpicklingError as e:
        raise InputError(
            f"{path}: holds more than tensors ({_reason(e)}) and is not loaded, as that could run "
            "any code; save it again as torch.save(model.state_dict(), path)"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, zipfile.BadZipFile) as e:
        raise InputError(
            f"{path}: damaged, or no checkpoint: {_reason(e)}; fetch or save it again"
        ) from None


def _reason(error: Exception) -> str:
    text = str(error)
    if "WeightsUnpickler error:" in text:
        # torch explains at length how to load it all the same; the cause is in the midst of it.
        text = text.partition("WeightsUnpickler error:")[2].strip() or "a pickle of other software"
    lines = text.strip().splitlines()
    return lines[0].split(". ")[0] if lines else type(error).__name__


def _read_torch(path: str) -> tuple[dict[str, Stored], dict[str, Any]]:
    import torch

    # Mapped, not read, where the file's format allows; files of torch before 1.6 do not.
    mapped = zipfile.is_zipfile(path)
    with warnings.catch_warnings():
        # Said of pickles that torch did not write; what they hold shows right after.
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict of tensors")
    state, about = content, {}
    container = next((key for key in _CONTAINERS if isinstance(content.get(key), dict)), None)
    if container:
        state = content[container]
        about = {k: content[k] for k in ("cfg", "license", "num_heads") if k in content}
        about["video"] = container == "model_state" and all(k.startswith("model.") for k in state)
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name!r} is a {type(value).__name__}, not a tensor")

    def load(tensor):
        return tensor.detach().float().numpy()

    stored = {k: Stored(tuple(v.shape), functools.partial(load, v)) for k, v in state.items()}
    return _without_prefixes(stored), about


def _without_prefixes(state: dict[str, Stored]) -> dict[str, Stored]:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name[len(prefix) :]: value for name, value in state.items()}
    return state


def _read_safetensors(path: str) -> tuple[dict[str, Stored], dict[str, Any]]:
    import safetensors

    def load(name):
        with _damage(path), safetensors.safe_open(path, "np") as f:
            return f.get_tensor(name).astype(np.float32, copy=False)

    try:
        with safetensors.safe_open(path, "np") as f:
            state = {
                name: Stored(tuple(f.get_slice(name).get_shape()), functools.partial(load, name))
                for name in f.keys()  # noqa: SIM118 (no mapping)
            }
            about = {k: v for k, v in (f.metadata() or {}).items() if k == "license"}
    except safetensors.SafetensorError as e:
        raise ValueError(str(e)) from None
    return _without_prefixes(state), about


def _read_npz(path: str) -> tuple[dict[str, Stored], dict[str, Any]]:
    # Read at once: an npz has no shapes outside its arrays, and they may be compressed.
    # Opened here: where it is damaged, np.load leaves what it opened open.
    with open(path, "rb") as f, np.load(f) as content:
        arrays = {name: np.asarray(content[name]) for name in content.files}

    def load(array):
        return array.astype(np.float32, copy=False)

    return {k: Stored(v.shape, functools.partial(load, v)) for k, v in arrays.items()}, {}


def _read_directory(path: str) -> File:
    about = {}
    for key, name in {"config": "config.json", "preprocessor": "preprocessor_config.json"}.items():
        if os.path.isfile(os.path.join(path, name)):
            about[key] = _read_json(os.path.join(path, name))
    for name in WEIGHTS:
        whole, index = os.path.join(path, name), os.path.join(path, f"{name}.index.json")
        if os.path.isfile(whole):
            file = read(whole)
            return File(file.state, file.about | about)
        if os.path.isfile(index):
            return _read_shards(path, index, about)
    raise InputError(
        f"{path}: has a config.json and no weights; one of {', '.join(WEIGHTS)} (or its "
        ".index.json and shards) must lie beside it"
    )


def _read_shards(path: str, index: str, about: dict[str, Any]) -> File:
    shard_of = _read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise InputError(f"{index}: damaged: it has no weight_map")
    state: dict[str, Stored] = {}
    for shard in sorted(set(shard_of.values())):
        file = os.path.join(path, os.path.basename(shard))
        if not os.path.isfile(file):
            raise InputError(f"{file}: missing, though {os.path.basename(index)} lists it")
        found = read(file)
        state |= found.state
        about = found.about | about
    for name, shard in shard_of.items():
        if name not in state:
            raise InputError(f"{path}: {name} is not in {shard}, though the index says so")
    return File(state, about)


def _read_json(path: str) -> dict[str, Any]:
    with _damage(path), open(path, encoding="utf-8") as f:
        content = json.load(f)
    if not isinstance(content, dict):
        raise InputError(f"{path}: damaged: it holds no JSON object")
    return content
