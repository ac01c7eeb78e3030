"""The JAX ViTs of google-research/vision_transformer by their names in their public bucket."""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from typing import BinaryIO

from etils import epath
from tqdm import tqdm

from timesformer_jax import storage
from timesformer_jax.errors import InputError

NAME = re.compile(r"gs://vit_models/((?:[\w+.=-]+/)*[\w+.=-]+\.npz)")
ADDRESS = "https://storage.googleapis.com/vit_models"
_AUGREG = re.compile(r"(?:R\d*_?\+?)?(?:Ti|S|B|L)_\d+-i(?:1k|21k)-[\w.=-]+?(?:\.npz)?")
_SECONDS = 30  # without a byte


def full_name(source: str) -> str | None:
    """The name in the bucket of `gs://vit_models/...`, or of an augreg model's bare name."""
    if match := NAME.fullmatch(source):
        return None if ".." in source.split("/") else match[1]
    if _AUGREG.fullmatch(source):
        return f"augreg/{source.removesuffix('.npz')}.npz"
    return None


def download(name: str) -> str:
    """The file in the user's cache; downloads it if it is not there.

    Args:
      name: in the bucket. The environment variable TIMESFORMER_VIT_MODELS gives another address of
        the bucket, such as a mirror's.

    Raises:
      InputError: if there is no such file, the network fails, or what came is not whole.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = epath.Path(cache) / "timesformer_jax" / "vit_models" / name
    if path.is_file():
        return os.fspath(path)
    address = os.environ.get("TIMESFORMER_VIT_MODELS", ADDRESS).rstrip("/")
    url = f"{address}/{urllib.parse.quote(name)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(url, timeout=_SECONDS) as response,
            storage.atomic_path(path) as temporary,
            open(temporary, "wb") as file,
        ):
            _copy(response, file, f"gs://vit_models/{name}")
    except urllib.error.HTTPError as e:
        e.close()
        what = "has no such file" if e.code == 404 else f"answers {e.code}"
        raise InputError(
            f"gs://vit_models/{name}: no file or folder here, and {address} {what}"
        ) from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as e:
        reason = getattr(e, "reason", None) or e
        raise InputError(
            f"gs://vit_models/{name}: cannot be downloaded from {address} ({reason}); run again "
            f"with the network, or put the file to {path}"
        ) from None
    return os.fspath(path)


def _copy(response: http.client.HTTPResponse, file: BinaryIO, name: str) -> None:
    """Writes what is downloaded, and checks its length and the sum that the bucket tells."""
    told = response.headers.get("Content-Length") or ""
    length = int(told) if told.isdecimal() else None
    digest = hashlib.md5(usedforsecurity=False)
    size = 0
    with tqdm(desc=name.rpartition("/")[2], total=length, unit="B", unit_scale=True) as progress:
        while piece := response.read(1 << 20):
            file.write(piece)
            digest.update(piece)
            size += len(piece)
            progress.update(len(piece))
    sums = ",".join(response.headers.get_all("x-goog-hash") or [])
    expected = re.search(r"md5=([\w+/=]+)", sums)
    found = base64.b64encode(digest.digest()).decode()
    if (length is not None and size != length) or (expected and expected[1] != found):
        raise InputError(f"{name}: what came is not what was announced; run again to download it")
