"""TimeSformer on Diving-48: divided attention, 8 frames, 224 pixels.

    timesformer train --config=configs/diving48_base.py --workdir=runs/diving48_base \\
        --config.data.directory=data/diving48

Training starts from a ViT-B/16 of ImageNet-21K, which is downloaded (docs/checkpoints.md).
The authors published no config. Spreading the frames over the whole dive is our choice;
--config.clip.sampling=stride samples them as on Kinetics.
Hardware: 8 GPUs of 24 GB, 8 clips on each; `timesformer plan` says 16 GiB each.
Expected accuracy: 74.9 top-1 in the paper. We have not trained it.
"""

from timesformer_jax.recipes import diving48, with_arguments


def get_config(arguments=""):
    return with_arguments(diving48("timesformer_base"), arguments)
