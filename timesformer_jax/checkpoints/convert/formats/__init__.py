"""External checkpoint formats. A new one is a subclass of `Format` and an entry in `FORMATS`."""

from timesformer_jax.checkpoints.convert.formats.base import Format
from timesformer_jax.checkpoints.convert.formats.hf import HuggingFace
from timesformer_jax.checkpoints.convert.formats.hf_vit import HuggingFaceViT
from timesformer_jax.checkpoints.convert.formats.release import Release
from timesformer_jax.checkpoints.convert.formats.torchvision import Torchvision
from timesformer_jax.checkpoints.convert.formats.vit_jax import JaxViT

# In the order in which they are tried.
FORMATS: tuple[Format, ...] = (HuggingFace(), HuggingFaceViT(), JaxViT(), Torchvision(), Release())
