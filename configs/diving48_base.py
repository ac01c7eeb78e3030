"""TimeSformer on Diving-48: divided attention, 8 frames, 224 pixels.

    timesformer train --config=configs/diving48_base.py --workdir=runs/diving48_base \\
        --config.data.directory=data/diving48 --config.pretrained=vit_base_patch16_224_in21k.pth

config.pretrained names an ImageNet-21K ViT-B/16, of any layout in docs/checkpoints.md.
There is no config of the authors: that the frames are spread over the whole dive is our choice
(--config.clip.sampling=stride takes them as on Kinetics).
8 GPUs of 24 GB: 19 GiB each, 8 clips, by `timesformer plan`.
The paper reports 74.9 top-1. We have not trained it.
"""

from timesformer_jax.recipes import diving48, with_arguments


def get_config(arguments=""):
    return with_arguments(diving48("timesformer_base"), arguments)
