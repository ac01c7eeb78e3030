"""The contenders of race_pytorch.py, each in a process of its own, with its threads and memory.

All do the same work with the same weights on the same clips, in the memory of the device.
Inference is the forward pass from normalised clips to logits. Training is a whole step: forward,
cross-entropy in float32, backward, SGD with Nesterov momentum 0.9 and weight decay 1e-4 on every
parameter; no drop path.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from timesformer_jax.timing import time_runs

SETS = 2  # sets of clips; steps alternate between them
CHECKED_STEPS = 3
LEARNING_RATE = 0.005

# Module and class; the contender's own process imports them.
OURS = "contender_ours", "Ours"
TRANSFORMERS = "contender_transformers", "Transformers"


class Task(NamedTuple):
    """The work that all contenders do.

    Attributes:
      kind: "inference" or "training".
      model: fields of TimeSformerConfig.
      folder: the weights, a transformers directory.
      device: "cpu" or "cuda".
      threads: CPU threads.
      share: share of a GPU's memory that one contender may use; the others hold their weights.
    """

    kind: str
    model: dict[str, Any]
    folder: str
    device: str
    threads: int
    share: float


class Options(NamedTuple):
    """What is changed in transformers' model.

    Attributes:
      bfloat16: whether training and inference run under autocast.
      rounded: whether inference runs with weights that are bfloat16 already.
      sdpa: whether attention runs by torch's scaled_dot_product_attention.
      compiled: whether torch.compile is used, with static shapes.
      fused: whether the optimizer is one kernel.
    """

    bfloat16: bool = False
    rounded: bool = False
    sdpa: bool = False
    compiled: bool = False
    fused: bool = False


class Lost(Exception):
    """A contender cannot go on; the message says why."""


class Runner:
    """The process of a contender, seen from the race."""

    def __init__(self, task: Task, options: Options | None):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=contend, args=(theirs, task, options), daemon=True)
        self._process.start()
        self.pid = self._process.pid
        theirs.close()

    def ask(self, method: str, *arguments: Any, until: float) -> Any:
        """The result of a method of the contender.

        Args:
          until: its process is killed if it has not answered then, by `time.monotonic`.

        Raises:
          Lost: if it fails, or its process ended.
        """
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(max(until - time.monotonic(), 0)):
                self._process.kill()
                raise Lost(f"no answer to {method} in time")
            worked, result = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise Lost(f"its process ended with status {self._process.exitcode}") from None
        if not worked:
            raise Lost(result)
        return result

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()


def contend(connection: Connection, task: Task, options: Options | None) -> None:
    """Answers each (method, arguments) with (True, result) or (False, reason), until the end.

    Args:
      options: what is changed in transformers' model; None for our model.
    """
    module, name = OURS if options is None else TRANSFORMERS
    if hasattr(os, "sched_setaffinity") and task.device == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.threads])
    contender = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:  # the race is over
            return
        try:
            if contender is None:
                contender = getattr(importlib.import_module(module), name)(task, options)
            connection.send((True, getattr(contender, method)(*arguments)))
        except Exception as e:
            traceback.print_exc()
            connection.send((False, f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"[:200]))


def clips(task: Task, batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Sets of (B, T, H, W, 3) float32 clips and (B,) int64 labels. The first set repeats one clip,
    so that its mean loss is the same for every batch size."""
    rng = np.random.default_rng(0)
    model = task.model
    side = model["image_size"]
    shape = model["num_frames"], side, side, 3

    def draw(size: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, model["num_classes"], size)
        return rng.standard_normal((size, *shape), np.float32), labels

    video, labels = draw(1)
    first = np.tile(video, (batch, 1, 1, 1, 1)), np.tile(labels, batch)
    return [first, *(draw(batch) for _ in range(SETS - 1))]


class Contender:
    """The methods of a contender that the race calls.

    A subclass has `about`, its versions and device; `_begin`, which sets `_run`, a function that
    starts the step of a number; `_wait`, which waits for the result of `_run`; and `_product`,
    which returns a large product to run.
    """

    task: Task
    _run: Callable[[int], Any]

    def begin(self, batch: int) -> dict[str, Any]:
        """Prepares for a batch size.

        Returns:
          "compile_seconds", including the first run if that compiles, and "check": the logits of
          one clip, or the losses of the first steps on it.
        """
        begin = time.perf_counter()
        try:
            check = self._begin(batch)
        finally:
            self._rest()
        return {"compile_seconds": time.perf_counter() - begin, "check": check}

    def turn(self, seconds: float) -> dict[str, float]:
        """Median seconds of a step, in wall time and in processor time."""
        return self._timed(self._run, seconds)

    def gemm(self, seconds: float) -> dict[str, float]:
        """FLOP/s of a large square product, by wall time and by processor time."""
        run, flops = self._product(2048 if self.task.device == "cpu" else 8192)
        return {kind: flops / took for kind, took in self._timed(run, seconds).items()}

    def _timed(self, run: Callable[[int], Any], seconds: float) -> dict[str, float]:
        timing = time_runs(run, self._wait, seconds, min_samples=1)
        self._rest()
        return {"wall": timing.wall["median"], "cpu": timing.cpu["median"]}

    def _rest(self) -> None:
        """Frees memory that the next contender may need."""
