"""TimeSformer in JAX and Flax (arXiv 2102.05095).

import timesformer_jax as tsf
model = tsf.create("timesformer_base", num_classes=400)
logits = model(video)  # normalised (batch, frames, height, width, 3) -> (batch, classes)
"""

import importlib

__version__ = "0.1.0.dev0"

_MODULES = {
    "AttentionMap": "inference.results",
    "Features": "inference.results",
    "InputError": "errors",
    "PRESETS": "models.presets",
    "Prediction": "inference.results",
    "Predictor": "inference.predictor",
    "TimeSformer": "models.timesformer",
    "TimeSformerConfig": "models.config",
    "VideoError": "data.decode",
    "VideoTimeline": "inference.timeline.result",
    "create": "models.presets",
    "decode": "data.decode",
    "from_pretrained": "checkpoints.convert",
    "list_pretrained": "checkpoints.catalogue",
    "preset": "models.presets",
    "register_scheme": "models.schemes",
    "train": "training.loop",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str):
    # Imported on first use: processes that decode videos need no JAX, Flax or Orbax.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
