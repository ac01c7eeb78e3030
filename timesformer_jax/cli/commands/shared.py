"""Flags that commands of several groups have."""

from __future__ import annotations

from timesformer_jax.cli.flags import integer, integer_or, string

CONFIG = string(
    "config",
    None,
    "recipe: its name, such as finetune or k400_base:ARGUMENT=VALUE,...; a config file of your"
    " own; or the recipe.json of a run. --config.FIELD=VALUE changes a field",
)
CHECKPOINT = string(
    "checkpoint",
    None,
    "a run's --workdir, WORKDIR/best or one step, a file, or a name; see docs/checkpoints.md",
)
CROPS = integer("crops", 3, "square crops per clip: 3 (left, centre, right) or 1")
VIEWS = (integer("views", 1, "clips per video, whose probabilities are averaged"), CROPS)
VIEWS_OR_COVER = (
    integer_or(
        "cover",
        "views",
        1,
        "clips per video, whose probabilities are averaged; cover: clips that do not overlap, along"
        " the whole video of any length",
    ),
    CROPS,
)
ATTENTION_KERNELS = string(
    "attention_kernels", "auto", "auto for the fastest on the device, xla, or the name of a kernel"
)
