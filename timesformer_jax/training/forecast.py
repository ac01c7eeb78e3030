"""What a run says before and after its first steps: what it does, and how long it takes."""

from __future__ import annotations

import jax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input.pipeline import eval_in_flight, train_in_flight
from timesformer_jax.data.records.split import Split
from timesformer_jax.distributed.hardware import GIB, measured_host_rate
from timesformer_jax.distributed.mesh import batch_rows
from timesformer_jax.host_memory import physical_memory
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.costs import flops, parameter_count

# A run on a CPU that takes longer is asked whether it is meant.
LONG_SECONDS = 1800
# A run with fewer FLOPs ends before anybody would read an estimate.
SMALL_FLOPS = 1e13


def announce(
    config: ConfigDict,
    model: TimeSformerConfig,
    train: Split,
    evaluation: Split,
    mesh: Mesh,
    steps: range,
) -> None:
    """Logs what the run is about to do, and on a CPU how long that takes at best.

    Args:
      config: of the run.
      model: what is trained.
      train, evaluation: the data.
      mesh: the devices.
      steps: the steps that are left.
    """
    if jax.process_index() > 0:
        return
    device, clip = mesh.devices.flat[0], config.clip
    logging.info(
        "%s: %.1fM parameters, %s attention, clips of %d x %d, on %d x %s",
        config.name, parameter_count(model) / 1e6, model.attention, clip.frames, clip.crop,
        mesh.devices.size, device.device_kind,
    )  # fmt: skip
    logging.info(
        "%d clips of %d classes, %d for evaluation: %d epochs, %d steps of %d clips%s",
        len(train), len(train.label_names), len(evaluation), config.epochs, steps.stop,
        config.batch_size, f", {len(steps)} left" if steps.start else "",
    )  # fmt: skip
    _tell_input(config, train, evaluation, mesh)
    if device.platform != "cpu":
        return
    each = flops(model, clip.frames, clip.crop, clip.crop, trained=config.optimizer.trainable)
    step_flops = each * config.batch_size
    if step_flops * len(steps) < SMALL_FLOPS:
        return
    seconds = step_flops / measured_host_rate(model.dtype)
    expected = (
        f"at best {seconds:.2g} s a step on this CPU, {duration(seconds * len(steps))} in all"
    )
    if seconds * len(steps) < LONG_SECONDS:
        logging.info("%s", expected)
    elif config.pretrained:
        logging.warning(
            "%s: a GPU is meant for this; --config.optimizer.trainable=head trains the "
            "classifier alone", expected,
        )  # fmt: skip
    else:
        logging.warning(
            "%s, from random parameters: --config=from_scratch_small trains a small model in "
            "minutes", expected,
        )  # fmt: skip


def _tell_input(config: ConfigDict, train: Split, evaluation: Split, mesh: Mesh) -> None:
    """Logs how much memory the input pipeline of a process takes, a warning if there is less."""
    clip = ClipSpec(**config.clip)
    sizes = config.batch_size, config.eval.batch_size
    rows, eval_rows = (len(batch_rows(mesh, size)) for size in sizes)
    training = train_in_flight(train, clip, rows, tuple(config.data.short_side_range))
    final = eval_in_flight(evaluation, clip, eval_rows, config.eval.views, config.eval.crops)
    said = f"input pipeline: {training}, and {final.bytes / GIB:.2g} GiB more in evaluation"
    # The batches of training wait while the model is evaluated.
    if 0 < (there := physical_memory()) < training.bytes + final.bytes:
        logging.warning(
            "%s; this machine has %.2g GiB: lower --config.batch_size or --config.eval.batch_size",
            said, there / GIB,
        )  # fmt: skip
    else:
        logging.info("%s", said)


def tell_time_left(seconds: float, steps_left: int) -> None:
    """Logs the measured time of a step and the remaining time of the run."""
    if jax.process_index() == 0:
        logging.info(
            "%.3g s a step, measured: %s left, evaluations not counted",
            seconds, duration(seconds * steps_left),
        )  # fmt: skip


def duration(seconds: float) -> str:
    """A duration in its two largest units: "3 h 20 min"."""
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours / 24:.0f} days"
