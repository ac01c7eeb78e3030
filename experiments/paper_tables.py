"""The rows of the paper's tables and figures, and of ablations that it lacks, as config changes.

`experiments/run.py` runs them. A row is a config with arguments: the demo's at the demo's scale, a
recipe of the paper's data at the paper's. What the paper prints stands beside it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

TASKS = {"motion", "appearance"}
# Registers the schemes of the ablations: for TIMESFORMER_IMPORT.
ABLATED_SCHEMES = pathlib.Path(__file__).with_name("ablated_schemes.py").resolve()


class Row(NamedTuple):
    """A model to train.

    Attributes:
      name: unique; a row that two tables share is trained once.
      arguments: of the config, at the paper's scale ("attention=joint"); None if the row is not
        there.
      demo: the same at the demo's scale.
      fields: of the config, set after the arguments, at both scales.
      start: at the demo's scale, the row from whose checkpoint it starts.
      published: top-1 in percent as the paper prints it, by recipe.
    """

    name: str
    arguments: str | None = ""
    demo: str | None = ""
    fields: Mapping[str, Any] = {}
    start: str = ""
    published: Mapping[str, str] = {}


class Table(NamedTuple):
    """Rows that are compared.

    Attributes:
      title: what varies, and where the paper has it.
      rows: each is compared with the first.
      tasks: of the embedded data, names in `TASKS`.
      recipes: of the paper's data.
      axis: what a figure is drawn against; "" for a table.
      lines: of a figure: for each line's name the values of the axis, and the row at each.
    """

    title: str
    rows: tuple[Row, ...]
    tasks: tuple[str, ...] = ("motion", "appearance")
    recipes: tuple[str, ...] = ("k400_base", "ssv2_base")
    axis: str = ""
    lines: Mapping[str, Mapping[float, str]] = {}


# ---- rows ----------------------------------------------------------------------------------------


def _published(k400: str, ssv2: str = "") -> dict[str, str]:
    return {"k400_base": k400, "ssv2_base": ssv2}


def _same(name: str, arguments: str, published: Mapping[str, str] = {}, **fields: Any) -> Row:
    """A row that is the same at both scales."""
    return Row(name, arguments, arguments, fields, published=published)


def _scheme(name: str, k400: str = "", ssv2: str = "") -> Row:
    return _same(name, f"attention={name}", _published(k400, ssv2))


DIVIDED = Row("divided", published=_published("78.0", "59.5"))
SPACE = _scheme("space", "76.9", "36.6")
SPACE_THEN_TIME = _scheme("space_then_time", "77.5")
IMAGE = Row("image model", None, "attention=space,frames=1")
SHARES = (0.25, 0.5, 0.75)


def _longer(scheme: str) -> Row:
    return Row(
        f"{scheme}, 1,026 steps", None, f"attention={scheme}", {"epochs": 9, "batch_size": 28}
    )


def _share(scheme: str, share: float) -> Row:
    return _same(
        f"{scheme}, {share:.0%} of the videos", f"attention={scheme},train_fraction={share}"
    )


def _frames(paper: int, demo: int) -> Row:
    return Row(f"{paper} frames ({demo})", f"frames={paper}", f"frames={demo}")


def _crop(paper: int, demo: int) -> Row:
    return Row(f"{paper} pixels ({demo})", f"crop={paper}", f"crop={demo}")


FRAMES = {2: _frames(2, 2), 4: _frames(4, 4), 16: _frames(32, 16)}
CROPS = {16: _crop(112, 16), 24: _crop(160, 24), 40: _crop(448, 40)}

TABLES = {
    "table1": Table(
        "Attention schemes (table 1; section 4.1 for the order of space and time)",
        (
            DIVIDED, SPACE,
            _scheme("joint", "77.4", "58.5"),
            _scheme("local_global", "75.9", "56.3"),
            _scheme("axial", "73.5", "56.2"),
            SPACE_THEN_TIME,
            _scheme("parallel", "77.6"),
            _scheme("time"),
        ),
    ),
    "longer": Table(
        "Attention schemes on motion after 1,026 steps",
        tuple(
            _longer(scheme)
            for scheme in (
                "divided", "joint", "local_global", "axial", "space_then_time", "parallel", "time",
            )
        ),
        tasks=("motion",),
        recipes=(),
    ),
    "table2": Table(
        "Where training starts (table 2; section 4.2)",
        (
            DIVIDED, IMAGE,
            Row("divided, from the image model", None, "", start=IMAGE.name),
            Row("no_temporal_fc, from the image model", None, "attention=no_temporal_fc",
                start=IMAGE.name),
            Row("ImageNet-1K", "init=imagenet1k", None, published=_published("75.8")),
            Row("from scratch", "init=scratch", None, published=_published("64.8")),
        ),
    ),
    "table4": Table(
        "Position embeddings (table 4)",
        (
            DIVIDED,
            _same("positions in space", "position_embedding=space", _published("77.8", "52.5")),
            _same("no positions", "position_embedding=none", _published("75.4", "45.8")),
        ),
    ),
    "figure4": Table(
        "Accuracy by the share of the training videos (figure 4)",
        (DIVIDED, SPACE, *(_share(scheme, s) for scheme in ("divided", "space") for s in SHARES)),
        axis="share of the training videos",
        lines={
            scheme: {s: _share(scheme, s).name for s in SHARES} | {1.0: scheme}
            for scheme in ("divided", "space")
        },
    ),
    "figure5": Table(
        "Accuracy by frames and by pixels (figure 5)",
        (DIVIDED, *FRAMES.values(), *CROPS.values()),
        axis="frames, or side in pixels",
        lines={
            name: {x: row.name for x, row in rows.items()} | {own: "divided"}
            for name, rows, own in (("frames", FRAMES, 8), ("side", CROPS, 32))
        },
    ),
    "sizes": Table(
        "Size of the model and of the patches (section 4.2, K400)",
        (
            DIVIDED,
            Row("small", "backbone=vit_s", None, published=_published("about 73")),
            Row("large", "backbone=vit_l", None, published=_published("about 77")),
            Row("patches of 32", "patch_size=32", None, published=_published("about 75")),
            Row("half the channels", None, "", {"model.hidden_size": 32, "model.num_heads": 2}),
            Row("twice the channels", None, "", {"model.hidden_size": 128, "model.num_heads": 8}),
            Row("twice the blocks", None, "", {"model.depth": 6}),
            Row("patches of twice the side", None, "", {"model.patch_size": 16}),
        ),
        recipes=("k400_base",),
    ),
    "ablations": Table(
        "Parts of divided attention, each changed alone (not in the paper)",
        (
            DIVIDED,
            _scheme("no_temporal_fc"),
            _scheme("half_width_time"),
            _scheme("token_in_time"),
            SPACE_THEN_TIME,
            _scheme("time_in_every_second"),
            _scheme("space_in_every_second"),
            Row("drop path 0.1", None, "", {"model.drop_path": 0.1}),
            Row("no drop path", "", None, {"model.drop_path": 0.0}),
        ),
    ),
}  # fmt: skip

ROWS = {row.name: row for table in TABLES.values() for row in table.rows}
