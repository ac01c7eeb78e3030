"""Attention of one clip: shares of its patches, and classes by name."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from timesformer_jax.errors import InputError, did_you_mean
from timesformer_jax.models.rollout import attention_rollout
from timesformer_jax.models.timesformer import TimeSformer, class_probabilities


def trace(
    model: TimeSformer, video: jax.Array, target: int | None, multilabel: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Traces the prediction of a clip back to its patches.

    Args:
      video: (1, T, S, S, 3) normalised.
      target: the class that attentions are weighted for; None for rollout.
      multilabel: whether a video has any number of the classes.

    Returns:
      (T, H', W') float32, the share of every patch: sums to 1, or all 0 where no gradient is
      positive; and the probabilities, (classes,) float32.
    """
    found = attention_rollout(model, video, None if target is None else np.array([target]))
    relevance, probabilities = jax.device_get(
        (found.patches, class_probabilities(found.logits, multilabel))
    )
    grid = [side // model.config.patch_size for side in video.shape[2:4]]
    relevance = relevance.reshape(-1, *grid)
    return relevance / max(relevance.sum(), np.finfo(np.float32).tiny), probabilities[0]


# Of a class number; Python refuses to read numbers of thousands of digits.
MAX_DIGITS = 20


def class_index(labels: Sequence[str], label: str | int) -> int:
    """The number of a class, from its name or its number.

    Raises:
      InputError: if there is no such class.
    """
    if label in labels:
        return labels.index(str(label))
    if (text := str(label)).isdecimal() and len(text) < MAX_DIGITS and int(text) < len(labels):
        return int(text)
    raise InputError(
        f"the checkpoint has no class {label!r:.60}{did_you_mean(str(label), labels)}; "
        f"its {len(labels)} classes have these names, or numbers from 0: "
        f"{', '.join(labels[:8])}{', ...' if len(labels) > 8 else ''}"
    )
