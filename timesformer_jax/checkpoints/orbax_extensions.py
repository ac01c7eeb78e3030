"""What our checkpoints need from Orbax beyond its defaults."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from logging import LogRecord

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from timesformer_jax import storage
from timesformer_jax.errors import InputError, install


class _ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Waits for every read before it raises the error of one.

    Orbax reads arrays concurrently, raises the first error and closes the event loop. Reads that
    are still running at that time end in further errors, which nobody can catch: Python prints
    them with their tracebacks.
    """

    async def deserialize(self, infos, args=None):
        before = asyncio.all_tasks()
        try:
            return await super().deserialize(infos, args)
        except BaseException:
            reads = asyncio.all_tasks() - before
            await asyncio.gather(*reads, return_exceptions=True)
            raise


def handler_registry(
    array_items: Iterable[str], json_items: Iterable[str]
) -> ocp.handlers.CheckpointHandlerRegistry:
    """The handlers of a checkpoint's items.

    Args:
      array_items: names of the items that are trees of arrays, for `ocp.args.PyTreeSave` and
        `PyTreeRestore`.
      json_items: names of the items that are JSON values, for `ocp.args.JsonSave` and
        `JsonRestore`.
    """
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name in array_items:
        handler = ocp.handlers.PyTreeCheckpointHandler(
            type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                (jax.Array, _ArrayHandler()), (np.ndarray, ocp.type_handlers.NumpyHandler())
            )
        )
        registry.add(name, ocp.args.PyTreeSave, handler)
        registry.add(name, ocp.args.PyTreeRestore, handler)
    for name in json_items:
        handler = ocp.handlers.JsonCheckpointHandler()
        registry.add(name, ocp.args.JsonSave, handler)
        registry.add(name, ocp.args.JsonRestore, handler)
    return registry


@dataclasses.dataclass
class _KeepBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the best `count` checkpoints; `rank` sorts steps, best first.

    Orbax's BestN needs the accuracy when a checkpoint is saved. Here a checkpoint is evaluated
    after it is saved, so that no training is lost when the evaluation is interrupted.
    """

    count: int
    rank: Callable[[Sequence[int]], list[int]]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        kept = self.rank([checkpoint.step for checkpoint in checkpoints])[: self.count]
        return [checkpoint.step in kept for checkpoint in checkpoints]


def keep_newest_and_best(
    newest: int | None, best: int, rank: Callable[[Sequence[int]], list[int]]
) -> ocp.checkpoint_managers.PreservationPolicy:
    """Keeps the newest checkpoints (None: all) and those that `rank` puts first."""
    latest = ocp.checkpoint_managers.LatestN(newest)
    return ocp.checkpoint_managers.AnyPreservationPolicy([latest, _KeepBest(best, rank)])


@contextlib.contextmanager
def without_remark_on_reading() -> Iterator[None]:
    """Drops the warning of Orbax that a checkpoint is opened for reading, as was asked for."""

    def is_other(record: LogRecord) -> bool:
        return not str(record.msg).startswith("Given directory is read only")

    logger = logging.get_absl_logger()
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def check_remote_storage(directory: epath.Path) -> None:
    """Raises an InputError if a package that Orbax needs for gs:// is missing."""
    if storage.is_remote(directory):
        try:
            import google.cloud.storage  # noqa: F401 (Orbax imports it later)
        except ImportError:
            raise InputError(
                f"checkpoints on {directory} need the package google-cloud-storage: "
                f"{install('gcs')}"
            ) from None
