"""The TPU compiler's cycles as text and as JSON."""

from __future__ import annotations

from typing import Any

from timesformer_jax.planning.cycles import PASSES, Cycles, KernelCall
from timesformer_jax.planning.plan import Plan

# How the figures are made, and what they leave out; docs/plan.md says more.
NOTES = (
    "cycles: XLA's estimates, one operation after another; large products at 91% of the peak, a",
    "  small fusion 2000 or more, a few operations 0; no collectives, host or input",
    "cycles of a fusion are of the part that names it; a copy only moves or converts data",
)
KERNEL_NOTES = (
    "cycles of a kernel: bundles of its schedule times iterations, or bytes at the memory's rate;",
    "  every branch counts, no wait within it does",
)


def cycles_lines(plan: Plan, cycles: Cycles) -> list[str]:
    """A table by part of the model, the kernels, and what follows."""
    passes = [name for name in PASSES if cycles.of(direction=name)]
    columns = [*passes, "total", "share", "copies"]
    lines = [_row("the TPU compiler's cycles, M", columns)]
    for part in cycles.parts:
        if total := cycles.of(part=part):
            found = [cycles.of(part=part, direction=name) for name in passes]
            found += [total, cycles.of(part=part, kind="copy")]
            lines.append(_numbers(f"  {part}", found, cycles.total))
    found = [cycles.of(direction=name) for name in passes]
    found += [cycles.total, cycles.of(kind="copy")]
    lines += [_numbers("  total", found, cycles.total), *_kernels(cycles)]
    rate, mfu = plan.program.clips / cycles.seconds, plan.cycles_mfu or 0.0
    waiting = plan.best.roofline.communication if plan.best.roofline else 0.0
    later = f" ({(cycles.seconds + waiting) * 1e3:.1f} with collectives)" if waiting else ""
    return [
        *lines,
        f"at {cycles.clock / 1e9:.2f} GHz {cycles.seconds * 1e3:.1f} ms a step{later}: "
        f"{rate:.1f} clips/s, MFU {mfu:.1%}",
    ]


def cycles_json(plan: Plan, cycles: Cycles) -> dict[str, Any]:
    """All figures: cycles and seconds of a step."""
    return {
        "total": cycles.total,
        "clock_hz": cycles.clock,
        "step_seconds": cycles.seconds,
        "clips_per_second": plan.program.clips / cycles.seconds,
        "mfu": plan.cycles_mfu,
        "loops_known": cycles.known,
        "parts": [
            {"part": s.part, "pass": s.direction, "kind": s.kind, "cycles": s.cycles}
            for s in cycles.shares
        ],
        "kernels": [
            k._asdict() | {"schedule": k.schedule and k.schedule._asdict()} for k in cycles.kernels
        ],
    }


def cycles_notes(cycles: Cycles) -> list[str]:
    """What the figures assume and leave out, one a line."""
    lines = [*NOTES, *(KERNEL_NOTES if cycles.kernels else ())]
    if not cycles.known:
        lines.append("cycles: a loop of unknown length counts as one iteration")
    for kernel in cycles.kernels:
        if kernel.schedule is None:
            lines.append(f"kernel {kernel.name} cannot be compiled alone: only its bytes count")
        elif not kernel.schedule.known:
            lines.append(f"kernel {kernel.name}: a loop of unknown length counts as one iteration")
        elif kernel.schedule.varies:
            lines.append(f"kernel {kernel.name}: a loop whose length varies counts as in step 1")
    return list(dict.fromkeys(lines))


def _kernels(cycles: Cycles) -> list[str]:
    """The kernels; those of one name, pass and equal cycles in one line."""
    if not cycles.kernels:
        return []
    merged: dict[tuple, KernelCall] = {}
    for kernel in cycles.kernels:
        key = kernel.name, kernel.direction, kernel.cycles
        before = merged[key].calls if key in merged else 0
        merged[key] = kernel._replace(calls=before + kernel.calls)
    lines = ["", _row("kernels, in the total", ["calls", "M each", "M", "bound by"])]
    for kernel in merged.values():
        each, total = kernel.cycles / 1e6, kernel.calls * kernel.cycles / 1e6
        values = [str(kernel.calls), f"{each:.3f}", f"{total:.2f}", kernel.bound_by]
        name = kernel.name
        if kernel.direction not in name:
            name += f", {kernel.direction}"
        lines.append(_row(f"  {name}", values))
    return [*lines, ""]


def _numbers(name: str, cycles: list[int], total: int) -> str:
    """A row; the last two of `cycles` are the row's total and its copies."""
    *others, copies = (f"{value / 1e6:.2f}" for value in cycles)
    return _row(name, [*others, f"{cycles[-2] / total:.1%}", copies])


def _row(name: str, values: list[str]) -> str:
    return f"{name:<30}" + "".join(f"{value:>11}" for value in values)
