"""Compares this project with transformers' TimeSformer in PyTorch, on one device, in one run.

    .venv/bin/python experiments/race_pytorch.py --json=benchmarks/results/DEVICE/race.json
    .venv/bin/python experiments/race_pytorch.py --device=cuda --workloads=base_inference ...

All contenders do the same work with the same weights on the same clips (contenders.py): our model
in JAX; transformers' model as it is; and transformers' model with every option that makes it faster
and does not change it. Each runs in a process of its own. Only one computes at a time, and they
take turns for several rounds. On a CPU a turn waits until no other process needs the cores, and is
repeated if one did, since threads that wait for each other lose much more time than the other
process takes. Outputs are compared before anything is timed: logits, or the losses of three
training steps. On a GPU each contender runs at its best batch size, with an equal share of the
memory; on a CPU at the batch size of the workload, with an equal number of threads.
The exit status is 1 if an output differs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags
from contenders import Lost, Options, Runner, Task
from cpu_load import Others, busy_cores, spare_cores

from timesformer_jax import storage
from timesformer_jax.benchmark import report
from timesformer_jax.benchmark.machine import machine
from timesformer_jax.benchmark.model import best_row, search_batch_sizes
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.costs import macs
from timesformer_jax.timing import spread

BASE = {
    "num_classes": 400, "image_size": 224, "num_frames": 8, "patch_size": 16, "hidden_size": 768,
    "depth": 12, "num_heads": 12,
}  # fmt: skip
DEMO = {  # configs/demo.py
    "num_classes": 8, "image_size": 32, "num_frames": 8, "patch_size": 8, "hidden_size": 64,
    "depth": 3, "num_heads": 4,
}  # fmt: skip


class Workload(NamedTuple):
    """kind: "inference" or "training"; batches: the batch size on a CPU, the first one on a GPU."""

    kind: str
    model: dict[str, Any]
    batches: dict[str, int]


WORKLOADS = {
    "base_inference": Workload("inference", BASE, {"cpu": 1, "cuda": 16}),
    "base_training": Workload("training", BASE, {"cpu": 1, "cuda": 16}),
    "demo_training": Workload("training", DEMO, {"cpu": 32, "cuda": 256}),
}
OURS, AS_IS = "ours", "transformers"
FASTEST = Options(bfloat16=True, rounded=True, sdpa=True, compiled=True, fused=True)
CONTENDERS = {
    "cpu": {
        OURS: None,
        AS_IS: Options(),
        "transformers, SDPA": Options(sdpa=True),
        "transformers, SDPA, compiled, fused": Options(sdpa=True, compiled=True, fused=True),
    },
    "cuda": {
        OURS: None,
        AS_IS: Options(),
        "transformers, bfloat16": Options(bfloat16=True),
        "transformers, bfloat16, compiled": Options(bfloat16=True, compiled=True),
        "transformers, bfloat16, SDPA, compiled, fused": FASTEST,
    },
}
# The largest difference that rounding explains, relative to the largest output, by device.
TOLERANCE = {"cpu": 1e-3, "cuda": 5e-2}
KINDS = {"cpu": ("wall", "cpu"), "cuda": ("wall",)}
MEMORY_SHARE = 0.4  # of two frameworks; the rest is for the weights of waiting contenders
# The share of the time for compiling and finding batch sizes; on a CPU turns have to wait.
SEARCH_SHARE = {"cpu": 0.5, "cuda": 0.85}
GRACE = 60.0  # seconds that a turn may take beyond the end

SELECTED = flags.DEFINE_list("workloads", list(WORKLOADS), f"some of {', '.join(WORKLOADS)}")
DEVICE = flags.DEFINE_enum("device", "cpu", list(CONTENDERS), "the device to run on")
ONLY = flags.DEFINE_list("contenders", None, "numbers of contenders from 1 on; by default all")
BATCHES = flags.DEFINE_list("batch_sizes", None, "batch sizes to try, instead of the workload's")
THREADS = flags.DEFINE_integer("threads", 2, "CPU threads of each contender", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "turns of each contender", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 1.0, "least length of a turn", lower_bound=0.0)
MINUTES = flags.DEFINE_float("minutes", 30.0, "no batch size or round starts later")
JSON = flags.DEFINE_string("json", None, "file for the figures; other workloads in it are kept")


def main(_: Sequence[str]) -> None:
    unknown = [name for name in SELECTED.value if name not in WORKLOADS]
    if unknown:
        sys.exit(f"error: --workloads has no {unknown[0]!r}; there are: {', '.join(WORKLOADS)}")
    storage.check_output("--json", JSON.value)
    os.environ["JAX_PLATFORMS"] = DEVICE.value
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(MEMORY_SHARE)
    ends = time.monotonic() + 60 * MINUTES.value
    for i, name in enumerate(SELECTED.value):
        # Each workload gets an equal share of the remaining time.
        share = (ends - time.monotonic()) / (len(SELECTED.value) - i)
        figures = race(WORKLOADS[name], time.monotonic() + share)
        print(f"\n{name}\n{as_text(figures)}\n", flush=True)
        keep(name, figures)


def keep(name: str, figures: dict[str, Any]) -> None:
    """Writes the figures of a workload to the file, which keeps those of other workloads."""
    if JSON.value is not None:
        path = pathlib.Path(JSON.value)
        workloads = json.loads(path.read_text()) if path.exists() else {}
        report.write(JSON.value, workloads | {name: figures})


def race(workload: Workload, ends: float) -> dict[str, Any]:
    """The figures of a workload, as JSON values.

    Args:
      ends: the end, by `time.monotonic`; SEARCH_SHARE of the time is for finding batch sizes.
    """
    searched = time.monotonic() + SEARCH_SHARE[DEVICE.value] * (ends - time.monotonic())
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            workload.kind, workload.model, folder, DEVICE.value, THREADS.value, MEMORY_SHARE
        )
        with running(task) as runners:
            rows = all_ready(runners, workload.batches[DEVICE.value], searched, ends)
            compare(rows, TOLERANCE[DEVICE.value])
            rounds = take_turns(runners, rows, ROUNDS.value, ends)
            if not any(rounds.values()):
                sys.exit("error: no round was finished: others need the processor, or --minutes")
            about = {}
            for name in rounds:
                about |= runners[name].ask("about", until=ends + GRACE)
    return {
        "machine": machine(),
        "device": DEVICE.value,
        "versions": about,
        "threads": THREADS.value if DEVICE.value == "cpu" else None,
        "kind": workload.kind,
        "model": workload.model,
        "gmacs": macs(TimeSformerConfig(**workload.model)) / 1e9,
        "rounds": len(next(iter(rounds.values()))),
        "tolerance": TOLERANCE[DEVICE.value],
        "contenders": summary(workload, rows, rounds, KINDS[DEVICE.value]),
    }


@contextmanager
def running(task: Task) -> Iterator[dict[str, Runner]]:
    """Starts the processes of the contenders, after the weights that they share are written."""
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=write_weights, args=(task.model, task.folder))
    writer.start()
    writer.join()
    if writer.exitcode:
        sys.exit("error: no weights were written; the race needs torch and transformers")
    chosen = list(CONTENDERS[DEVICE.value].items())
    if ONLY.value:
        chosen = [chosen[i - 1] for i in report.numbers("contenders", ONLY.value)]
    runners = {}
    try:
        for name, options in chosen:
            runners[name] = Runner(task, options)
        yield runners
    finally:
        for runner in runners.values():
            runner.close()


def write_weights(model: dict[str, Any], folder: str) -> None:
    from contender_transformers import write_weights

    write_weights(model, folder)


def all_ready(
    runners: dict[str, Runner], batch: int, until: float, ends: float
) -> dict[str, dict[str, Any]]:
    """The rows of `ready`, by contender. Each gets an equal share of the remaining time.

    Contenders that compile nothing come first, and leave the time that they do not need to others.
    """
    rows = {}
    for name in sorted(runners, key=lambda name: _compiles(CONTENDERS[DEVICE.value][name])):
        now = time.monotonic()
        share = (until - now) / (len(runners) - len(rows))
        rows[name] = ready(runners[name], batch, now + share, ends)
    return {name: rows[name] for name in runners}


def _compiles(options: Options | None) -> bool:
    return options is None or options.compiled


def ready(runner: Runner, batch: int, until: float, ends: float) -> dict[str, Any]:
    """The row of a contender at its best batch size, with the sizes tried; or why it cannot run.

    Args:
      batch: the batch size on a CPU; the first one that is tried on a GPU.
      until: no batch size is started later.
      ends: a batch size that was started is given up then.
    """
    began = {}

    def measure(batch: int) -> dict[str, Any]:
        row = {"batch_size": batch}
        if time.monotonic() > until:
            return row | report.NO_TIME_LEFT
        try:
            began[batch] = runner.ask("begin", batch, until=ends)
            rate = batch / runner.ask("turn", SECONDS.value, until=ends)["wall"]
        except Lost as e:
            return row | {"status": "failed", "reason": str(e)}
        return row | {"status": "measured", "clips_per_second": {"wall": rate}}

    sizes = report.numbers("batch_sizes", BATCHES.value) if BATCHES.value else None
    if sizes is None and DEVICE.value == "cpu":
        sizes = [batch]
    tried = list(search_batch_sizes(measure, sizes, start=batch))
    best = best_row(tried)
    if best is None:
        return {"tried": tried}
    batch = best["batch_size"]
    if batch != tried[-1]["batch_size"]:
        try:
            runner.ask("begin", batch, until=ends)
        except Lost as e:
            return {"tried": [*tried, best | {"status": "failed", "reason": str(e)}]}
    return {"tried": tried, "batch_size": batch} | began[batch]


def compare(rows: dict[str, dict[str, Any]], tolerance: float) -> None:
    """Adds to each row how much its outputs differ from those of transformers' unchanged model.

    Ends the program if rounding does not explain the difference.
    """
    reference = rows.get(AS_IS, {}).get("check")
    if reference is None:
        sys.exit(f"error: {AS_IS} as it is must run, to compare with: {rows.get(AS_IS)}")
    reference = np.asarray(reference)
    for name, row in rows.items():
        if "check" not in row:
            continue
        row["difference"] = float(np.abs(row.pop("check") - reference).max())
        row["difference"] /= float(np.abs(reference).max())
        if not row["difference"] <= tolerance:
            sys.exit(
                f"error: {name} computes something else than {AS_IS}: its outputs differ by "
                f"{row['difference']:.2g} of the largest, more than {tolerance}"
            )


def take_turns(
    runners: dict[str, Runner], rows: dict[str, dict[str, Any]], rounds: int, ends: float
) -> dict[str, list[dict[str, Any]]]:
    """The turns of each contender, round by round; each round starts with another contender.

    On a CPU a turn waits until no other process needs the cores, and is repeated if one did. An
    unfinished round does not count. A contender that fails does not count either, and its row says
    why.
    """
    names = [name for name, row in rows.items() if "batch_size" in row]
    turns = {name: [] for name in names}
    for i in range(rounds):
        first, taken = i % max(len(names), 1), {}
        for name in names[first:] + names[:first]:
            try:
                taken[name] = take_turn(runners[name], ends)
            except Lost as e:
                row = {"batch_size": rows[name]["batch_size"], "status": "failed", "reason": str(e)}
                rows[name] = {"tried": [*rows[name]["tried"], row]}
                names.remove(name)
                del turns[name]
                continue
            if taken[name] is None:
                return turns
        for name in names:
            turns[name].append(taken[name])
    return turns


def take_turn(runner: Runner, ends: float) -> dict[str, Any] | None:
    """Seconds of a step and the rate of the product; None if the machine was busy until the end."""
    spare = spare_cores(THREADS.value)
    while time.monotonic() < ends:
        if DEVICE.value == "cpu" and busy_cores(0.5) > spare:
            continue
        others = Others(runner.pid)
        step = runner.ask("turn", SECONDS.value, until=ends + GRACE)
        gemm = runner.ask("gemm", 0.2, until=ends + GRACE)
        turn = {"step": step, "gemm": gemm, "others": others.cores()}
        if DEVICE.value != "cpu" or turn["others"] <= spare:
            return turn
    return None


def summary(
    workload: Workload,
    rows: dict[str, dict[str, Any]],
    turns: dict[str, list[dict[str, Any]]],
    kinds: Sequence[str],
) -> list[dict[str, Any]]:
    """A row for each contender: clips a second, share of the product's rate, our rate over its.

    Args:
      rows: the rows of `ready`, by contender.
      turns: the turns of `take_turns`, by contender.
      kinds: the kinds of seconds: "wall" and, on a CPU, "cpu", the time of one core.
    """
    flops = (2 if workload.kind == "inference" else 6) * macs(TimeSformerConfig(**workload.model))
    # The product of the fastest framework: it is the same product for all.
    products = {
        kind: max(spread([t["gemm"][kind] for t in turns[name]])["median"] for name in turns)
        for kind in kinds
    }
    found = []
    for name, row in rows.items():
        row = {"name": name} | row
        if name in turns:
            rates = {
                kind: [row["batch_size"] / turn["step"][kind] for turn in turns[name]]
                for kind in kinds
            }
            row["clips_per_second"] = {kind: spread(rates[kind]) for kind in kinds}
            row["others_cores"] = max(turn["others"] for turn in turns[name])
            row["product"] = products
            row["product_share"] = {
                kind: flops * row["clips_per_second"][kind]["median"] / products[kind]
                for kind in kinds
            }
            if OURS in turns:
                row["ours_is_faster"] = {
                    kind: spread([
                        rows[OURS]["batch_size"] / ours["step"][kind] / rate
                        for ours, rate in zip(turns[OURS], rates[kind])
                    ])
                    for kind in kinds
                }  # fmt: skip
        found.append(row)
    return found


def as_text(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    host, rows = figures["machine"], figures["contenders"]
    products = next((row["product"] for row in rows if "product" in row), {})
    measured = ", ".join(f"{report.tera(rate)} TFLOP/s ({kind})" for kind, rate in products.items())
    lines = [
        f"{host['processor']}, {host['cores']} cores, load {host['load_average']:.1f}; "
        + ", ".join(f"{name} {value}" for name, value in figures["versions"].items()),
        f"{figures['kind']}, {figures['gmacs']:.2f} GMACs a clip, {figures['rounds']} rounds; "
        f"large product {measured}",
        f"{'':<47}{'batch':>18}  {'clips/s':<22}{'product':>8}  {'ours is faster':<20}",
    ]
    for row in rows:
        if "clips_per_second" not in row:
            lines.append(f"{row['name']:<47}  {row['tried'][-1]['reason']}")
            continue
        start = f"{row['name']:<47}{report.batch(row):>18}"
        for kind, rate in row["clips_per_second"].items():
            ratio = (
                report.median_and_range(row["ours_is_faster"][kind])
                if "ours_is_faster" in row
                else ""
            )
            share = f"{row['product_share'][kind]:>8.0%}"
            lines.append(f"{start}  {report.median_and_range(rate):<22}{share}  {ratio}")
            start = f"{'  in a second of a core':<65}"
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
