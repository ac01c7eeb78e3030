"""One switch between the plain reference of every operation and its fast form."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

# `with use_references(True):` traces programs from the references alone. They are slower, hold more
# in memory, and support forward-mode derivatives (`jax.jvp`, `jax.hessian`), which the fast forms,
# being `jax.custom_vjp` functions, refuse. `jax.jit` traces a function again when this changes.
use_references = jax.make_user_context(default_value=False)


def with_reference(reference: Callable) -> Callable[[Callable], Callable]:
    """Decorates the fast form of an operation: `reference` runs in its place on request.

    The operation has both as attributes, `reference` and `fast`, so that tests can compare them.
    """

    def decorate(fast: Callable) -> Callable:
        @functools.wraps(fast)
        def operation(*arguments, **options):
            chosen = reference if use_references.value else fast
            return chosen(*arguments, **options)

        operation.reference, operation.fast = reference, fast  # type: ignore[attr-defined]
        return operation

    return decorate
