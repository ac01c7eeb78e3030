"""Checkpoints by Orbax, and what one carries: everything that predicting with it needs.

A checkpoint is a folder `<step>` with these items: `params` (plain nested dicts by layer), `ema`
where training keeps a moving average of them, `optimizer`, `progress` (the data iterator's state),
`metadata` (below) and `digest`, sums that tell when what is read is not what was saved: Orbax does not
notice a changed byte in an array. Beside the steps lies `validation.json`, what was found of each
that was evaluated: it tells the best.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
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
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformerConfig, abstract, parameters

FOLDER = "checkpoints"  # of a workdir
BEST = "best"  # in place of a step: the one of the highest validation top-1
VALIDATION = "validation.json"
DAMAGED = ".damaged"  # is put after the step of one that could not be read

# Items that hold arrays, and the fields of a state that they are; a field that is None has none.
_ARRAYS = {"params": "params", "optimizer": "opt_state", "ema": "ema"}

# How the reads end that Orbax has under way when one fails; the one is enough to tell.
_AFTERWARDS = ("Event loop is closed", "Encountered error while reading array index")

T = TypeVar("T")


class DamagedCheckpoint(InputError):
    """A checkpoint that cannot be read, for all that is known through no fault of who asks."""


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint says of itself.

    Attributes:
      model: shape and scheme of the model.
      clip: frames, size, sampling, normalisation and channel order that it was trained on.
      labels: class names, in the order of the logits.
      config: the whole training config, as nested dicts; empty for weights trained elsewhere.
      license: of the weights, "" where none is known; it stays with what is trained from them.
    """

    model: TimeSformerConfig
    clip: ClipSpec
    labels: tuple[str, ...]
    config: dict[str, Any]
    license: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"labels": list(self.labels)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> CheckpointMetadata:
        return cls(
            model=TimeSformerConfig(**fields["model"]),
            clip=ClipSpec(**fields["clip"]),
            labels=tuple(fields["labels"]),
            config=fields["config"],
            license=fields["license"],
        )


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts as one, its keys "optimizer.name"; the names that --config.* flags have."""
    return traverse_util.flatten_dict(config, sep=".")


class Checkpoints:
    """The checkpoints of one run: saved asynchronously, the newest and the best kept.

    Args:
      directory: where the folders `<step>` are or shall be, on a disk or gs://.
      keep: how many of the newest stay.
      keep_best: how many of the highest validation top-1 stay, besides.
      read_only: refuse to write, and raise where there is nothing to read.

    Attributes:
      validation: {step: {"top1": ..., "top5": ...}}, fractions, of what was evaluated.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int = 3,
        keep_best: int = 0,
        *,
        read_only: bool = False,
    ):
        self.directory = storage.absolute(directory)
        _check_storage(self.directory)
        if read_only and not self.directory.is_dir():
            raise InputError(f"{self.directory}: no checkpoint there; give a run's --workdir")
        self.validation = _read_validation(self.directory / VALIDATION)
        policies = ocp.checkpoint_managers.preservation_policy
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(None if read_only else keep), _Best(keep_best, self._best)]
                ),
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                save_interval_steps=0 if read_only else 1,
            ),
        )

    def steps(self) -> list[int]:
        """Those that were saved, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Of the steps that are there, that of the highest validation top-1; the later of equals.

        None if none was evaluated.
        """
        return next(iter(self._best(self.steps())), None)

    def _best(self, steps: Sequence[int]) -> list[int]:
        """The evaluated ones of `steps`, best first."""
        evaluated = [step for step in steps if step in self.validation]
        return sorted(evaluated, key=lambda s: (self.validation[s]["top1"], s), reverse=True)

    def record_validation(self, step: int, top1: float, top5: float) -> None:
        """Notes how good the model of a step is; every host calls it, with the same numbers."""
        self.validation[step] = {"top1": top1, "top5": top5}
        if jax.process_index() == 0:
            with _disk_errors(self.directory):
                content = json.dumps(self.validation, indent=2) + "\n"
                storage.write_atomically(self.directory / VALIDATION, content.encode())

    def save(
        self, step: int, state: Any, progress: dict[str, Any], metadata: CheckpointMetadata
    ) -> None:
        """Starts saving; returns once the arrays are copied off the devices.

        Args:
          step: training steps done.
          state: has `params`, `opt_state` and, or None, `ema`, pytrees of arrays on any mesh.
          progress: JSON values, the data iterator's state among them.
          metadata: what the checkpoint says of itself.
        """
        self._save(
            step,
            _arrays(state),
            {"progress": progress, "metadata": metadata.to_json()},
        )

    def save_model(self, step: int, params: dict, metadata: CheckpointMetadata) -> None:
        """`save` of a model that is not in training: no optimizer, no progress."""
        self._save(step, {"params": params}, {"metadata": metadata.to_json()})

    def _save(self, step: int, arrays: dict[str, Any], values: dict[str, Any]) -> None:
        digest = {name: _digest(tree) for name, tree in arrays.items()}
        digest |= {name: _crc(value) for name, value in values.items()}
        values = values | {"digest": digest}
        with _disk_errors(self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(tree) for name, tree in arrays.items()},
                    **{name: ocp.args.JsonSave(value) for name, value in values.items()},
                ),
            )

    def wait(self) -> None:
        """Returns when what was started is on disk."""
        with _disk_errors(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        with _disk_errors(self.directory):
            self._manager.close()

    def newest(self, read: Callable[[int], T]) -> tuple[int, T] | None:
        """The newest step that `read` can read, and what it gives; None if none was ever saved.

        Says, in a line each, which newer ones it could not read.

        Raises:
          InputError: if there are checkpoints and none can be read.
        """
        damages = []
        for step in reversed(self.steps()):
            try:
                found = read(step)
            except DamagedCheckpoint as e:
                damages.append(str(e))
                continue
            for damage in damages:
                logging.warning("%s: step %d before it is taken", damage, step)
            return step, found
        if damages:
            raise InputError(
                f"no checkpoint can be read: {'; '.join(damages)}; nothing was changed: bring one "
                "back, or begin in another --workdir"
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Renames the steps after one, so that they can be saved anew; every host calls it."""
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
        """What the checkpoint of `step` says of itself.

        Raises:
          DamagedCheckpoint: if it cannot be read.
        """
        with self._reading(step):
            return CheckpointMetadata.from_json(self._restore(step, {}, ["metadata"])["metadata"])

    def restore(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        """The state and progress saved at `step`.

        Args:
          step: one that was saved.
          state: as saved, but of `jax.ShapeDtypeStruct`, whose shardings say where the arrays go:
            any mesh, whichever they were saved from.

        Raises:
          DamagedCheckpoint: if it cannot be read.
        """
        arrays = _arrays(state)
        with self._reading(step):
            items = self._restore(step, arrays, ["progress"])
        return state._replace(**{_ARRAYS[name]: items[name] for name in arrays}), items["progress"]

    def restore_parameters(self, step: int, model: TimeSformerConfig, place: Sharding) -> dict:
        """The parameters to predict with at `step`, each put where `place` says.

        They are the moving average where one was kept.

        Raises:
          DamagedCheckpoint: if they cannot be read.
        """
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            parameters(abstract(model)),
        )
        with self._reading(step):
            name = "ema" if "ema" in self._restore(step, {}, [])["digest"] else "params"
            return self._restore(step, {name: target}, [])[name]

    def _restore(self, step: int, arrays: dict[str, Any], values: list[str]) -> ocp.args.Composite:
        """Items by name: trees of arrays like those given, and JSON values."""
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardRestore(tree) for name, tree in arrays.items()},
                **{name: ocp.args.JsonRestore() for name in [*values, "digest"]},
            ),
        )
        found = {name: _digest(items[name]) for name in arrays}
        found |= {name: _crc(items[name]) for name in values}
        for name, digest in found.items():
            if digest != items["digest"][name]:
                raise ValueError(f"{name} is not what was saved")
        return items

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns whatever a damaged file leads to into one line."""
        before = sys.unraisablehook

        def hook(unraisable) -> None:
            # Of an array that cannot be read, Orbax leaves those beside it to end so, each.
            if not str(unraisable.exc_value).startswith(_AFTERWARDS):
                before(unraisable)

        sys.unraisablehook = hook
        try:
            yield
        except Exception as e:  # Orbax raises Exception itself
            lines = str(e).strip().splitlines() or [type(e).__name__]
            raise DamagedCheckpoint(
                f"{self.directory / str(step)} cannot be restored ({lines[0]})"
            ) from e
        sys.unraisablehook = before  # otherwise they are still to come


@dataclasses.dataclass
class _Best(ocp.checkpoint_managers.preservation_policy.PreservationPolicy):
    """Keeps the best `count` checkpoints; `ranked` puts steps in order, best first.

    Orbax's own BestN knows only what is known when a checkpoint is saved. Here it is evaluated
    once it is saved, so that an evaluation that is cut off loses no training.
    """

    count: int
    ranked: Callable[[Sequence[int]], list[int]]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        kept = self.ranked([checkpoint.step for checkpoint in checkpoints])[: self.count]
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _arrays(state: Any) -> dict[str, Any]:
    items = {name: getattr(state, field) for name, field in _ARRAYS.items()}
    return {name: tree for name, tree in items.items() if tree is not None}


def _digest(tree: Any) -> dict[str, int]:
    """The sum of every array's bits by its path: the same on any mesh, another if a bit changes."""
    flat_tree, _ = jax.tree_util.tree_flatten_with_path(_sums(tree))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(value)
        for path, value in flat_tree
    }


def _crc(value: Any) -> int:
    """Of a JSON value; tuples are as lists."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


@jax.jit
def _sums(tree: Any) -> Any:
    def total(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        return bits.sum(dtype=jnp.uint32)

    return jax.tree.map(total, tree)


def _check_storage(directory: epath.Path) -> None:
    if storage.is_remote(directory):
        try:
            import google.cloud.storage  # noqa: F401 (Orbax's, which it imports late)
        except ImportError:
            raise InputError(
                f"checkpoints on {directory} need the package google-cloud-storage: "
                "pip install '.[gcs]' in the project's folder"
            ) from None


def _read_validation(path: epath.Path) -> dict[int, dict[str, float]]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text()).items()
        return {int(step): {k: float(v[k]) for k in ("top1", "top5")} for step, v in found}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(
            f"{path} is damaged; remove it: training goes on without it, and forgets which "
            "checkpoint was the best"
        ) from e


def is_ours(path: str | os.PathLike) -> bool:
    """Whether `load_parameters` is the one to ask for `path`: a directory, or the best of one."""
    path = storage.absolute(path)
    return path.is_dir() or (path.name == BEST and path.parent.is_dir())


def load_parameters(
    path: str | os.PathLike, place: Sharding | None = None
) -> tuple[CheckpointMetadata, dict]:
    """The metadata and parameters of a checkpoint.

    Args:
      path: a workdir or its checkpoints folder, for the newest that can be read; either with
        `/best` for the one of the highest validation top-1; or the folder of one step.
      place: of every parameter; by default this process's first device.

    Returns:
      The metadata, and nested dicts of arrays.

    Raises:
      InputError: if there is none, or it cannot be read.
    """
    place = place or SingleDeviceSharding(jax.local_devices()[0])

    def read(step: int) -> tuple[CheckpointMetadata, dict]:
        metadata = checkpoints.metadata(step)
        return metadata, checkpoints.restore_parameters(step, metadata.model, place)

    checkpoints, step = _find(path)
    with contextlib.closing(checkpoints):
        step, found = (step, read(step)) if step is not None else checkpoints.newest(read)
        logging.info("parameters of step %d of %s", step, checkpoints.directory)
        return found


def save_parameters(path: str | os.PathLike, params: dict, metadata: CheckpointMetadata) -> None:
    """Writes a checkpoint without training state, step 0, which the loaders above read.

    Args:
      path: its folder, which gets `0/params` and `0/metadata`.
      params: plain nested dicts of arrays by layer.
      metadata: what the checkpoint says of itself.
    """
    with contextlib.closing(Checkpoints(path)) as checkpoints:
        checkpoints.save_model(0, params, metadata)
        checkpoints.wait()


def _find(path: str | os.PathLike) -> tuple[Checkpoints, int | None]:
    """The checkpoints that `path` is of, and the step if it names one or the best."""
    path = storage.absolute(path)
    best = path.name == BEST and not path.is_dir()
    path = path.parent if best else path
    path = path / FOLDER if (path / FOLDER).is_dir() else path
    if (path / "metadata").is_dir():
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


@contextlib.contextmanager
def _disk_errors(directory: epath.Path) -> Iterator[None]:
    """Says in one line what failed when a checkpoint could not be written."""
    try:
        yield
    except (OSError, ValueError) as e:
        # TensorStore reports a full disk as ValueError("RESOURCE_EXHAUSTED: ...").
        reason = str(e).strip().splitlines()[0]
        raise InputError(
            f"cannot write a checkpoint to {directory} ({reason}); free space and run again: "
            "earlier checkpoints are kept"
        ) from e
