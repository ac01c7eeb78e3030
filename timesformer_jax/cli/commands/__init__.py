"""The table of commands: what each does, the function that does it, and its flags."""

from __future__ import annotations

from timesformer_jax.cli.commands.checkpoints import CHECKPOINTS
from timesformer_jax.cli.commands.data import DATA
from timesformer_jax.cli.commands.hardware import HARDWARE
from timesformer_jax.cli.commands.training import TRAINING
from timesformer_jax.cli.commands.videos import VIDEOS

COMMANDS = {**DATA, **TRAINING, **VIDEOS, **CHECKPOINTS, **HARDWARE}
