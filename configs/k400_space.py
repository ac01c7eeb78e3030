"""Space-only attention on Kinetics-400: 8 frames x 32, 224 pixels.

    timesformer train --config=configs/k400_space.py --workdir=runs/k400_space \\
        --config.data.directory=data/k400

Training starts from a ViT-B/16 of ImageNet-21K, which is downloaded (docs/checkpoints.md).
Hardware: 8 GPUs of 24 GB, 8 clips on each; `timesformer plan` says 13 GiB each.
Expected accuracy: 76.9 top-1 in the paper (table 1). We have not trained it.
"""

from timesformer_jax.recipes import kinetics400, with_arguments


def get_config(arguments=""):
    return with_arguments(kinetics400(attention="space"), arguments)
