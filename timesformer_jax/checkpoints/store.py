"""Saves and restores checkpoints with Orbax.

A checkpoint is a folder `<step>` with these items: `params` (nested dicts of arrays), `ema` if
training keeps a moving average of them, `optimizer`, `progress` (the state of the data iterator),
`metadata` (see metadata.py) and `checksums` of the other items. `validation.json` beside the
folders holds the accuracy of every checkpoint that was evaluated; it tells which one is best.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding

from timesformer_jax import storage
from timesformer_jax.checkpoints import validation
from timesformer_jax.checkpoints.checksums import array_checksums, check_finite, json_checksum
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.orbax_errors import (
    DamagedCheckpoint,
    is_step,
    read_errors,
    saved_by_earlier_version,
    write_errors,
)
from timesformer_jax.checkpoints.orbax_extensions import (
    check_remote_storage,
    handler_registry,
    keep_newest_and_best,
    without_remark_on_reading,
)
from timesformer_jax.checkpoints.run_files import FOLDER
from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformerConfig, abstract, parameters

BEST = "best"  # given in place of a step: the step with the highest validation top-1
DAMAGED = ".damaged"  # suffix of the folder of a step that could not be read

# Items that hold arrays, and the field of the training state that each comes from. A field that
# is None has no item.
_ARRAY_ITEMS = {"params": "params", "optimizer": "opt_state", "ema": "ema"}
_JSON_ITEMS = ("progress", "metadata", "checksums")

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run: saves asynchronously, keeps the newest and the best.

    Args:
      directory: holds the folders `<step>`, on a disk or gs://.
      keep_newest: number of newest checkpoints to keep.
      keep_best: number of checkpoints with the highest validation top-1 to keep as well.
      read_only: never write, and raise if the directory does not exist.

    Attributes:
      validation: {step: {"top1": ...}} of the evaluated steps, as fractions, with "top5" if there
        are classes enough for it; of multi-label models {step: {"mAP": ...}}.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep_newest: int = 3,
        keep_best: int = 0,
        *,
        read_only: bool = False,
    ):
        self.directory = storage.absolute(directory)
        check_remote_storage(self.directory)
        if read_only and not self.directory.is_dir():
            raise InputError(f"{self.directory}: no checkpoint there; give a run's --workdir")
        self.validation = validation.read(self.directory)
        with without_remark_on_reading():
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=keep_newest_and_best(
                        None if read_only else keep_newest, keep_best, self._rank
                    ),
                    create=not read_only,
                    read_only=read_only,
                    cleanup_tmp_directories=not read_only,
                    save_interval_steps=0 if read_only else 1,
                ),
                handler_registry=handler_registry(_ARRAY_ITEMS, _JSON_ITEMS),
            )

    def steps(self) -> list[int]:
        """The saved steps, in ascending order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The saved step with the highest validation top-1; the later one of equals.

        None if no saved step was evaluated.
        """
        return next(iter(self._rank(self.steps())), None)

    def _rank(self, steps: Sequence[int]) -> list[int]:
        """The steps that were evaluated, best first."""
        evaluated = [step for step in steps if step in self.validation]
        return sorted(
            evaluated, key=lambda s: (validation.score(self.validation[s]), s), reverse=True
        )

    def record_validation(self, step: int, accuracy: dict[str, float]) -> None:
        """Writes the accuracy of a step; every host calls it, with the same numbers."""
        self.validation[step] = accuracy
        if jax.process_index() == 0:
            with write_errors(self.directory):
                validation.write(self.directory, self.validation)

    def save(
        self, step: int, state: Any, progress: dict[str, Any], metadata: CheckpointMetadata
    ) -> None:
        """Starts saving; returns once the arrays are copied off the devices.

        Args:
          step: training steps done.
          state: has the fields `params`, `opt_state` and `ema`: pytrees of arrays on any mesh;
            `ema` may be None.
          progress: a dict of JSON values, with the state of the data iterator.
          metadata: what the checkpoint says about itself.
        """
        values = {"progress": progress, "metadata": metadata.to_json()}
        self._save(step, _array_items(state), values)

    def save_model(self, step: int, params: dict, metadata: CheckpointMetadata) -> None:
        """Saves a model without training state: no optimizer, no progress."""
        self._save(step, {"params": params}, {"metadata": metadata.to_json()})

    def _save(self, step: int, arrays: dict[str, Any], values: dict[str, Any]) -> None:
        checksums: dict[str, Any] = {name: array_checksums(tree) for name, tree in arrays.items()}
        checksums |= {name: json_checksum(value) for name, value in values.items()}
        values = values | {"checksums": checksums}
        with write_errors(self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.PyTreeSave(tree) for name, tree in arrays.items()},
                    **{name: ocp.args.JsonSave(value) for name, value in values.items()},
                ),
            )

    def wait(self) -> None:
        """Waits until every save that was started is on disk."""
        with write_errors(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        with write_errors(self.directory):
            self._manager.close()

    def read_newest(self, read: Callable[[int], T]) -> tuple[int, T] | None:
        """The newest step that `read` can read, and what `read` returned for it.

        Returns None if there are no checkpoints. Logs a line for each newer step that is damaged.

        Raises:
          InputError: if there are checkpoints and all are damaged.
        """
        damages = []
        for step in reversed(self.steps()):
            try:
                found = read(step)
            except DamagedCheckpoint as e:
                damages.append(str(e))
                continue
            for damage in damages:
                logging.warning("%s: the earlier step %d is taken", damage, step)
            return step, found
        if damages:
            raise InputError(
                f"no checkpoint can be read: {'; '.join(damages)}; nothing was changed: restore "
                "one from a backup, or start in another --workdir"
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Renames the folders of later steps to `<step>.damaged`; every host calls it.

        Training can then save these steps again.
        """
        later = [s for s in self.steps() if s > step]
        if not later:
            return
        for s in later if jax.process_index() == 0 else ():
            aside = self.directory / f"{s}{DAMAGED}"
            if aside.exists():
                aside.rmtree()
            (self.directory / str(s)).rename(aside)
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()

    def metadata(self, step: int) -> CheckpointMetadata:
        """What the checkpoint of `step` says about itself.

        Raises:
          DamagedCheckpoint: if it cannot be read.
          InputError: if an earlier version of this package saved it.
        """
        with read_errors(self.directory / str(step)):
            fields = self._restore(step, {}, ["metadata"])["metadata"]
        try:
            return CheckpointMetadata.from_json(fields)
        except (KeyError, TypeError):
            raise saved_by_earlier_version(self.directory / str(step)) from None
        except InputError as e:  # for example of a scheme that is not registered
            raise InputError(f"{self.directory / str(step)}: {e}") from e

    def restore(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        """The state and progress that were saved at `step`.

        Args:
          step: a saved step.
          state: as saved, but of `jax.ShapeDtypeStruct`s. Their shardings say where the arrays go;
            the mesh may differ from the one that they were saved from.

        Raises:
          DamagedCheckpoint: if it cannot be read.
          InputError: if an earlier version of this package saved it.
        """
        arrays = _array_items(state)
        with read_errors(self.directory / str(step)):
            items = self._restore(step, arrays, ["progress"])
        fields = {_ARRAY_ITEMS[name]: items[name] for name in arrays}
        return state._replace(**fields), items["progress"]

    def restore_parameters(self, step: int, model: TimeSformerConfig, sharding: Sharding) -> dict:
        """The parameters of `step` for prediction, float32: their moving average if there is one.

        Args:
          step: a saved step.
          model: the config in the metadata of the step.
          sharding: of every parameter.

        Raises:
          DamagedCheckpoint: if they cannot be read.
          InputError: if an earlier version of this package saved them.
        """
        with read_errors(self.directory / str(step)):
            name = "ema" if "ema" in self._restore(step, {}, [])["checksums"] else "params"
            stored = self._manager.item_metadata(step)[name]
            is_half = {str(x.dtype) for x in jax.tree.leaves(stored)} == {"bfloat16"}
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(
                    x.shape, jnp.bfloat16 if is_half else x.dtype, sharding=sharding
                ),
                parameters(abstract(model)),
            )
            found = self._restore(step, {name: target}, [])[name]
        return jax.tree.map(lambda x: x.astype(jnp.float32), found) if is_half else found

    def _restore(self, step: int, arrays: dict[str, Any], values: list[str]) -> ocp.args.Composite:
        """Restores items and compares their checksums.

        Args:
          arrays: trees of `jax.ShapeDtypeStruct` by the names of their items.
          values: names of JSON items.
        """
        array_args = {
            name: ocp.args.PyTreeRestore(
                tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
            )
            for name, tree in arrays.items()
        }
        json_args = {name: ocp.args.JsonRestore() for name in [*values, "checksums"]}
        args = ocp.args.Composite(**array_args, **json_args)
        items = self._manager.restore(step, args=args)
        found: dict[str, Any] = {name: array_checksums(items[name]) for name in arrays}
        found |= {name: json_checksum(items[name]) for name in values}
        for name, checksum in found.items():
            if checksum != items["checksums"][name]:
                raise ValueError(f"{name} is not what was saved")
        return items


def _array_items(state: Any) -> dict[str, Any]:
    items = {name: getattr(state, field) for name, field in _ARRAY_ITEMS.items()}
    return {name: tree for name, tree in items.items() if tree is not None}


def is_native(path: str | os.PathLike) -> bool:
    """Whether `path` is one that `load_parameters` accepts: a directory, or one with `/best`."""
    path = storage.absolute(path)
    return path.is_dir() or (path.name == BEST and path.parent.is_dir())


def load_parameters(
    path: str | os.PathLike, sharding: Sharding | None = None, *, allow_nonfinite: bool = False
) -> tuple[CheckpointMetadata, dict]:
    """The metadata and parameters of a checkpoint.

    Args:
      path: a workdir or its checkpoints folder, for the newest checkpoint that can be read; either
        with `/best`, for the one with the highest validation top-1; or the folder of one step.
      sharding: of every parameter; by default, the first device of this process.
      allow_nonfinite: load parameters that are infinite or not a number.

    Returns:
      The metadata, and nested dicts of arrays.

    Raises:
      InputError: if there is no checkpoint, or it cannot be read.
    """
    return load_step(path, sharding, allow_nonfinite=allow_nonfinite)[1:]


def load_step(
    path: str | os.PathLike, sharding: Sharding | None = None, *, allow_nonfinite: bool = False
) -> tuple[epath.Path, CheckpointMetadata, dict]:
    """As `load_parameters`; the folder of the step that was read comes first."""
    sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
    checkpoints, step = _open(path)

    def read(step: int) -> tuple[CheckpointMetadata, dict]:
        metadata = checkpoints.metadata(step)
        return metadata, checkpoints.restore_parameters(step, metadata.model, sharding)

    with contextlib.closing(checkpoints):
        newest = checkpoints.read_newest(read) if step is None else (step, read(step))
        assert newest is not None  # `_open` refuses a directory without checkpoints
        step, found = newest
    if not allow_nonfinite:
        for name, value in traverse_util.flatten_dict(found[1], sep="/").items():
            check_finite(str(checkpoints.directory / str(step)), name, value)
    logging.info("parameters of step %d of %s", step, checkpoints.directory)
    return checkpoints.directory / str(step), *found


def save_parameters(path: str | os.PathLike, params: dict, metadata: CheckpointMetadata) -> None:
    """Writes a checkpoint without training state, which `load_parameters` reads.

    Args:
      path: a directory; the checkpoint becomes its step 0.
      params: nested dicts of arrays.
      metadata: what the checkpoint says about itself.
    """
    with contextlib.closing(Checkpoints(path)) as checkpoints:
        checkpoints.save_model(0, params, metadata)
        checkpoints.wait()


def _open(path: str | os.PathLike) -> tuple[Checkpoints, int | None]:
    """The checkpoints at `path`, and the step if `path` names a step or the best one."""
    path = storage.absolute(path)
    best = path.name == BEST and not path.is_dir()
    path = path.parent if best else path
    path = path / FOLDER if (path / FOLDER).is_dir() else path
    if is_step(path) and path.name.isdecimal():
        return Checkpoints(path.parent, read_only=True), int(path.name)
    checkpoints = Checkpoints(path, read_only=True)
    if not checkpoints.steps():
        raise InputError(f"{path}: no finished checkpoint there; give the --workdir of a run")
    if best and checkpoints.best_step() is None:
        raise InputError(
            f"{path}: none of its checkpoints was evaluated in training "
            "(--config.eval.every_epochs); leave out /best for the newest"
        )
    return checkpoints, checkpoints.best_step() if best else None
