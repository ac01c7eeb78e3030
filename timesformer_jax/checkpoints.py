"""Checkpoints by Orbax, and what one carries: everything that predicting with it needs.

A checkpoint is a folder `<step>` with four items: `params` (plain nested dicts by layer),
`optimizer`, `progress` (step, seed and the data iterator's state) and `card` (below).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util

from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformerConfig, abstract, parameters
from timesformer_jax.preprocessing import ClipSpec

FOLDER = "checkpoints"  # of a workdir


@dataclasses.dataclass(frozen=True)
class Card:
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
    def from_json(cls, fields: dict[str, Any]) -> Card:
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
    """The checkpoints of one run: saved asynchronously, the last `keep` kept.

    Args:
      directory: where the folders `<step>` are or shall be.
      keep: how many of the newest stay.
      read_only: refuse to write, and raise where there is nothing to read.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 3, *, read_only: bool = False):
        self.directory = os.path.abspath(directory)
        if read_only and not os.path.isdir(self.directory):
            raise InputError(f"{self.directory}: no checkpoint there; give a run's --workdir")
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: dict[str, Any], card: Card) -> None:
        """Starts saving; returns once the arrays are copied off the devices.

        Args:
          step: training steps done.
          state: has `params` and `opt_state`, pytrees of arrays on any mesh.
          progress: JSON values, the data iterator's state among them.
          card: what the checkpoint says of itself.
        """
        with _disk_errors(self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(state.opt_state),
                    progress=ocp.args.JsonSave(progress),
                    card=ocp.args.JsonSave(card.to_json()),
                ),
            )

    def save_model(self, step: int, params: dict, card: Card) -> None:
        """`save` of a model that is not in training: no optimizer, no progress."""
        with _disk_errors(self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params), card=ocp.args.JsonSave(card.to_json())
                ),
            )

    def wait(self) -> None:
        """Returns when what was started is on disk."""
        with _disk_errors(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        with _disk_errors(self.directory):
            self._manager.close()

    def card(self, step: int) -> Card:
        items = self._manager.restore(step, args=ocp.args.Composite(card=ocp.args.JsonRestore()))
        return Card.from_json(items["card"])

    def restore(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        """The state and progress saved at `step`.

        Args:
          step: one that was saved.
          state: has `params` and `opt_state` of `jax.ShapeDtypeStruct`, whose shardings say where
            the arrays go: any mesh, whichever they were saved from.

        Raises:
          InputError: if the checkpoint cannot be read.
        """
        try:
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(state.params),
                    optimizer=ocp.args.StandardRestore(state.opt_state),
                    progress=ocp.args.JsonRestore(),
                ),
            )
        except (OSError, ValueError, KeyError) as e:
            raise InputError(_damaged(self.directory, step, e)) from e
        restored = state._replace(params=items["params"], opt_state=items["optimizer"])
        return restored, items["progress"]

    def restore_parameters(self, step: int, model: TimeSformerConfig) -> dict:
        """The parameters saved at `step`, on this process's first device."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
            parameters(abstract(model)),
        )
        try:
            items = self._manager.restore(
                step, args=ocp.args.Composite(params=ocp.args.StandardRestore(target))
            )
        except (OSError, ValueError, KeyError) as e:
            raise InputError(_damaged(self.directory, step, e)) from e
        return items["params"]


def load_card(path: str | os.PathLike) -> Card:
    """The card of the newest checkpoint under `path`: a workdir, its checkpoints, or one step."""
    checkpoints, step = _find(path)
    with contextlib.closing(checkpoints):
        return checkpoints.card(step)


def load_parameters(path: str | os.PathLike) -> tuple[TimeSformerConfig, dict]:
    """The model config and parameters of the newest checkpoint under `path`."""
    checkpoints, step = _find(path)
    with contextlib.closing(checkpoints):
        model = checkpoints.card(step).model
        logging.info("parameters of step %d of %s", step, checkpoints.directory)
        return model, checkpoints.restore_parameters(step, model)


def save_parameters(path: str | os.PathLike, params: dict, card: Card) -> None:
    """Writes a checkpoint without training state, step 0, which the loaders above read.

    Args:
      path: its folder, which gets `0/params` and `0/card`.
      params: plain nested dicts of arrays by layer.
      card: what the checkpoint says of itself.
    """
    with contextlib.closing(Checkpoints(path)) as checkpoints:
        checkpoints.save_model(0, params, card)
        checkpoints.wait()


def _find(path: str | os.PathLike) -> tuple[Checkpoints, int]:
    path = os.path.abspath(path)
    if os.path.isdir(os.path.join(path, FOLDER)):
        path = os.path.join(path, FOLDER)
    step = None
    if os.path.isdir(os.path.join(path, "card")):
        path, step = os.path.dirname(path), int(os.path.basename(path))
    checkpoints = Checkpoints(path, read_only=True)
    step = checkpoints.latest_step() if step is None else step
    if step is None:
        raise InputError(f"{path}: no finished checkpoint there; give the --workdir of a run")
    return checkpoints, step


def _damaged(directory: str, step: int, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{directory}/{step} cannot be restored ({reason}); remove that folder to go on from the "
        "checkpoint before it"
    )


@contextlib.contextmanager
def _disk_errors(directory: str):
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
