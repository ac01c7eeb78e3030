"""TimeSformer-L on Kinetics-600: divided attention, 96 frames x 4, 224 pixels.

    timesformer train --config=configs/k600_l.py --workdir=runs/k600_l \\
        --config.data.directory=data/k600 --config.model.remat=block

Training starts from a ViT-B/16 of ImageNet-21K, which is downloaded (docs/checkpoints.md).
All but the classes is as in configs/k400_l.py.
Hardware: 8 GPUs of 40 GB, 8 clips on each; `timesformer plan` says 23 GiB each.
Expected accuracy: 82.2 / 95.6 top-1 / top-5, of the authors' weights (model zoo, 1 x 3 views).
We have not trained it.
"""

from timesformer_jax.recipes import kinetics600, with_arguments


def get_config(arguments=""):
    return with_arguments(kinetics600("timesformer_l"), arguments)
