"""Puts a checkpoint with its model card on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

from timesformer_jax.checkpoints.convert import convert
from timesformer_jax.errors import InputError, install

_BRANCH = re.compile(r"[\w][\w-]*([./][\w][\w-]*)*", re.ASCII)


def push(
    checkpoint: str | os.PathLike,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    output: str | None = None,
    **options: Any,
) -> None:
    """Uploads a checkpoint of any format as a Hugging Face directory, and prints its address.

    Args:
      checkpoint: a path or a name, as for `checkpoints.load`.
      repo: "owner/name", or a name of the account's own. It is made if it is not there. Files of
        the same names are replaced; the Hub keeps those that were there in its history.
      private: make a new repository private; one that is there stays as it is.
      revision: a branch to upload to, which is made if it is not there; by default the main one.
      output: write the directory here, and upload nothing.
      **options: those of `convert`: labels, license, results, dtype and others.

    Raises:
      InputError: if the checkpoint cannot be read, or written in the format; there is no token, it
        may not write there, the name or the revision is malformed, or the network fails.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(f"push needs the package huggingface_hub: {install('hub')}") from None
    _check_names(repo, revision)
    if output is not None:
        convert(checkpoint, output, to="hf", name=repo, **options)
        print(f"written to {output}; nothing was uploaded")
        return
    if not huggingface_hub.get_token():
        raise InputError(
            f"cannot write to {repo} without a token of the Hugging Face Hub: hf auth login, or "
            "HF_TOKEN; --output=FOLDER writes the files and uploads nothing"
        )
    api = huggingface_hub.HfApi()
    with _errors(repo):  # before the work
        account = api.whoami()["name"]
    repo = repo if "/" in repo else f"{account}/{repo}"
    with tempfile.TemporaryDirectory(prefix="timesformer_push") as temporary:
        folder = os.path.join(temporary, "checkpoint")
        convert(checkpoint, folder, to="hf", name=repo, **options)
        with _errors(repo):
            address = api.create_repo(repo, private=private or None, exist_ok=True)
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            api.upload_folder(
                folder_path=folder, repo_id=repo, revision=revision,
                commit_message="TimeSformer, with its model card",
            )  # fmt: skip
    print(address if revision is None else f"{address}/tree/{revision}")
    name = repo if revision is None else f"{repo}@{revision}"
    print(f"timesformer predict VIDEO --checkpoint={name}")


def _check_names(repo: str, revision: str | None) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise InputError(
            f"{repo!r} is no name of a repository: give OWNER/NAME, of letters, digits, '-', '_' "
            "and '.', without '--' and '..'"
        ) from None
    if revision is not None and not _BRANCH.fullmatch(revision):
        raise InputError(
            f"{revision!r} is no name of a branch: give letters, digits, '-', '_', '.' and '/'"
        )


@contextlib.contextmanager
def _errors(repo: str) -> Iterator[None]:
    """Turns the errors of the network and of the Hub into one line each."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise InputError(f"cannot write to {repo}: HF_HUB_OFFLINE is set; run without it") from None
    except Exception as e:
        http = next((x for x in (e, e.__cause__) if isinstance(x, errors.HfHubHTTPError)), None)
        if http is None:  # of the network libraries, which differ by version
            reason = (str(e.__cause__ or e).strip().splitlines() or [type(e).__name__])[0]
            raise InputError(
                f"cannot write to {repo}: the Hugging Face Hub cannot be reached ({reason}); run "
                "again with the network, or with --output=FOLDER"
            ) from None
        status = http.response.status_code
        said = (http.server_message or "").strip().splitlines()
        reason = f"{status}, {said[0]}" if said else str(status)
        todo = {
            401: "the token is not valid: hf auth login, or HF_TOKEN",
            403: "the token may not write there: take one with the permission to write, or the "
            "name of another owner",
            404: "the token may not write there, or it is gone",
        }.get(status, "try again later" if status >= 500 or status == 429 else "see the answer")
        raise InputError(
            f"cannot write to {repo}: the Hugging Face Hub answers {reason}; {todo}"
        ) from None
