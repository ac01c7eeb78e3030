"""Reads files of named arrays: torch, safetensors, npz, or a Hugging Face directory.

The first bytes of a file tell its kind, not its name. Arrays stay on disk until they are needed, so
that a conversion holds few of them in memory at a time.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from timesformer_jax.checkpoints import schema
from timesformer_jax.errors import InputError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a directory; with .index.json if sharded
_CONTAINERS = ("model_state", "state_dict", "model")
_MAX_JSON = 64 << 20
_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# Floating numbers do not become smaller by much; a file that does is made to fill a disk or memory.
_MOST_COMPRESSED = 32
# The Hub's names of licenses are SPDX's in lower case.
_SPDX = {x.lower(): x for x in ("CC-BY-NC-4.0", "CC-BY-4.0", "Apache-2.0", "MIT", "BSD-3-Clause")}
_PREFIXES = ("module.", "model.")


class LazyArray(NamedTuple):
    """An array that `load` reads from disk, as float32."""

    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]


class WeightsFile(NamedTuple):
    """The content of an external checkpoint.

    Attributes:
      arrays: by name, without wrappers and common prefixes.
      metadata: "config" and "preprocessor" (JSON objects) of a directory; "cfg" and "num_heads" of
        a torch file; "license" ("" if whoever wrote the file knew of none), "clip" (ClipSpec) and
        "multilabel" of files that we wrote; "is_release", True if the arrays are wrapped as in the
        authors' release.
    """

    arrays: dict[str, LazyArray]
    metadata: dict[str, Any]


def read_file(path: str) -> WeightsFile:
    """Reads a file or directory.

    Raises:
      InputError: if it is missing, damaged, or holds anything but tensors.
    """
    if os.path.isdir(path):
        return _read_directory(path)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no file; copy it here if it is on remote storage")
    readers = {"safetensors": _read_safetensors, "npz": _read_npz, "torch": _read_torch}
    with _read_errors(path):
        file = readers[_kind(path)](path)
    if not file.arrays:
        raise InputError(f"{path}: not a checkpoint: it holds no arrays")
    return file


def is_weights_directory(path: str) -> bool:
    """Whether `path` is a directory in the layout of Hugging Face libraries."""
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
def _read_errors(path: str) -> Iterator[None]:
    """Turns the errors that libraries raise on a damaged file into one line."""
    try:
        yield
    except ImportError as e:
        raise InputError(f"{path} needs {e.name} to be read: pip install {e.name}") from None
    except pickle.UnpicklingError as e:
        raise InputError(
            f"{path}: holds more than tensors ({_reason(e)}) and is not loaded, as that could run "
            "any code; save it again as torch.save(model.state_dict(), path)"
        ) from None
    except InputError as e:
        text = str(e)
        raise InputError(text if path in text else f"{path}: {text}") from None
    except Exception as e:  # a damaged file makes the libraries raise anything
        raise InputError(
            f"{path}: damaged, or no checkpoint: {_reason(e)}; download or save it again"
        ) from None


def _reason(error: Exception) -> str:
    text = str(error)
    if "WeightsUnpickler error:" in text:
        # torch explains at length how to load the file anyway; the cause follows this text.
        text = text.partition("WeightsUnpickler error:")[2].strip() or "a pickle of other software"
    lines = text.strip().splitlines()
    reason = lines[0].split(". ")[0] if lines else type(error).__name__
    return schema.printable(reason)


def _read_torch(path: str) -> WeightsFile:
    import torch

    with warnings.catch_warnings(), _Sized(open(path, "rb", buffering=0)) as file:
        # torch warns about pickles that it did not write; whether they hold tensors is checked.
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
        if zipfile.is_zipfile(path):
            _check_unpacked_size(path)
            content = torch.load(path, mmap=True, **options)
        else:  # torch before 1.6 wrote files that cannot be memory-mapped
            content = torch.load(file, **options)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict of tensors")
    state_dict, metadata = content, {}
    container = next((key for key in _CONTAINERS if isinstance(content.get(key), dict)), None)
    if container:
        state_dict = content[container]
        metadata = _torch_metadata(content)
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise ValueError(f"a name in it is {schema.shown(name)}, not a text")
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{schema.shown(name)} is a {type(value).__name__}, not a tensor")
        _check_tensor(name, value)
    if container:
        prefixed = all(name.startswith("model.") for name in state_dict)
        metadata["is_release"] = container == "model_state" and prefixed

    def load(tensor):
        return tensor.detach().float().numpy()

    arrays = {
        name: LazyArray(tuple(tensor.shape), functools.partial(load, tensor))
        for name, tensor in state_dict.items()
    }
    return WeightsFile(_without_prefixes(arrays), metadata)


class _Sized(io.BufferedReader):
    """A file whose `read` takes no more memory than the file has bytes, whatever it is asked for.

    A pickle may say that a text of many GiB follows.
    """

    def read(self, size: int | None = -1) -> bytes:
        left = max(os.fstat(self.fileno()).st_size - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


def _torch_metadata(content: dict[Any, Any]) -> dict[str, Any]:
    """What a torch file says beside its tensors; without what is None."""
    checks = {
        "cfg": schema.text, "license": schema.text, "license_note": schema.text,
        "num_heads": schema.whole_number, "labels": schema.label_names,
        "clip": lambda value, _: schema.clip_spec(value), "multilabel": schema.boolean,
    }  # fmt: skip
    return {
        key: check(content[key], key)
        for key, check in checks.items()
        if content.get(key) is not None
    }


def _check_tensor(name: str, tensor: Any) -> None:
    """Raises a ValueError unless a tensor is one of floating numbers that are all in the file."""
    import torch

    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ValueError(f"{schema.shown(name)} is a sparse, quantized or empty kind of tensor")
    if not tensor.is_floating_point() and tensor.numel() > 1:
        raise ValueError(f"{schema.shown(name)} holds {tensor.dtype}, not floating numbers")
    # Strides of 0 make a tensor of any size from one number.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{schema.shown(name)} has shape {tuple(tensor.shape)}, which is more "
                         "numbers than the file holds of it")  # fmt: skip


def _without_prefixes(arrays: dict[str, LazyArray]) -> dict[str, LazyArray]:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in arrays):
            arrays = {name[len(prefix) :]: value for name, value in arrays.items()}
    return arrays


def _read_safetensors(path: str) -> WeightsFile:
    import safetensors

    def load(name):
        with _read_errors(path), safetensors.safe_open(path, "np") as f:
            return f.get_tensor(name).astype(np.float32, copy=False)

    try:
        with safetensors.safe_open(path, "np") as f:
            arrays = {
                name: LazyArray(tuple(f.get_slice(name).get_shape()), functools.partial(load, name))
                for name in f.keys()  # noqa: SIM118 (not a mapping)
            }
            written = f.metadata() or {}
        metadata: dict[str, Any] = {
            k: v for k, v in written.items() if k in ("license", "license_note")
        }
        if "clip" in written:
            metadata["clip"] = schema.clip_spec(json.loads(written["clip"]))
    except safetensors.SafetensorError as e:
        raise ValueError(str(e)) from None
    return WeightsFile(_without_prefixes(arrays), metadata)


def _read_npz(path: str) -> WeightsFile:
    _check_npz(path)
    # Read at once: the arrays may be compressed.
    # Opened here, because np.load does not close a damaged file that it opened.
    with open(path, "rb") as f, np.load(f) as content:
        arrays = {name: np.asarray(content[name]) for name in content.files}
    for name, array in arrays.items():
        if array.dtype.kind != "f" and array.size > 1:
            raise ValueError(f"{schema.shown(name)} holds {array.dtype}, not floating numbers")

    def load(array):
        return array.astype(np.float32, copy=False)

    return WeightsFile(
        {k: LazyArray(v.shape, functools.partial(load, v)) for k, v in arrays.items()}, {}
    )


def _check_npz(path: str) -> None:
    """Raises a ValueError if the arrays of an npz are larger than what the file holds."""
    _check_unpacked_size(path)
    with zipfile.ZipFile(path) as content:
        for entry in content.infolist():
            with content.open(entry) as member:
                version = np.lib.format.read_magic(member)
                if version not in _NPY_HEADERS:
                    raise ValueError(f"it holds arrays of an unknown version, {version}")
                shape, _, dtype = _NPY_HEADERS[version](member)
                if math.prod(shape) * dtype.itemsize > entry.file_size:
                    raise ValueError(
                        f"{schema.shown(entry.filename)} is said to have shape {shape}, which is "
                        "more numbers than the file holds of it"
                    )


def _check_unpacked_size(path: str) -> None:
    """Raises a ValueError if a zip would become far larger than numbers can be compressed."""
    with zipfile.ZipFile(path) as content:
        total = sum(entry.file_size for entry in content.infolist())
    if total > _MOST_COMPRESSED * os.path.getsize(path) + (1 << 20):
        raise ValueError(f"its arrays are said to unpack to {total / 2**30:.1f} GiB")


def _read_directory(path: str) -> WeightsFile:
    metadata: dict[str, Any] = {}
    if license := _readme_license(os.path.join(path, "README.md")):
        metadata["license"] = license
    for key, name in {"config": "config.json", "preprocessor": "preprocessor_config.json"}.items():
        if os.path.isfile(os.path.join(path, name)):
            metadata[key] = _read_json(os.path.join(path, name))
    for name in WEIGHTS:
        whole, index = os.path.join(path, name), os.path.join(path, f"{name}.index.json")
        if os.path.isfile(whole):
            file = read_file(whole)
            return WeightsFile(file.arrays, _merged(metadata, file.metadata))
        if os.path.isfile(index):
            return _read_shards(path, index, metadata)
    raise InputError(
        f"{path}: has a config.json and no weights; one of {', '.join(WEIGHTS)} (or its "
        ".index.json and shards) must lie beside it"
    )


def _read_shards(path: str, index: str, metadata: dict[str, Any]) -> WeightsFile:
    shard_of = _read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise InputError(f"{index}: damaged: it has no weight_map; download or save it again")
    if not all(isinstance(shard, str) and "\0" not in shard for shard in shard_of.values()):
        raise InputError(f"{index}: damaged: its weight_map must map names to files' names")
    arrays: dict[str, LazyArray] = {}
    for shard in sorted(set(shard_of.values())):
        shard_path = os.path.join(path, os.path.basename(shard))
        if not os.path.isfile(shard_path):
            raise InputError(
                f"{shard_path}: missing, though {os.path.basename(index)} lists it; download it"
            )
        file = read_file(shard_path)
        arrays |= file.arrays
        metadata = _merged(metadata, file.metadata)
    for name, shard in shard_of.items():
        if name not in arrays:
            raise InputError(
                f"{path}: {name} is not in {shard}, though the index says so; download both again"
            )
    return WeightsFile(arrays, metadata)


def _merged(beside: dict[str, Any], inside: dict[str, Any]) -> dict[str, Any]:
    """What is beside weights and in them, which comes first unless it is empty."""
    return beside | {key: value for key, value in inside.items() if value or key not in beside}


def _readme_license(path: str) -> str | None:
    """The license in the head of a model card, as repositories of the Hugging Face Hub have it."""
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8", errors="replace") as f:
        head = f.read(1 << 16)
    match = re.match(r"---\s*\n(.*?)\n---", head, re.DOTALL)
    found = match and re.search(r"^license:\s*[\"']?([\w.+-]+)", match[1], re.MULTILINE)
    if not found or found[1].lower() in ("other", "unknown"):
        return None
    return _SPDX.get(found[1].lower(), found[1])


def _read_json(path: str) -> dict[str, Any]:
    with _read_errors(path), open(path, encoding="utf-8") as f:
        text = f.read(_MAX_JSON + 1)
        if len(text) > _MAX_JSON:
            raise ValueError("it is no description, but larger than 64 MiB")
        content = json.loads(text)
    if not isinstance(content, dict):
        raise InputError(f"{path}: damaged: it holds no JSON object; download or save it again")
    return content
