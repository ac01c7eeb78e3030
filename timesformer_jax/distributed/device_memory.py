"""Programs that do not fit the memory of a device."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging

from timesformer_jax.distributed.hardware import GIB
from timesformer_jax.errors import InputError, first_line

# The option exec_time_optimization_effort of the TPU compiler: it takes less time and less memory,
# and the program runs longer.
LEAST_EFFORT = -1.0

# What XLA raises; the second where a program ran asynchronously on a CPU.
ERRORS = (jax.errors.JaxRuntimeError, ValueError)


def required_bytes(error: Exception) -> float | None:
    """The bytes that a program needs at least, from the error that says that it does not fit.

    inf if the error does not say; None for any other error.
    """
    said = str(error)
    if "RESOURCE_EXHAUSTED" not in said:
        return None
    found = re.search(r"Used ([\d.]+)([KMGT]) of|temporaries \(([\d.]+)([KMGT])\)", said)
    if found is None:
        return math.inf
    number, unit = [group for group in found.groups() if group]
    return float(number) * GIB * 1024.0 ** ("KMGT".index(unit) - 2)


@contextlib.contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Says what to do where a program does not fit the memory of a device.

    Raises:
      InputError: instead of the error of XLA, of which it quotes the first line.
    """
    try:
        yield
    except InputError:
        raise
    except ERRORS as e:
        if required_bytes(e) is None:
            raise
        kind, said = jax.devices()[0].device_kind, first_line(e)
        raise InputError(f"the memory of {kind} is too small: {advice} ({said})") from e


def compiled_to_fit(program: Callable[..., Any]) -> Callable[..., Any]:
    """A jitted program that the TPU compiler optimises less if it does not fit otherwise.

    It then runs slower and needs less memory: 31.0 instead of 33.3 GiB for 4,096 frames on a v6e.
    The option remains set for the programs that are compiled after it.
    """

    def call(*arguments: Any) -> Any:
        try:
            return program(*arguments)
        except jax.errors.JaxRuntimeError as e:
            if required_bytes(e) is None or jax.default_backend() != "tpu" or _optimised_less():
                raise
            logging.warning(
                "the program does not fit the memory of the device; it is compiled again, with"
                " less optimisation, so that it needs less: %s", first_line(e),
            )  # fmt: skip
            jax.config.update("jax_exec_time_optimization_effort", LEAST_EFFORT)
            return program(*arguments)

    return call


def _optimised_less() -> bool:
    return jax.config.jax_exec_time_optimization_effort < 0  # type: ignore[attr-defined]  # set at run time
