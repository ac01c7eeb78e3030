"""TimeSformer in JAX and Flax (arXiv 2102.05095).

import timesformer_jax as tsf
model = tsf.create("timesformer_base", num_classes=400)
logits = model(video)  # (batch, frames, height, width, 3), normalised, to (batch, classes)
"""

from timesformer_jax.convert import from_pretrained
from timesformer_jax.errors import InputError
from timesformer_jax.models.presets import PRESETS, create, preset
from timesformer_jax.models.timesformer import TimeSformer, TimeSformerConfig

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "InputError",
    "TimeSformer",
    "TimeSformerConfig",
    "create",
    "from_pretrained",
    "preset",
]
