"""Draws what a patch attends to under each attention scheme: docs/schemes/*.svg.

    python experiments/scheme_drawings.py

A row is an attention of a block, a column a frame. The pattern is that of the layer's partition, by
which the model computes; tests/test_docs.py compares it with the gradient of the attention. Takes
no time and needs no accelerator.
"""

from __future__ import annotations

import numpy as np
from docs_tables import DOCS

from timesformer_jax.models.schemes import SCHEMES, AttentionLayer

FOLDER = DOCS / "schemes"
FRAMES, GRID = 4, (6, 6)
QUERY = (1, 2, 3)  # frame, row, column: off the middle, so that quarters and strides show
CELL, GAP, LEFT, TOP = 14, 14, 92, 22  # pixels; the left margin has the names of the attentions
COLOURS = {"other": "#e4e7ec", "key": "#f2a33a", "query": "#1d4f91"}
TEXT = 'font-family="sans-serif" font-size="12" fill="#333"'


def keys(layer: AttentionLayer) -> np.ndarray:
    """(T, H, W) booleans, the patches that the query attends to in a layer, itself included."""
    number = layer.partition(FRAMES, GRID).reshape(FRAMES, *GRID)
    return number == number[QUERY]


def drawing(scheme: str) -> str:
    """The SVG of a scheme: frames of patches for each of its attentions."""
    layers = SCHEMES[scheme].layers
    side = GRID[0] * CELL
    width = LEFT + (FRAMES + 1) * (side + GAP)
    height = TOP + len(layers) * (side + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for frame in range(FRAMES):
        x = LEFT + frame * (side + GAP)
        parts.append(f'<text x="{x}" y="15" {TEXT}>frame {frame + 1}</text>')
    for row, layer in enumerate(layers):
        y = TOP + row * (side + GAP)
        parts.append(f'<text x="4" y="{y + side // 2 + 4}" {TEXT}>{layer.name}</text>')
        parts += _cells(keys(layer), y)
        parts += _token(layer.joins_cls, LEFT + FRAMES * (side + GAP), y + side // 2)
    return "\n".join([*parts, "</svg>\n"])


def _cells(attended: np.ndarray, top: int) -> list[str]:
    """A square for each patch of each frame."""
    cells = []
    for (frame, row, column), is_key in np.ndenumerate(attended):
        kind = "query" if (frame, row, column) == QUERY else "key" if is_key else "other"
        x = LEFT + frame * (GRID[1] * CELL + GAP) + column * CELL
        cells.append(_square(kind, x, top + row * CELL))
    return cells


def _token(joins: bool, x: int, middle: int) -> list[str]:
    """The classification token, to the right of the frames."""
    return [
        _square("key" if joins else "other", x, middle - CELL // 2),
        f'<text x="{x + CELL + 4}" y="{middle + 4}" {TEXT}>token</text>',
    ]


def _square(kind: str, x: int, y: int) -> str:
    side = CELL - 1
    return f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="{COLOURS[kind]}"/>'


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for scheme in SCHEMES:
        path = FOLDER / f"{scheme}.svg"
        path.write_text(drawing(scheme))
        print(f"written: {path}")


if __name__ == "__main__":
    main()
