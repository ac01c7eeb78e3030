"""Finds the fastest implementation of an attention on the device at hand.

Every implementation runs at the size that the program will have. All are compiled at once. Each is
compared with the plain reference in float32, computed head by head for the first and the last clip
since its logits of all may not fit; then it is timed.

A kernel may also hang, or take the device or the process down with it. Compilation happens on the
host, in a thread that is left behind if it takes too long. A run cannot be left behind so: what
follows on that device waits for it, and no other process may have the device meanwhile (TPUs admit
one; a GPU's memory is reserved). So the cache is told before a run. If the device does not answer
after it, `DeviceLost` ends this process; the next one passes over that implementation.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from timesformer_jax.errors import DeviceLost
from timesformer_jax.models.ops.kernels import cache
from timesformer_jax.models.ops.kernels.registry import KERNELS, Case
from timesformer_jax.models.ops.kernels.select import is_long
from timesformer_jax.models.ops.reference import use_references
from timesformer_jax.models.tokens import Grid, Tokens
from timesformer_jax.timing import time_runs

COMPILE_SECONDS = 120.0
RUN_SECONDS = 30.0  # of some runs of milliseconds
SECONDS = 0.2  # to measure the time of one implementation
TOLERANCE = 0.02  # of the largest number; the rounding of bfloat16 gradients is below it
UNFINISHED = "the process that tried it did not go on"

Implementation = Callable[[Tokens, Grid], Tokens]
Arrays = tuple[Tokens, Tokens]  # the projections, and the gradient of the attended values
T = TypeVar("T")


def fastest(
    case: Case, names: list[str], xla: Implementation, gradients: bool, device: jax.Device
) -> tuple[cache.Entry, bool]:
    """The entry of the cache for a case, which is measured if there is none.

    Args:
      case: of one device.
      names: the kernels of `KERNELS` that support it.
      xla: the implementation that is always there.
      gradients: whether the program needs gradients. Only then they are compared, and included in
        the time.
      device: a device of this process.

    Returns:
      The entry, and whether it was measured just now.

    Raises:
      DeviceLost: if a kernel made the device useless. The next process passes over it.
    """
    about = cache.describe(case, gradients, device)
    if (entry := _finished(about, names)) is not None:
        return entry, False
    with cache.locked():
        if (entry := _finished(about, names)) is not None:  # by the process that had the lock
            return entry, False
        entry = cache.read(about) or {"about": about, "tried": {}}
        tried = _measure(entry, case, names, xla, gradients, device)
        times = {name: seconds for name, seconds in tried.items() if not isinstance(seconds, str)}
        chosen = min(times, key=times.__getitem__, default="xla")
        entry = {"about": about, "tried": tried, "chosen": chosen}
        cache.keep(entry)
    return entry, True


def _finished(about: dict[str, Any], names: list[str]) -> cache.Entry | None:
    entry = cache.read(about)
    return entry if entry and entry.get("chosen") in ("xla", *names) else None


def _measure(
    entry: cache.Entry,
    case: Case,
    names: list[str],
    xla: Implementation,
    gradients: bool,
    device: jax.Device,
) -> dict[str, float | str]:
    """Seconds of each implementation, or why it is passed over.

    Args:
      entry: of a process that ended while it measured, or one in which nothing was tried.
    """
    tried = {name: why for name, why in entry["tried"].items() if why == UNFINISHED}
    inputs = _Work(lambda: _inputs(case, device)).result(COMPILE_SECONDS)
    attentions = {"xla": xla} | {name: KERNELS[case.kind][name].attention for name in names}
    compiling = {
        name: _Work(functools.partial(_compile, attention, case, gradients, inputs))
        for name, attention in attentions.items()
        if name not in tried
    }
    expected: dict[str, list[np.ndarray]] | str
    try:
        reference = _Work(lambda: _reference(xla, case, gradients, inputs))
        expected = reference.result(COMPILE_SECONDS)
    except Exception as e:  # such as too little memory
        expected = f"there are no numbers to compare it with ({_one_line(e)})"
    compiled = {}
    for name, work in compiling.items():
        try:
            compiled[name] = work.result(COMPILE_SECONDS)
        except Exception as e:  # any of the compiler; the others are still tried
            tried[name] = f"it does not compile ({_one_line(e)})"
    for name, program in compiled.items():  # nothing else runs now
        if name == "xla":
            tried[name] = _run(program, inputs, {}, device, f"{case.kind} attention")
        elif isinstance(expected, str):
            tried[name] = expected
        else:
            cache.keep(entry | {"tried": tried | {name: UNFINISHED}})
            what = f"{case.kind} attention {name!r}"
            tried[name] = _run(program, inputs, expected, device, what)
    return tried


class _Work(Generic[T]):
    """Work in a thread, which is left behind if it takes too long.

    A new thread has no mesh and no other context of JAX: the work is that of one device.
    """

    def __init__(self, work: Callable[[], T]):
        self._done: list[T] = []
        self._failed: list[BaseException] = []
        self._begin = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=[work], daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._done.append(work())
        except BaseException as e:
            self._failed.append(e)

    def result(self, seconds: float) -> T:
        """What the work returned.

        Raises:
          TimeoutError: if it takes longer, counted from its begin.
          Exception: that of the work.
        """
        self._thread.join(max(0.0, self._begin + seconds - time.monotonic()))
        if self._failed:
            raise self._failed[0]
        if not self._done:
            raise TimeoutError(f"not over after {seconds:g} s")
        return self._done[0]


def _compile(
    attention: Implementation, case: Case, gradients: bool, inputs: Arrays
) -> jax.stages.Compiled:
    program = _program(attention, case.shape[-2], case.grid, gradients)
    return jax.jit(program).lower(*inputs).compile()


def _run(
    program: jax.stages.Compiled,
    inputs: Arrays,
    expected: dict[str, list[np.ndarray]],
    device: jax.Device,
    what: str,
) -> float | str:
    """Seconds of a run, or why the implementation is passed over.

    Raises:
      DeviceLost: if the device does not answer afterwards.
    """
    try:
        return _Work(lambda: _compare_and_time(program, inputs, expected)).result(RUN_SECONDS)
    except Exception as e:
        if not _answers(device):
            raise DeviceLost(
                f"{device.device_kind} does not answer after the {what} ({_one_line(e)}); start "
                "again: it will be passed over"
            ) from e
        return f"it does not run ({_one_line(e)})"


def _answers(device: jax.Device) -> bool:
    def compute() -> float:
        return float(jnp.sum(jax.device_put(np.ones(8, np.float32), device)))

    try:
        return _Work(compute).result(RUN_SECONDS) == 8
    except Exception:
        return False


def _inputs(case: Case, device: jax.Device) -> Arrays:
    """Random projections of the case's size, and a random gradient of its attended values.

    The projections lie as the linear layer writes them, (..., 3 * h * d).
    """
    b, t, n, _, h, d = case.shape
    sequences = {"temporal": n, "spatial": t, "joint": 1, "rows": t * case.grid[0]}
    count = sequences.get(case.kind, t * case.grid[1])

    def draw(width: int, seed: int) -> Tokens:
        keys = jax.random.split(jax.random.key(seed))
        cls = jax.random.normal(keys[0], (b, count, width), case.dtype) if case.cls else None
        return Tokens(cls, jax.random.normal(keys[1], (b, t, n, width), case.dtype))

    place = jax.sharding.SingleDeviceSharding(device)
    draw_both = jax.jit(lambda: (draw(3 * h * d, 0), draw(h * d, 1)), out_shardings=place)
    return jax.block_until_ready(draw_both())


def _program(attention: Implementation, heads: int, grid: Grid, gradients: bool) -> Callable:
    """A function of `Arrays` to values and gradients (None if there are none)."""

    def forward(qkv: Tokens) -> Tokens:
        return attention(jax.tree.map(lambda x: _by_head(x, 3, heads), qkv), grid)

    def run(qkv: Tokens, g: Tokens) -> tuple[Tokens, Tokens | None]:
        if not gradients:
            return forward(qkv), None
        values, backward = jax.vjp(forward, qkv)
        return values, backward(g)[0]

    return run


def _compare_and_time(
    compiled: jax.stages.Compiled, inputs: Arrays, expected: dict[str, list[np.ndarray]]
) -> float | str:
    """Seconds of a run; in what its numbers differ from those expected, if they do."""
    found = jax.block_until_ready(compiled(*inputs))
    clips = np.array([0, len(inputs[0].patches) - 1])
    numbers = _by_name(*jax.tree.map(lambda x: np.asarray(x[clips], np.float32), found))
    for name, arrays in expected.items():
        worst = max(map(_difference, arrays, numbers[name]))
        if not worst <= TOLERANCE:  # also true for NaN
            return f"its {name} differ from the reference's by {worst:.2g} of the largest"
    del found, numbers
    return time_runs(lambda _: compiled(*inputs), jax.block_until_ready, SECONDS).wall["median"]


def _difference(expected: np.ndarray, found: np.ndarray) -> float:
    return float(np.abs(expected - found).max() / np.abs(expected).max())


def _by_name(values: Tokens, gradients: Tokens | None) -> dict[str, list[np.ndarray]]:
    """Arrays that are compared, each with its own scale."""
    named = {"values": jax.tree.leaves(values)}
    for i, part in enumerate(("queries", "keys", "values")):
        if gradients is not None:
            leaves = jax.tree.leaves(gradients)
            named[f"gradients of the {part}"] = [np.split(x, 3, axis=-1)[i] for x in leaves]
    return named


def _reference(
    xla: Implementation, case: Case, gradients: bool, inputs: Arrays
) -> dict[str, list[np.ndarray]]:
    """The numbers of the first and the last clip by the plain reference, in float32."""
    h, d = case.shape[-2:]
    program = _program(xla, 1, case.grid, gradients)

    def heads_first(x: jax.Array, parts: int = 1) -> jax.Array:  # ... p h d -> h ... p d
        x = jnp.moveaxis(_by_head(x, parts, h), -2, 0)
        return x.reshape(*x.shape[:-2], -1)

    def heads_last(x: jax.Array, parts: int = 1) -> jax.Array:  # and back
        x = jnp.moveaxis(x.reshape(*x.shape[:-1], parts, d), 0, -2)
        return x.reshape(*x.shape[:-3], -1)

    @jax.jit
    def one_clip(qkv: Tokens, g: Tokens, clip: int | jax.Array) -> tuple[Tokens, Tokens | None]:
        qkv, g = jax.tree.map(lambda x: x[clip][None].astype(jnp.float32), (qkv, g))
        qkv, g = (jax.tree.map(lambda x: heads_first(x, 3), qkv), jax.tree.map(heads_first, g))
        values, gradient = jax.lax.map(lambda head: program(*head), (qkv, g))
        values = jax.tree.map(heads_last, values)
        return values, jax.tree.map(lambda x: heads_last(x, 3), gradient)

    # The plain reference would hold the weights of a long clip. Blocks are tested against it.
    with use_references(not is_long(case)), jax.default_matmul_precision("highest"):
        clips = [jax.device_get(one_clip(*inputs, i)) for i in (0, case.shape[0] - 1)]
    return _by_name(*jax.tree.map(lambda *x: np.concatenate(x), *clips))


def _by_head(x: jax.Array, parts: int, heads: int) -> jax.Array:
    """(..., parts * h * d) to (..., parts, h, d)."""
    return x.reshape(*x.shape[:-1], parts, heads, -1)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
