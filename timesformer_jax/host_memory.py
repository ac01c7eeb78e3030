"""Keeps freed memory of the host for the next run of a program on the CPU."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os

import jax

from timesformer_jax.errors import InputError

# Parameters of mallopt(3).
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep_freed() -> None:
    """Makes the C library keep freed memory, if the CPU is JAX's only device.

    XLA allocates the temporary buffers of a program anew for each run. glibc returns blocks of this
    size to the operating system, which clears every page when it is touched again. That takes a
    third of the demo's training step, and a twelfth of the base model's. glibc can keep only what
    the main thread allocates, so programs run in the main thread, not asynchronously.

    Call it before JAX initialises its devices. It does nothing if the C library is not glibc.
    """
    if _has_accelerator() or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    libc.mallopt(MMAP_MAX, 0)  # allocate everything on the heap
    libc.mallopt(TRIM_THRESHOLD, -1)  # never shrink the heap


def require_memory_for(clips: int, frames: int, side: int, flag: str) -> None:
    """Refuses a batch whose frames alone, as bytes, are more than this machine's memory.

    Args:
      clips: of this process.
      frames, side: of a clip; pixels.
      flag: that sets the number.

    Raises:
      InputError: they do not fit. A model needs far more; `timesformer plan` says how much.
    """
    need, there = clips * frames * side**2 * 3, physical_memory()
    if there and need > there:
        raise InputError(
            f"the frames of {clips:,} clips at a time take {need / 2**30:,.0f} GiB, and this"
            f" machine has {there / 2**30:,.0f} GiB: lower {flag}"
        )


def physical_memory() -> int:
    """Bytes of this machine's memory; 0 if it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def _has_accelerator() -> bool:
    """Whether JAX has a GPU or TPU, as far as known before it initialises its devices."""
    if platforms := jax.config.jax_platforms:  # type: ignore[attr-defined]  # set at run time
        return platforms != "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None
