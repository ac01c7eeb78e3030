"""What a prepared directory holds, as text."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from timesformer_jax.data.check.report import format_table, is_decoded
from timesformer_jax.data.failures import count_failures
from timesformer_jax.data.layout import FAILURES_FILE
from timesformer_jax.data.records.split import Split

# Above this number of classes, only the SHOWN_CLASSES largest and smallest ones are shown.
MAX_CLASSES = 50
SHOWN_CLASSES = 5


def summarize(
    root: epath.Path,
    splits: Sequence[Split],
    used: Sequence[Split],
    num_bytes: Mapping[str, int],
    decode_fraction: float,
) -> str:
    """A table of the splits, and the number of clips of each class.

    Args:
      splits: as the shards have them.
      used: as training reads them.
      num_bytes: size of each shard, by its name.
      decode_fraction: fraction of the clips that were decoded.
    """
    failures = count_failures(root / FAILURES_FILE)
    rows: list[tuple[object, ...]] = [
        ("split", "clips", "records", "shards", "MB", "frames", "short side", "fps", "failed")
    ]
    for split in splits:
        size = sum(num_bytes[epath.Path(file).name] for file in split.files)
        rows.append(
            (
                split.name,
                len(np.unique(split.video)),
                len(split),
                len(split.files),
                f"{size / 1e6:.1f}",
                int(split.num_stored.sum()),
                _range(np.minimum(split.height, split.width)),
                _range(split.fps),
                "?" if failures is None else failures[split.name],
            )
        )
    decoded = sum(is_decoded(clip, decode_fraction) for s in splits for clip in s.ids.tolist())
    read = f"{root}: every record is read, and the frames of {decoded} are decoded"
    return "\n".join([read, format_table(rows), *map(class_histogram, used)])


def _range(values: np.ndarray) -> str:
    if not len(values):
        return "-"
    low, high = values.min(), values.max()
    return f"{low:.4g}" if low == high else f"{low:.4g}-{high:.4g}"


def class_histogram(split: Split) -> str:
    """The number of clips of each class in descending order; of many classes both ends."""
    counts = Counter({name: 0 for name in split.label_names})
    labels = split.label if split.targets is None else np.nonzero(split.targets)[1]
    counts.update(split.label_names[label] for label in labels if label < len(split.label_names))
    ranked = counts.most_common()
    used = [(name, count) for name, count in ranked if count]
    unused = [name for name, count in ranked if not count]
    lines = [f"{split.name}: {len(used)} of {len(ranked)} classes have clips"]
    if unused:
        lines.append(f"  no clip of: {', '.join(unused)}")
    shown = [f"{count:>8} {name}" for name, count in used]
    if len(shown) > MAX_CLASSES:
        shown[SHOWN_CLASSES:-SHOWN_CLASSES] = ["     ..."]
    return "\n".join(lines + shown)
