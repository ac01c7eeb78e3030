"""What goes wrong while Orbax reads or writes a checkpoint, as one line that says what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from etils import epath

from timesformer_jax.errors import InputError

_OLD_METADATA = "card"  # the name of the item `metadata` before the first release


class DamagedCheckpoint(InputError):
    """A checkpoint whose files cannot be read, or do not hold what was saved."""


def is_step(folder: epath.Path) -> bool:
    """Whether a folder holds a checkpoint, of this version or of an earlier one."""
    return (folder / "metadata").is_dir() or _is_old(folder)


def _is_old(folder: epath.Path) -> bool:
    return (folder / _OLD_METADATA).is_dir() and not (folder / "metadata").is_dir()


def saved_by_earlier_version(folder: epath.Path) -> InputError:
    """The error of a checkpoint that has the names of an earlier version."""
    return InputError(
        f"{folder} was saved by an earlier version of timesformer_jax, which used other names; "
        f"run `timesformer convert {folder} model.pyth --to=release` with that version and use "
        "model.pyth, or train again in another --workdir"
    )


@contextlib.contextmanager
def read_errors(folder: epath.Path) -> Iterator[None]:
    """Turns any error that a damaged file of a step's folder causes into one line."""
    try:
        yield
    except Exception as e:  # Orbax raises Exception itself
        if _is_old(folder):
            raise saved_by_earlier_version(folder) from None
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise DamagedCheckpoint(f"{folder} cannot be restored ({lines[0]})") from e


@contextlib.contextmanager
def write_errors(directory: epath.Path) -> Iterator[None]:
    """Turns the errors of writing a checkpoint into one line."""
    try:
        yield
    except (OSError, ValueError) as e:
        # TensorStore reports a full disk as ValueError("RESOURCE_EXHAUSTED: ...").
        reason = str(e).strip().splitlines()[0]
        raise InputError(
            f"cannot write a checkpoint to {directory} ({reason}); free space and run again: "
            "earlier checkpoints are kept"
        ) from e
