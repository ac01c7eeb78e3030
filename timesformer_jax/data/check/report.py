"""What the checks of videos and of prepared directories have in common."""

from collections.abc import Sequence

from timesformer_jax.data.annotations import clip_hash


def is_decoded(clip_id: str, fraction: float) -> bool:
    """Whether a clip belongs to the fraction that is decoded: the same on every machine."""
    return int.from_bytes(clip_hash(clip_id)[:8]) < fraction * 2**64


def format_table(rows: Sequence[Sequence[object]]) -> str:
    """Formats rows as lines; the first column is aligned left, the others right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    )
