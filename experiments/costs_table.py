"""What every attention scheme and preset costs, beside the published figures.

    python experiments/costs_table.py

Prints the table and writes it into docs/attention.md. Takes seconds and no accelerator: the costs
are worked out from the configs (`timesformer_jax.models.costs`), and tests/test_costs.py holds
them to the traced programs. Ends with status 1 if a figure differs from the published one.
"""

from __future__ import annotations

import pathlib
import sys

from timesformer_jax.models.costs import comparisons, macs, parameter_count
from timesformer_jax.models.presets import preset
from timesformer_jax.models.schemes import SCHEMES

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "attention.md"
BEGIN, END = "<!-- costs_table.py: begin -->", "<!-- costs_table.py: end -->"

# (preset, scheme): parameters with 400 classes, in millions with 174, GMACs of one view, "TFLOPs".
# Measured on the release, or printed in the paper (tables 1 and 2, cut to one decimal there).
PUBLISHED = {
    ("timesformer_base", "divided"): ("121,566,352", "121.4", "195.83", "0.59"),
    ("timesformer_base", "joint"): ("86,112,400", "85.9", "179.56", ""),
    ("timesformer_base", "space"): ("86,106,256", "85.9", "140.50", ""),
    ("timesformer_base", "local_global"): ("", "121.4", "", ""),
    ("timesformer_base", "axial"): ("157,020,304", "156.8", "", ""),
    ("timesformer_hr", "divided"): ("122,024,080", "", "1702.69", "5.11"),
    ("timesformer_l", "divided"): ("121,633,936", "", "2379.86", "7.14"),
}
ROWS = [
    *(("timesformer_base", scheme) for scheme in SCHEMES),
    *((f"timesformer_{name}", "divided") for name in ("hr", "l", "vit_s", "vit_l", "p32")),
]


def row(name: str, scheme: str) -> tuple[list[str], list[str]]:
    """A line's cells, and those of its figures that differ from the published ones."""
    config = preset(name, attention=scheme)
    count = parameter_count(config)
    ssv2 = parameter_count(preset(name, attention=scheme, num_classes=174))
    products = macs(config)
    ours = (
        f"{count:,}",
        f"{ssv2 / 1e6:.1f}",
        f"{products / 1e9:.2f}",
        f"{3 * products / 1e12:.2f}",
    )
    published = PUBLISHED.get((name, scheme), ("",) * 4)
    wrong = [
        f"{name} {scheme}: {a}, published {b}" for a, b in zip(ours, published) if b not in ("", a)
    ]
    clip = f"{config.num_frames} x {config.image_size}"
    marked = [f"**{a}**" if b else a for a, b in zip(ours, published)]
    return [f"`{name}`", f"`{scheme}`", clip, f"{comparisons(config):,.6g}", *marked], wrong


def table() -> tuple[str, list[str]]:
    """The table in Markdown, and every figure that differs from the published one."""
    head = [
        "preset", "scheme", "clip", "comparisons a patch", "parameters (400 classes)",
        "M parameters (174)", "GMACs, one view", "TMACs, 3 crops (the paper's \"TFLOPs\")",
    ]  # fmt: skip
    rows, wrong = zip(*(row(*name) for name in ROWS))
    cells = [head, ["---"] * 3 + ["---:"] * 5, *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in cells)
    return text, [line for lines in wrong for line in lines]


def main() -> None:
    text, wrong = table()
    print(text)
    page = DOCS.read_text()
    before, rest = page.split(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    print(f"\nwritten to {DOCS}", file=sys.stderr)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
