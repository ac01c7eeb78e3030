"""The throughput of training, for the log, and a profiler trace of some steps."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.distributed.hardware import chip_of
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.costs import flops


class Throughput:
    """Times the steps between two reports, without the first step of a process, which compiles.

    Model FLOP utilisation (MFU) is the FLOPs of the model (`costs.flops`) divided by the dense peak
    of all devices for `model.dtype`. It is reported for the devices in `distributed.hardware` only.

    Args:
      model, clip: what is trained, and the clips that it sees.
      trained: which parameters, "all" or "head".
      batch_size: clips a step, of all devices together.
      mesh: the devices.
    """

    def __init__(
        self, model: TimeSformerConfig, clip: ClipSpec, trained: str, batch_size: int, mesh: Mesh
    ):
        self._batch_size, self._devices = batch_size, mesh.devices.size
        each = flops(model, clip.frames, clip.crop, clip.crop, trained=trained)
        self._flops, self._peak = each * batch_size, None
        if chip := chip_of(mesh.devices.flat[0]):
            rate = getattr(chip, model.dtype)
            self._peak = rate * self._devices
            logging.info(
                "MFU counts %.4g GFLOPs a clip against %d x %g TFLOP/s (%s, %s, dense)",
                each / 1e9, self._devices, rate / 1e12, chip.kind, model.dtype,
            )  # fmt: skip
        self._compiled = self._told = False
        self._steps = self._all_steps = 0
        self._seconds = self._all_seconds = self._waited = 0.0
        self._since = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context that waits for data."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context that does not train, such as an evaluation."""
        self._seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    def stepped(self, metrics: Any) -> None:
        """To be called after each step was dispatched. Waits for the metrics of the first step."""
        if self._compiled:
            self._steps += 1
            return
        jax.block_until_ready(metrics)
        self._compiled, self._waited, self._since = True, 0.0, time.perf_counter()

    def scalars(self) -> dict[str, float]:
        """The throughput since the last call; empty if no step was timed. Call it after a wait.

        Returns:
          step_seconds, clips_per_second, clips_per_second_per_device, data_wait (the share of the
          time spent waiting for data) and, where the peak is known, mfu.
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

    def step_seconds(self, metrics: Any, after: int = 3) -> float | None:
        """The seconds of a step, measured, once `after` steps are timed; before and later None.

        Args:
          metrics: of the newest step; it is waited for.
        """
        if self._told or self._all_steps + self._steps < after:
            return None
        self._told = True
        jax.block_until_ready(metrics)
        seconds = self._all_seconds + self._seconds + time.perf_counter() - self._since
        return seconds / (self._all_steps + self._steps)

    def clips_per_second(self) -> float | None:
        """The mean over all steps that `scalars` reported; None if there was none."""
        return self._all_steps * self._batch_size / self._all_seconds if self._all_steps else None


class Profile:
    """Writes a profiler trace of some steps, for TensorBoard or XProf.

    Args:
      directory: where to write the trace.
      start_step: the first traced step, counted from 1.
      steps: the number of traced steps; 0 for no trace.
    """

    def __init__(self, directory: str | os.PathLike, start_step: int, steps: int):
        self._directory, self._steps = os.fspath(directory), range(start_step, start_step + steps)
        self._tracing = False

    def before(self, step: int) -> None:
        if self._steps and step == self._steps[0]:
            options = jax.profiler.ProfileOptions()
            # The tracer of Python calls sets a hook in every thread. One that is just starting or
            # ending has no frame yet, and Python 3.11 ends the process with a segmentation fault.
            options.python_tracer_level = 0
            jax.profiler.start_trace(self._directory, profiler_options=options)
            self._tracing = True

    def after(self, step: int, metrics: Any) -> None:
        """To be called after each step. Waits for the metrics of the last traced step."""
        if self._tracing and step == self._steps[-1]:
            jax.block_until_ready(metrics)
            self.close()
            logging.info("profile of steps %d to %d in %s", self._steps[0], step, self._directory)

    def close(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
