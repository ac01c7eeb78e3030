"""TimeSformer-HR on Kinetics-400: divided attention, 16 frames x 16, 448 pixels.

    timesformer train --config=configs/k400_hr.py --workdir=runs/k400_hr \\
        --config.data.directory=data/k400_512 --config.model.remat=block

Training starts from a ViT-B/16 of ImageNet-21K, which is downloaded (docs/checkpoints.md).
Prepare the videos into a folder of their own: --short_side=512 --output=data/k400_512.
Hardware: 8 GPUs of 32 GB, 8 clips on each; `timesformer plan` says 18 GiB each.
Expected accuracy: 79.6 / 94.0 top-1 / top-5, of the authors' weights (model zoo, 1 x 3 views).
We have not trained it.
"""

from timesformer_jax.recipes import kinetics400, with_arguments


def get_config(arguments=""):
    return with_arguments(kinetics400("timesformer_hr"), arguments)
