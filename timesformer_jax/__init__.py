"""TimeSformer in JAX and Flax (arXiv 2102.05095).

import timesformer_jax as tsf
model = tsf.create("timesformer_base", num_classes=400)
logits = model(video)  # (batch, frames, height, width, 3), normalised, to (batch, classes)
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "InputError": "errors",
    "PRESETS": "models.presets",
    "TimeSformer": "models.timesformer",
    "TimeSformerConfig": "models.config",
    "create": "models.presets",
    "from_pretrained": "checkpoints.convert",
    "preset": "models.presets",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    # On first use: the processes that decode videos need none of JAX, Flax and Orbax.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
