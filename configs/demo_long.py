"""A tiny divided space-time TimeSformer on the embedded data set of three-minute videos.

    timesformer train --config=configs/demo_long.py --workdir=runs/demo_long

What an answer late in a video means is told by a cue 120 seconds or more before it. One clip of 64
frames spans the whole video; averages of clips of less than 120 seconds are at chance, a third.

Hardware: two CPU cores, minutes. Before the first run it makes the videos.
Expected accuracy: docs/long-clips.md.
"""

from timesformer_jax.recipes import demo_long, with_arguments


def get_config(arguments=""):
    return with_arguments(demo_long(), arguments)
