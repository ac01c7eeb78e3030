"""Checkpoints by their names on the Hugging Face Hub, through its own library.

Tokens, the cache and being offline are as in huggingface_hub: HF_TOKEN or `hf auth login`, HF_HOME,
HF_HUB_OFFLINE, HF_ENDPOINT.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator

from absl import logging

from timesformer_jax.checkpoints.files import WEIGHTS
from timesformer_jax.errors import InputError, install

_BESIDE = ("config.json", "preprocessor_config.json", "README.md")
_SINGLE = (".safetensors", ".pyth", ".pth", ".pt", ".bin", ".npz")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def download(name: str, revision: str | None) -> str:
    """The folder or file of a repository's weights in the cache; downloads what is not there.

    Args:
      name: "owner/repository".
      revision: a branch, tag or commit; None for the main branch.

    Raises:
      InputError: if there is no such repository or revision, it may not be read, it has no
        weights, the network fails, or what came is not what the Hub says.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"{name}: a name on the Hugging Face Hub needs its package: {install('hub')}"
        ) from None
    with _errors(name, revision):
        wanted = _listing(name, revision)
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=wanted or list(_BESIDE),
            local_files_only=wanted is None,
        )  # fmt: skip
    present = {
        os.path.relpath(os.path.join(parent, file), folder)
        for parent, _, files in os.walk(folder) for file in files
    }  # fmt: skip
    weights = _weights(present)
    if not weights or not present.issuperset(weights):
        raise InputError(
            f"{name}: its weights are not in the cache, and the Hub cannot be asked; run again "
            "with the network (and without HF_HUB_OFFLINE)"
        )
    for file in weights:
        _check_sum(name, os.path.join(folder, file))
    return folder if weights[0].startswith(WEIGHTS) else os.path.join(folder, weights[0])


def _listing(name: str, revision: str | None) -> list[str] | None:
    """The files to download; None if the Hub cannot be reached, but the cache knows the name."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision)
    except HFValidationError:
        raise
    except Exception as e:  # of the network libraries, which differ by version
        if isinstance(e, HfHubHTTPError) and e.response.status_code < 500:
            raise
        with contextlib.suppress(FileNotFoundError):
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(_BESIDE), local_files_only=True
            )
            logging.warning("%s: the Hub cannot be reached: taken from the cache", name)
            return None
        raise
    files = [sibling.rfilename for sibling in info.siblings or ()]
    weights = _weights(files)
    if not weights:
        raise InputError(
            f"{name}: this repository of the Hub has no weights that can be read: "
            f"{', '.join(WEIGHTS)} or one {', '.join(_SINGLE)} file"
        )
    return [*(file for file in files if file in _BESIDE), *weights]


def _weights(files: Iterable[str]) -> list[str]:
    """The files that hold the weights of a repository, without copies in other formats."""
    files = sorted(files)
    for name in WEIGHTS:
        if name in files:
            return [name]
        if f"{name}.index.json" in files:
            stem, end = os.path.splitext(name)
            shards = [f for f in files if re.fullmatch(rf"{stem}-\d+-of-\d+\{end}", f)]
            return [f"{name}.index.json", *shards]
    single = [file for file in files if file.endswith(_SINGLE) and "/" not in file]
    return single if len(single) == 1 else []


def _check_sum(name: str, path: str) -> None:
    """Compares a large file with its SHA-256, by which the cache names it."""
    blob = os.path.realpath(path)
    expected = os.path.basename(blob)
    if not _SHA256.fullmatch(expected):
        return
    with open(blob, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != expected:
        os.remove(path)
        os.remove(blob)
        raise InputError(
            f"{name}: {os.path.basename(path)} is not what the Hub says it is (its SHA-256 is "
            f"{found[:12]}..., not {expected[:12]}...): removed; run again to download it again"
        )


@contextlib.contextmanager
def _errors(name: str, revision: str | None) -> Iterator[None]:
    """Turns the errors of the network and of the Hub into one line each."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{name}"
    try:
        yield
    except InputError:
        raise
    except errors.GatedRepoError:
        raise InputError(
            f"{name} is gated: accept its terms on {page}, and log in (hf auth login, or HF_TOKEN)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{name}: no file or folder here, and no repository of the Hugging Face Hub that may "
            "be read; correct the name, or log in if it is private (hf auth login, or HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{name} has no revision {revision!r}; see {page}") from None
    except errors.HfHubHTTPError as e:
        raise InputError(
            f"{name}: the Hugging Face Hub answers {e.response.status_code}; try again later"
        ) from None
    except errors.HFValidationError:
        raise InputError(f"{name} is no name on the Hugging Face Hub") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        raise InputError(
            f"{name}: no file or folder here, not in the cache of the Hugging Face Hub, and the "
            "Hub cannot be reached; run again with the network (and without HF_HUB_OFFLINE)"
        ) from None
    except Exception as e:  # of the network libraries, which differ by version
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise InputError(
            f"{name}: no file or folder here, and the Hugging Face Hub cannot be reached ({reason})"
        ) from None
