"""Writes the tables of docs/benchmarks.md from benchmarks/results/DEVICE/*.json.

.venv/bin/python experiments/benchmark_tables.py
"""

from __future__ import annotations

import json
from typing import Any

from docs_tables import DOCS, markdown_table, replace_table

from timesformer_jax.benchmark import report
from timesformer_jax.distributed.hardware import GIB

RESULTS = DOCS.parent / "benchmarks" / "results"
PAGE = DOCS / "benchmarks.md"


def main() -> None:
    PAGE.write_text(tabulated(PAGE.read_text()))
    print(f"written: {PAGE}")


def tabulated(page: str) -> str:
    """The page, with all tables made from the results."""
    for name, (table, files) in TABLES.items():
        texts = [
            table(json.loads(file.read_text()))
            for folder in sorted(RESULTS.iterdir())
            for file in (folder / f"{each}.json" for each in files)
            if file.exists()
        ]
        page = replace_table(
            page, "benchmark_tables.py", name, "\n\n".join(texts) or "Not measured yet."
        )
    return page


def device(figures: dict[str, Any]) -> str:
    """The machine and versions of a result, as a sentence."""
    host, kind = figures["machine"], figures["device"]["kind"]
    peak = figures["device_peak"]
    name = f"{host['processor']}, {host['cores']} cores" if kind == "cpu" else kind
    gemm = f"{report.tera(peak['gemm']['wall'])} TFLOP/s"
    if "cpu" in peak["gemm"]:
        gemm += f", in a second of a core's time {report.tera(peak['gemm']['cpu'])} TFLOP"
    return (
        f"**{name}** (load {host['load_average']:.1f}, JAX {figures['versions']['jax']}), "
        f"{peak['dtype']}; large product measured {gemm}"
        + (f"; datasheet {report.tera(peak['datasheet'])} TFLOP/s" if peak["datasheet"] else "")
    )


def attention(figures: dict[str, Any]) -> str:
    """A line for each scheme and clip."""
    settings = figures["settings"]
    head = ["scheme", "clip", "comparisons a patch", "GMACs", "M parameters"]
    head += [f"{name}, {what}" for name in ("forward", "training") for what in UNITS]
    lines = [
        [f"`{row['scheme']}`", f"{row['frames']} x {row['side']}", f"{row['comparisons']:.0f}",
         f"{row['macs'] / 1e9:.1f}", f"{row['parameters'] / 1e6:.1f}", *cells(row["forward"]),
         *cells(row["training"])]
        for row in figures["rows"]
    ]  # fmt: skip
    about = f"{settings['preset']}, {settings['depth']} blocks, batch {settings['batch_size']}"
    return f"{device(figures)}; {about}:\n\n{markdown_table(head, lines, words=2)}"


UNITS = ("ms (min-max)", "GiB", "share of the product")


def cells(found: dict[str, Any]) -> list[str]:
    """Time, memory and share of one pass; or the reason why there are none."""
    if found["status"] != "measured":
        return [f"{found['status']}: {found['reason']}", "", ""]
    memory = f"{found['bytes'] / GIB:.2f}"
    return [report.milliseconds(found["seconds"]["wall"]), memory, shares(found["gemm_share"])]


def shares(share: dict[str, float]) -> str:
    """The value by wall time and, in brackets, by the time of one core."""
    core = f" ({share['cpu']:.0%})" if "cpu" in share else ""
    return f"{share['wall']:.0%}{core}"


def model(figures: dict[str, Any]) -> str:
    """A line for each preset, workload and batch."""
    head = ["preset", "workload", "batch", "clips/s", *UNITS, "MFU"]
    lines = []
    for row in figures["rows"]:
        done = row["status"] == "measured"
        mfu = f"{row['mfu']:.1%}" if row.get("mfu") else ""
        rate = f"{row['clips_per_second']['wall']:.3g}" if done else ""
        lines.append([row["preset"], row["workload"], row["batch_size"], rate, *cells(row), mfu])
    remat = figures["settings"]["remat"]
    return f"{device(figures)}; remat {remat}:\n\n{markdown_table(head, lines, words=2)}"


def race(workloads: dict[str, Any]) -> str:
    """A table for each workload."""
    texts = []
    for name, figures in workloads.items():
        host, versions = figures["machine"], figures["versions"]
        on_cpu = figures["device"] == "cpu"
        where = (
            f"{host['processor']}, {figures['threads']} threads, load {host['load_average']:.1f}"
        )
        about = where if on_cpu else versions["device"]
        others = ", ".join(f"{k} {v}" for k, v in versions.items() if k != "device")
        head = ["contender", "batch", "clips/s (min-max)", "share of the product",
                "ours is faster"]  # fmt: skip
        if on_cpu:
            head += ["clips in a core's second", "ours is faster, of a core"]
        lines = [racer(row, len(head), on_cpu) for row in figures["contenders"]]
        texts.append(
            f"**{about}**, {others}; `{name}`, {figures['gmacs']:.2f} GMACs a clip, "
            f"{figures['rounds']} rounds:\n\n{markdown_table(head, lines, words=1)}"
        )
    return "\n\n".join(texts)


def racer(row: dict[str, Any], width: int, on_cpu: bool) -> list[Any]:
    if "clips_per_second" not in row:
        return [row["name"], row["tried"][-1]["reason"], *[""] * (width - 2)]
    line = [row["name"], report.batch(row)]
    for kind in ("wall", "cpu") if on_cpu else ("wall",):
        line.append(report.median_and_range(row["clips_per_second"][kind]))
        if kind == "wall":
            line.append(shares(row["product_share"]))
        # Without a result of our model there is nothing to compare with.
        line.append(
            report.median_and_range(row["ours_is_faster"][kind]) if "ours_is_faster" in row else ""
        )
    return line


def flags(figures: dict[str, Any]) -> str:
    """A line for each of XLA's flags."""
    settings = figures["settings"]
    lines = [[f"`{row['text']}`", row["why"], report.gain(row)] for row in figures["rows"]]
    what = f"`{settings['preset']}`, {settings['workload']}, batch {settings['batch_size']}"
    host = figures["machine"]
    return (
        f"**{figures['device']}** ({host['cores']} cores of {host['processor']}, load "
        f"{host['load_average']:.1f}, JAX {figures['versions']['jax']}), {what}:\n\n"
        + markdown_table(["flag", "why it might", "gain (min to max)"], lines, words=3)
    )


# The tables by their name on the page, with the files of a device that hold their figures.
TABLES = {
    "attention": (attention, ("attention", "schemes")),
    "model": (model, ("model",)),
    "race": (race, ("race",)),
    "flags": (flags, ("flags",)),
}

if __name__ == "__main__":
    main()
