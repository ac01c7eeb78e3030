"""How fast training goes: what a log line says of it, and a profile of some steps."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from timesformer_jax.distributed.hardware import CHIPS, Chip
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.costs import macs


class Speed:
    """Times steps between logs. The first step of a process, which compiles, is not counted.

    Args:
      model: what is trained.
      batch_size: clips a step, of all devices together.
      mesh: the devices.

    MFU is the share of the peak that the model's own products take: 6 x MACs FLOPs a clip (2 a MAC,
    forward and twice that backward; what `remat` computes again does not count) over the peak of
    all devices for `model.dtype`, dense, as `distributed.hardware` has it. Of a device that is not
    there none is reported.
    """

    def __init__(self, model: TimeSformerConfig, batch_size: int, mesh: Mesh):
        self._batch_size, self._devices = batch_size, mesh.devices.size
        self._flops, self._peak = 6 * macs(model) * batch_size, None
        if chip := chip_of(mesh.devices.flat[0]):
            rate = getattr(chip, model.dtype)
            self._peak = rate * self._devices
            logging.info(
                "MFU counts 6 x MACs FLOPs a clip against %d x %g TFLOP/s (%s, %s, dense)",
                self._devices, rate / 1e12, chip.kind, model.dtype,
            )  # fmt: skip
        self._compiled = False
        self._steps = self._all_steps = 0
        self._seconds = self._all_seconds = self._waited = 0.0
        self._since = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training."""
        self._seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    def stepped(self, metrics: Any) -> None:
        """After a step was started; metrics: its, which the first time are waited for."""
        if self._compiled:
            self._steps += 1
            return
        jax.block_until_ready(metrics)
        self._compiled, self._waited, self._since = True, 0.0, time.perf_counter()

    def scalars(self) -> dict[str, float]:
        """Of the steps since the last call, once they are done; empty if there was none.

        step_seconds, clips_per_second, clips_per_second_per_device, data_wait (the share of the
        time that was waited for data) and, where the peak is known, mfu.
        """
        with self.paused():
            pass
        steps, seconds, waited = self._steps, self._seconds, self._waited
        self._all_steps, self._all_seconds = self._all_steps + steps, self._all_seconds + seconds
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        if not steps:
            return {}
        found = {
            "step_seconds": seconds / steps,
            "clips_per_second": steps * self._batch_size / seconds,
            "clips_per_second_per_device": steps * self._batch_size / seconds / self._devices,
            "data_wait": waited / seconds,
        }
        if self._peak:
            found["mfu"] = steps * self._flops / seconds / self._peak
        return found

    def clips_per_second(self) -> float | None:
        """Over all that `scalars` was asked for; None if this process trained no step but one."""
        return self._all_steps * self._batch_size / self._all_seconds if self._all_steps else None


def chip_of(device: jax.Device) -> Chip | None:
    """The entry of a device in the table of chips."""
    # The kind of a TPU v5e, "TPU v5 lite", holds that of a v5p, "TPU v5".
    fitting = [chip for chip in CHIPS.values() if chip.kind in device.device_kind]
    return max(fitting, key=lambda chip: len(chip.kind), default=None)


class Profile:
    """Writes a trace of some steps, for TensorBoard's or XProf's profile page.

    Args:
      directory: gets the trace.
      start_step: the first step, counted from 1.
      steps: how many; 0 for no trace.
    """

    def __init__(self, directory: str | os.PathLike, start_step: int, steps: int):
        self._directory, self._steps = os.fspath(directory), range(start_step, start_step + steps)
        self._tracing = False

    def before(self, step: int) -> None:
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(self._directory)
            self._tracing = True

    def after(self, step: int, metrics: Any) -> None:
        """metrics: the step's, which are waited for if it is the last one."""
        if self._tracing and step == self._steps[-1]:
            jax.block_until_ready(metrics)
            self.close()
            logging.info("profile of steps %d to %d in %s", self._steps[0], step, self._directory)

    def close(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
