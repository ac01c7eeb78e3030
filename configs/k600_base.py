"""TimeSformer on Kinetics-600: divided attention, 8 frames x 32, 224 pixels.

    timesformer train --config=configs/k600_base.py --workdir=runs/k600_base \\
        --config.data.directory=data/k600

Training starts from a ViT-B/16 of ImageNet-21K, which is downloaded (docs/checkpoints.md).
The authors released weights, but no config. All but the classes is as in configs/k400_base.py.
Hardware: 8 GPUs of 24 GB, 8 clips on each; `timesformer plan` says 16 GiB each.
Expected accuracy: 79.1 / 94.4 top-1 / top-5, of the authors' weights (model zoo, 1 x 3 views).
We have not trained it.
"""

from timesformer_jax.recipes import kinetics600, with_arguments


def get_config(arguments=""):
    return with_arguments(kinetics600("timesformer_base"), arguments)
