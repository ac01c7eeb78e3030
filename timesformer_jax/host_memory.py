"""Memory of the host, kept from one run of a program on the CPU to the next."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util

import jax

# Of mallopt(3).
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep_freed() -> None:
    """Has the C library keep what is freed, where JAX has no other device than the CPU.

    XLA allocates the temporaries of a program anew for every run. The C library gives blocks of
    their size back to the system, which clears each page again when it is next touched: a third of
    the demo's training step, a twelfth of the base model's. It can keep what the main thread
    allocates, so programs are run there, rather than on one of JAX's.

    To be called before JAX starts its devices. Does nothing where the C library is not glibc.
    """
    if _has_accelerator() or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    libc.mallopt(MMAP_MAX, 0)  # all from the heap
    libc.mallopt(TRIM_THRESHOLD, -1)  # which never shrinks


def _has_accelerator() -> bool:
    """Whether JAX would find a GPU or TPU, as far as that is known before it looks."""
    if platforms := jax.config.jax_platforms:  # type: ignore[attr-defined]  # set at run time
        return platforms != "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None
