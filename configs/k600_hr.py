"""TimeSformer-HR on Kinetics-600: divided attention, 16 frames x 16, 448 pixels.

    timesformer train --config=configs/k600_hr.py --workdir=runs/k600_hr \\
        --config.data.directory=data/k600_512 --config.model.remat=block

Training starts from a ViT-B/16 of ImageNet-21K, which is downloaded (docs/checkpoints.md).
Prepare the videos into a folder of their own: --short_side=512 --output=data/k600_512.
All but the classes is as in configs/k400_hr.py.
Hardware: 8 GPUs of 32 GB, 8 clips on each; `timesformer plan` says 18 GiB each.
Expected accuracy: 81.8 / 95.8 top-1 / top-5, of the authors' weights (model zoo, 1 x 3 views).
We have not trained it.
"""

from timesformer_jax.recipes import kinetics600, with_arguments


def get_config(arguments=""):
    return with_arguments(kinetics600("timesformer_hr"), arguments)
