"""A plan as text and as JSON."""

from __future__ import annotations

import math
from typing import Any

import jax

from timesformer_jax.distributed.hardware import GIB, Torus
from timesformer_jax.planning.plan import Estimate, Plan
from timesformer_jax.planning.program import Program
from timesformer_jax.planning.report_cycles import cycles_json, cycles_lines, cycles_notes
from timesformer_jax.planning.roofline import Roofline, sent

_KINDS = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "inputs": "inputs",
    "activations": "activations, gradients, temporaries",
    "program": "program",
    "padding": "padding of arguments, results",
}


def as_text(plan: Plan) -> str:
    """The plan in lines of less than 100 characters."""
    lines = [_head(plan), "", _verdict(plan), ""]
    found = [("compiled", plan.compiled), ("counted", plan.counted)]
    columns = [(name, estimate) for name, estimate in found if estimate]
    lines += [_row("memory a chip, GiB", [name for name, _ in columns])]
    for kind, name in _KINDS.items():
        if kind == "optimizer" and plan.program.work == "inference":
            continue
        values = [getattr(estimate.memory, kind) / GIB for _, estimate in columns]
        lines.append(_row(f"  {name}", [f"{value:.3f}" for value in values]))
    totals = [estimate.memory.total / GIB for _, estimate in columns]
    lines += [_row("  total", [f"{total:.3f}" for total in totals]), ""]
    lines += [_row("one step, a chip", [name for name, _ in columns])]
    lines.append(_row("  TFLOPs", [_scaled(e.flops, 1e12) for _, e in columns]))
    lines += [_row("  GB to and from memory", [_scaled(e.moved, 1e9) for _, e in columns]), ""]
    for name, estimate in columns:
        lines += _sent(name, estimate, plan)
    if plan.best.roofline:
        lines += ["", *_times(plan, plan.best.roofline)]
    if plan.host_rate and plan.step_seconds:
        rate = plan.program.clips / plan.step_seconds
        lines += [
            "",
            f"at best {plan.step_seconds:.3g} s a step on this CPU, at the "
            f"{plan.host_rate / 1e9:.0f} GFLOP/s of its matrix products: {rate:.2g} clips/s",
        ]
    if plan.cycles:
        lines += ["", *cycles_lines(plan, plan.cycles)]
    if plan.largest_batch is not None:
        lines += ["", _largest(plan)]
    if plan.longest_clip is not None:
        lines += ["", _longest(plan)]
    return "\n".join([*lines, "", "assumed:", *(f"  {line}" for line in assumptions(plan))])


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values: bytes, FLOPs, seconds."""
    program = plan.program
    return {
        "topology": plan.topology.name,
        "work": program.work,
        "chips": program.mesh.devices.size,
        "mesh": dict(program.mesh.shape),
        "batch_size": program.batch_size,
        "clips": program.clips,
        "clip": {"frames": program.clip.frames, "crop": program.clip.crop},
        "attention": program.model.attention,
        "dtype": program.model.dtype,
        "remat": program.model.remat,
        "parameters": sum(x.size for x in jax.tree.leaves(program.state.params)),
        "fits": plan.fits,
        "limit_bytes": plan.limit,
        "needed_bytes": plan.needed if plan.needed < math.inf else None,
        "largest_batch": plan.largest_batch,
        "longest_clip": plan.longest_clip,
        "source": "compiled" if plan.compiled else "counted",
        "compile_seconds": plan.compile_seconds,
        "quick": plan.quick,
        "compiled": plan.compiled and _estimate_json(plan.compiled, plan),
        "counted": _estimate_json(plan.counted, plan),
        "step_seconds": plan.step_seconds,
        "clips_per_second": plan.step_seconds and program.clips / plan.step_seconds,
        "mfu": plan.mfu,
        "cycles": plan.cycles and cycles_json(plan, plan.cycles),
        "assumptions": assumptions(plan),
    }


def _estimate_json(estimate: Estimate, plan: Plan) -> dict[str, Any]:
    exchanged = [
        c._asdict() | {"axes": list(c.axes), "sent_bytes": sent(c, plan.program.mesh)}
        for c in estimate.collectives
    ]
    return {
        "memory_bytes": estimate.memory._asdict() | {"total": estimate.memory.total},
        "flops": estimate.flops,
        "moved_bytes": estimate.moved,
        "collectives": exchanged,
        "roofline_seconds": estimate.roofline and estimate.roofline._asdict(),
    }


def assumptions(plan: Plan) -> list[str]:
    """The assumptions behind the figures, one a line."""
    chip, program = plan.topology.chip, plan.program
    kept = "every residual of the forward pass is" if program.train == "all" else "one block's is"
    lines = [
        "counted TFLOPs: 2 a multiply-accumulate of the model, without what remat computes again",
        f"counted memory: {kept} kept, without padding",
        "sent: as in a ring of n chips, (n - 1) / n of the bytes, an all-reduce twice that",
        f"frames are {program.frame_side} x {program.frame_side} uint8; reading and decoding them "
        "is not counted",
        f"{program.model.num_classes} classes",
    ]
    if program.train == "all":
        lines[0] += ", forward 3 times"
    if plan.compiled and plan.compiled.flops is None:
        lines.append("a compiled program with loops: its FLOPs and traffic are not counted")
    if plan.quick:
        lines.append(
            "compiled with --quick: less optimised than a run, so that it takes more cycles"
        )
    if plan.cycles:
        lines += cycles_notes(plan.cycles)
    if chip is None:
        return [*lines, "time: the model's matrix products at the rate of this machine's, measured"]
    product = "a bfloat16 pass" if isinstance(chip.links, Torus) else "TensorFloat-32"
    peak = chip.bfloat16 if program.model.dtype == "bfloat16" else chip.float32
    lines += [
        f"peak {peak / 1e12:g} TFLOP/s in {program.model.dtype} (a float32 product is {product})",
        f"memory {chip.memory_rate / 1e9:g} GB/s, each operand and result of the compiler's "
        "operations once",
    ]
    if isinstance(chip.links, Torus):
        return [*lines, f"links {chip.links.link / 1e9:g} GB/s each way, two a closed side, one an "
                "open one"]  # fmt: skip
    links = chip.links
    return [
        *lines,
        f"NVLink {links.within / 1e9:g} GB/s each way in a host of {links.size}, network "
        f"{links.between / 1e9:g} GB/s a GPU",
        "JAX takes 3/4 of a GPU's memory, or what XLA_PYTHON_CLIENT_MEM_FRACTION says",
    ]


def _head(plan: Plan) -> str:
    program, chips = plan.program, plan.program.mesh.devices.size
    mesh = " x ".join(f"{name}={size}" for name, size in program.mesh.shape.items() if size > 1)
    model, clip = program.model, program.clip
    return (
        f"{model.attention}, {clip.frames} x {clip.crop}, {model.dtype}, remat {model.remat}, on "
        f"{plan.topology.name}: {chips} chip{'s' * (chips > 1)}, mesh {mesh or 'of one'}\n"
        f"{_work(program)}"
    )


def _work(program: Program) -> str:
    if program.work == "training":
        return f"training, a step of {program.clips} clips"
    views = program.clips // program.batch_size
    return f"inference, a batch of {program.batch_size} videos in {views} clips each"


def _verdict(plan: Plan) -> str:
    how = f"compiled in {plan.compile_seconds:.0f} s" if plan.compile_seconds else ""
    if not plan.topology.compiles:
        how = "analytic, not compiled: none of these chips here, or too few"
    amount = f"{plan.needed / GIB:.2f}"
    if plan.topology.compiles and plan.compiled is None:  # the compiler names temporaries only
        amount = "more than all" if plan.needed == math.inf else f"at least {amount}"
    if plan.limit is None:
        return f"needs {amount} GiB a chip ({how})"
    verdict = "fits" if plan.fits else "does not fit"
    return f"{verdict}: {amount} of {plan.limit / GIB:.2f} GiB a chip ({how})"


def _row(name: str, values: list[str]) -> str:
    return f"{name:<40}" + "".join(f"{value:>14}" for value in values)


def _scaled(value: float | None, unit: float) -> str:
    return "not counted" if value is None else f"{value / unit:.4g}"


def _sent(name: str, estimate: Estimate, plan: Plan) -> list[str]:
    """What a chip sends, summed over the collectives of one kind along the same axes."""
    sums: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for c in estimate.collectives:
        entry = sums.setdefault((c.kind, c.axes), [0, 0.0])
        entry[0] += c.count
        entry[1] += sent(c, plan.program.mesh)
    lines = [f"MB that a chip sends, {name}" + ("" if sums else ": none")]
    for (kind, axes), (count, size) in sorted(sums.items(), key=lambda item: -item[1][1]):
        times = f"  ({count} of them)" if name == "compiled" else ""
        lines.append(_row(f"  {kind} over {', '.join(axes)}", [f"{size / 1e6:.3f}"]) + times)
    return lines


def _times(plan: Plan, bound: Roofline) -> list[str]:
    parts = {"compute": bound.compute, "memory": bound.memory, "communication": bound.communication}
    waits = bound.communication > 0
    lines = ["roofline of a step, ms"]
    for name, seconds in parts.items():
        lines.append(_row(f"  {name}", ["-" if seconds is None else f"{seconds * 1e3:.2f}"]))
    rate = plan.program.clips / bound.overlapped
    mfu = "traffic to memory not counted" if plan.mfu is None else f"MFU {plan.mfu:.1%}"
    return [
        *lines,
        f"at best {bound.overlapped * 1e3:.1f} ms a step, bound by {bound.bound_by}: "
        f"{rate:.1f} clips/s, {mfu}",
        *([f"{bound.one_by_one * 1e3:.1f} ms if communication waits for the rest"] * waits),
    ]


def _largest(plan: Plan) -> str:
    inference = plan.program.work == "inference"
    if plan.largest_batch == 0:
        less = "fewer views" if inference else "--config.model.remat=block"
        return f"no batch fits: try {less}, bfloat16 or more chips"
    of = " videos" if inference else ""
    return f"largest batch that fits: {plan.largest_batch}{of}"


def _longest(plan: Plan) -> str:
    if plan.longest_clip == 0:
        return (
            "no clip fits: try --config.model.remat=block or offload, a smaller batch, bfloat16, "
            "or --config.mesh.sequence on more chips"
        )
    return f"longest clip that fits: {plan.longest_clip} frames"
