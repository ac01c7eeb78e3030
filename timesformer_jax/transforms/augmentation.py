"""Which augmentations training applies: their names, ranges and meaning. Needs no JAX."""

from __future__ import annotations

import dataclasses
import math

from timesformer_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Which augmentations training applies, in this order; all are off by default.

    Attributes:
      color_jitter: strengths s of brightness, contrast, saturation and hue, in this order. The
        first three are scaled by a random factor from [max(0, 1 - s), 1 + s]; the hue is rotated by
        up to s of a whole turn (at most 0.5) in either direction.
      grayscale: probability that a clip is turned to grey.
      randaugment_layers: number of operations for each clip, N of RandAugment (arXiv 1909.13719).
      randaugment_magnitude: strength of these operations, 0 to 10, M of RandAugment.
      erasing: probability that a box is filled with the mean colour, the same in all frames
        (Random Erasing, arXiv 1708.04896).
      label_smoothing: share of a label that is spread over all classes (arXiv 1512.00567).
      mixup: alpha of mixup (arXiv 1710.09412); 0 for none.
      cutmix: alpha of CutMix (arXiv 1905.04899); 0 for none. If mixup is on too, each clip gets one
        of the two, with probability 1/2 each.

    Raises:
      InputError: for a value out of its range.
    """

    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    grayscale: float = 0.0
    randaugment_layers: int = 0
    randaugment_magnitude: float = 9.0
    erasing: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self):
        # JSON and configs hold lists; hashing needs a tuple.
        object.__setattr__(self, "color_jitter", tuple(self.color_jitter))
        jitter = self.color_jitter
        numbers = all(isinstance(s, int | float) and 0 <= s < math.inf for s in jitter)
        if not numbers or len(jitter) != 4 or jitter[3] > 0.5:
            raise InputError(
                "augment.color_jitter must be four strengths of at least 0 (brightness, contrast, "
                f"saturation, hue), the hue's at most 0.5; not {jitter}"
            )
        most = {
            "grayscale": 1, "randaugment_layers": 14, "randaugment_magnitude": 10, "erasing": 1,
            "label_smoothing": 1, "mixup": 1000, "cutmix": 1000,
        }  # fmt: skip
        for name, bound in most.items():
            if not 0 <= (value := getattr(self, name)) <= bound:
                raise InputError(f"augment.{name} must be from 0 to {bound}, not {value}")

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed with one another."""
        return bool(self.mixup or self.cutmix)

    @property
    def distorts(self) -> bool:
        """Whether the pixels of single clips change."""
        return bool(
            any(self.color_jitter) or self.grayscale or self.randaugment_layers or self.erasing
        )

    @property
    def on(self) -> bool:
        """Whether anything is changed at all."""
        return self.distorts or self.mixes or bool(self.label_smoothing)


OFF = Augmentation()
