"""Training recipes as ml_collections configs, and the paper's ablations as their arguments."""

from timesformer_jax.recipes.ablations import ablate, with_arguments
from timesformer_jax.recipes.files import load
from timesformer_jax.recipes.recipes import (
    demo,
    demo_long,
    diving48,
    finetune,
    from_scratch_small,
    howto100m,
    image_vit,
    kinetics400,
    kinetics600,
    recipe,
    something_v2,
)

__all__ = [
    "ablate",
    "demo",
    "demo_long",
    "diving48",
    "finetune",
    "from_scratch_small",
    "howto100m",
    "image_vit",
    "kinetics400",
    "kinetics600",
    "load",
    "recipe",
    "something_v2",
    "with_arguments",
]
