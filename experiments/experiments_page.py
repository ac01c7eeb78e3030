"""docs/experiments.md and its pictures, from the results in docs/experiments.json."""

from __future__ import annotations

import json

import long_task
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from docs_tables import DOCS, markdown_table
from paper_tables import TABLES, Row, Table

from timesformer_jax import storage

RESULTS, PAGE = DOCS / "experiments.json", DOCS / "experiments.md"
COLOURS = {"motion": "tab:blue", "appearance": "tab:orange"}
PAPERS = {"k400_base": "paper, K400", "ssv2_base": "paper, SSv2"}

INTRODUCTION = """# The paper's tables in small

<!-- Written by experiments/run.py from experiments.json; change it there. -->

Each table has the rows of the paper's, and beside what the paper prints what the same change does
here. **The data differ.** The paper trains 121 M parameters on 240,000 videos of Kinetics or
169,000 of Something-Something; here 0.2 M parameters see 3,200 videos of 48 x 40 pixels, in a
minute of one CPU core. What carries over is the direction of a difference, where the task asks for
the ability that the change takes away. The sizes of differences, and what large models and image
pretraining gain, do not.

Two tasks, both of real H.264 videos made of photographs:

- **motion**: a patch moves in one of 8 directions. Neither one frame nor unordered frames show it.
- **appearance**: one of 8 photographs, drawn small, moves across another one. Its direction goes
  with its class in half of the training videos and never in validation, so that a model which
  relies on motion is wrong.

Each row trains for 369 steps on motion, 342 on appearance. That is where a tiny model begins to see
motion, and the seed decides when: divided attention reached 94, 92 and 67%. So on motion three
seeds show large differences only, and a row that is low may learn it later: the second table has
nearly three times the steps.

Figure 3 is in [benchmarks.md](benchmarks.md), with times.

Top-1 in percent of 800 validation videos, one centre crop of one clip each: the mean of the seeds,
and the smallest and the largest. Each row is compared with the first of its table, for each task,
by two tests. *p, videos* is that of these very models: whether they are right equally often, by a
paired permutation test over the videos. *p, seeds* asks whether other seeds would differ too, by a
paired t-test over the seeds; three of them show large differences alone. Of many comparisons one in
twenty is below 0.05 by chance.

    .venv/bin/python experiments/run.py all          # trains what has no result yet

    make .venv-tpu/installed                         # the commands of the paper's runs, with hours
    .venv-tpu/bin/python experiments/run.py table1 --scale=paper
"""

LONG = """## Length of a clip against the number of clips (table 8; section 4.6)

The paper on HowTo100M, top-1; the clips do not overlap and together cover the video:

| frames of a clip | seconds of a clip | clips of a video | SlowFast | TimeSformer |
| ---: | ---: | ---: | ---: | ---: |
| 8 | 8.5 | 48 | 48.2 | 56.8 |
| 32 | 34.1 | 12 | 50.8 | 61.2 |
| 64 | 68.3 | 6 | 51.5 | 62.2 |
| 96 | 102.4 | 4 | 51.2 | 62.6 |

Here, on three-minute videos whose class is two events at least two minutes apart
([long-clips.md](long-clips.md) describes them), 540 validation videos of three classes:
"""

LONG_NOTE = """
The paper's gain from long clips is a few points; what they see that short ones do not is not told.
Here it is everything: a clip that does not hold both events says nothing of the class, and no
average of such clips does. Averaging more clips does not replace a longer one.
"""

OTHERS = """## Other methods, as the paper prints them

K400 (table 2): I3D 8x8 R50 71.0 after 444 V100 hours, 73.4 after 1,440; SlowFast R50 70.0 after
448, 75.6 after 3,840, 76.4 from scratch after 6,336; TimeSformer 75.8 (ImageNet-1K) and 78.0
(ImageNet-21K) after 416. "TFLOPs", multiply-accumulates of three crops: I3D 1.11, SlowFast 1.97,
TimeSformer 0.59. Diving-48 (table 7): SlowFast R101 77.6, trained by the paper's authors since the
labels of earlier results were faulty; TimeSformer 74.9, HR 78.0, L 81.0.
"""

# What the rows of a table say, and why, where they differ from the paper's.
NOTES = {
    "table1": """
As in the paper, space alone is at chance where the order of frames decides, and as good as any
where it does not; `local_global` and `axial` are behind on appearance. Divided attention and
`parallel` see motion first; which of the two is not shown. Unlike the paper, joint attention,
`local_global` and space before time are near chance on motion. They have not begun to learn it, on
the training videos neither: see the next table.

On appearance space, joint and space before time are 3 to 4 points above divided: what sees motion
is misled by it. Three seeds do not show that for other seeds. The paper's K400, where appearance
decides too, has the order reversed by 1 point, after training on images.
""",
    "longer": """
All seeds of divided attention, `parallel` and space before time see motion after these steps, and
two of three of `axial`: between them the table above shows who begins first, no more. Joint
attention and `local_global` are at a third at most, in the paper 1 and 3 points below divided on
SSv2. A temporal sequence of divided attention has 8 patches of one place; joint attention must find
the same place among 128 patches, which a model this small, without image pretraining, finds later,
if at all. Time alone never compares two places of a frame, and reaches half.
""",
    "table2": """
The image model is trained on single frames of the same videos. On appearance that is a good start,
as in the paper, and more so with the zero-initialised `temporal_fc`, which keeps the image model's
features at first. On motion it can learn nothing from one frame, is at chance, and a start from it
is worse than none, with `temporal_fc` and without.
""",
    "table4": """
Without positions in time the frames have no order, and a direction looks like its opposite: at most
50% of the motion task, by construction. All six runs are there. Positions in space change nothing
here: a patch that moves is seen by its pixels. Appearance needs no positions. The paper lost 13.7
points on SSv2 without any, 2.6 on K400.
""",
    "figure4": """
Fewer videos are fewer steps too, as in the paper's recipe of a fixed number of epochs. On motion
more videos help divided attention alone, as on SSv2; on appearance both.
""",
    "figure5": """
Appearance gains from frames up to 8 and from pixels up to 32 x 32. On motion the seeds differ more
than the sizes do: 4 frames are as good as 8 or better, and neither more frames nor more than 24
pixels help in these steps. The paper's curves rise to the end, with 96 frames.
""",
    "sizes": """
More channels help, more blocks do not in these steps, and patches of twice the side cost most, as
patches of 32 do in the paper.
""",
    "ablations": """
Time before space is what the paper chose, and matters most here: the other order begins to see
motion later. So it is with a class token that joins temporal attention. Without `temporal_fc`,
which the release has and the paper does not name, and with temporal attention in the first and
third of the three blocks only, the lowest of three seeds reached 80 and 88% on motion, and 67% with
the whole; that may be chance. `temporal_fc` has its use where training starts from an image model
(table 2). Half the width of temporal attention costs 6 points on appearance.
""",
}

Results = dict[str, dict]  # by "task/row/seed"


def read() -> Results:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(results: Results) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(run)}" for key, run in sorted(results.items())]
    storage.write_atomically(RESULTS, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def write() -> None:
    """Writes the page with the tables of which there are results, and draws the figures."""
    results, page = read(), [INTRODUCTION]
    for name, table in TABLES.items():
        if any(_runs(results, task, row.name) for task in table.tasks for row in table.rows):
            page += [f"## {table.title}", _table(table, results)]
            if table.lines:
                _draw(table, results, name)
                page.append(f"![{table.title}](experiments_{name}.png)")
            page += [NOTES[name].strip()] if name in NOTES else []
    page += [LONG, _long_table(), LONG_NOTE, OTHERS]
    storage.write_atomically(PAGE, "\n\n".join(part.strip() for part in page).encode() + b"\n")


def _runs(results: Results, task: str, name: str) -> list[dict]:
    """The runs of a row, in the order of their seeds."""
    found = {key: run for key, run in results.items() if key.rpartition("/")[0] == f"{task}/{name}"}
    return [found[key] for key in sorted(found)]


def _table(table: Table, results: Results) -> str:
    head = [
        "row",
        *(PAPERS[recipe] for recipe in table.recipes),
        *(f"{task}, top-1" for task in table.tasks),
    ]
    head += ["p, videos", "p, seeds", "parameters", "MMACs, one view"]
    lines = [_line(row, table, results) for row in table.rows]
    return markdown_table(head, lines, words=1)


def _line(row: Row, table: Table, results: Results) -> list[str]:
    of_tasks = [_runs(results, task, row.name) for task in table.tasks]
    firsts = [_runs(results, task, table.rows[0].name) for task in table.tasks]
    tests = ["", ""]
    if row.name != table.rows[0].name and any(of_tasks):
        tests = [
            "; ".join(_shown(test(*pair)) for pair in zip(of_tasks, firsts))
            for test in (_p_of_videos, _p_of_seeds)
        ]
    costs = ["", ""]
    if runs := next(filter(None, of_tasks), None):
        costs = [f"{runs[0]['parameters']:,}", f"{runs[0]['macs'] / 1e6:.1f}"]
    published = [row.published.get(recipe, "") for recipe in table.recipes]
    return [row.name, *published, *map(_accuracy, of_tasks), *tests, *costs]


def _accuracy(runs: list[dict]) -> str:
    return _spread([run["top1"] for run in runs]) if runs else ""


def _spread(top1: list[float]) -> str:
    """Mean in percent and, of several seeds, the smallest and the largest."""
    spread = f" ({100 * min(top1):.1f} to {100 * max(top1):.1f})" if len(top1) > 1 else ""
    return f"{100 * np.mean(top1):.1f}{spread}"


def _p_of_videos(runs: list[dict], others: list[dict]) -> float | None:
    """That the models of two rows are right equally often, by a paired permutation test.

    Of each video it takes the share of the seeds that are right. None without runs.
    """
    seeds = min(len(runs), len(others))
    if not seeds:
        return None
    ours, theirs = (np.mean([_right(run) for run in r[:seeds]], axis=0) for r in (runs, others))
    if np.array_equal(ours, theirs):
        return 1.0
    test = scipy.stats.permutation_test(
        (ours - theirs,), np.mean, permutation_type="samples", n_resamples=9999, vectorized=True,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(test.pvalue)


def _p_of_seeds(runs: list[dict], others: list[dict]) -> float | None:
    """That two rows have the same mean over all seeds, by a paired t-test. None below 3 seeds."""
    seeds = min(len(runs), len(others))
    ours, theirs = ([run["top1"] for run in r[:seeds]] for r in (runs, others))
    if seeds < 3 or np.ptp(np.subtract(ours, theirs)) == 0:
        return None
    return float(scipy.stats.ttest_rel(ours, theirs).pvalue)


def _shown(p: float | None) -> str:
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _right(run: dict) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(run["right"]), np.uint8))
    return bits[: run["videos"]].astype(float)


def _long_table() -> str:
    """Of docs/long_task.json: mean, smallest and largest accuracy of the seeds."""
    head = ["model", "frames of a clip", "seconds of a clip", "clips averaged", "top-1"]
    cells = [
        [line.name, line.frames, f"{line.span:.0f}", line.views, _spread(line.top1)]
        for line in long_task.lines_of(json.loads(long_task.FIGURES.read_text()))
    ]
    return markdown_table(head, cells, words=1)


def _draw(table: Table, results: Results, name: str) -> None:
    figure, axes = plt.subplots(1, len(table.lines), figsize=(5 * len(table.lines), 3.4),
                                sharey=True, squeeze=False, layout="constrained")  # fmt: skip
    for axis, (title, rows) in zip(axes[0], table.lines.items()):
        for task in table.tasks:
            found = {x: _runs(results, task, row) for x, row in sorted(rows.items())}
            points = {x: [100 * run["top1"] for run in runs] for x, runs in found.items() if runs}
            axis.plot(list(points), [np.mean(y) for y in points.values()], color=COLOURS[task],
                      label=task)  # fmt: skip
            for x, y in points.items():
                axis.plot([x] * len(y), y, ".", color=COLOURS[task])
        axis.set(title=title, xlabel=table.axis, ylim=(0, 100), xticks=sorted(rows))
    axes[0][0].set_ylabel("top-1, %")
    axes[0][0].legend(loc="lower right")
    figure.savefig(DOCS / f"experiments_{name}.png", dpi=110)
    plt.close(figure)
