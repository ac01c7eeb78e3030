"""TimeSformer-HR on Diving-48: divided attention, 16 frames, 448 pixels.

    timesformer train --config=configs/diving48_hr.py --workdir=runs/diving48_hr \\
        --config.data.directory=data/diving48_512 --config.model.remat=block

Training starts from a ViT-B/16 of ImageNet-21K, which is downloaded (docs/checkpoints.md).
Prepare the videos into a folder of their own: --short_side=512 --output=data/diving48_512.
The authors published no config. Spreading the frames over the whole dive is our choice;
--config.clip.sampling=stride samples them as on Kinetics.
Hardware: 8 GPUs of 32 GB, 8 clips on each; `timesformer plan` says 18 GiB each.
Expected accuracy: 78.0 top-1 in the paper. We have not trained it.
"""

from timesformer_jax.recipes import diving48, with_arguments


def get_config(arguments=""):
    return with_arguments(diving48("timesformer_hr"), arguments)
