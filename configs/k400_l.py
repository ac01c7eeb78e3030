"""TimeSformer-L on Kinetics-400: divided attention, 96 frames x 4, 224 pixels.

    timesformer train --config=configs/k400_l.py --workdir=runs/k400_l \\
        --config.data.directory=data/k400 --config.model.remat=block

Training starts from a ViT-B/16 of ImageNet-21K, which is downloaded (docs/checkpoints.md).
Hardware: 8 GPUs of 40 GB, 8 clips on each; `timesformer plan` says 23 GiB each.
Expected accuracy: 80.6 / 94.7 top-1 / top-5, of the authors' weights (model zoo, 1 x 3 views).
We have not trained it.
"""

from timesformer_jax.recipes import kinetics400, with_arguments


def get_config(arguments=""):
    return with_arguments(kinetics400("timesformer_l"), arguments)
