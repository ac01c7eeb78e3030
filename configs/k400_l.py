"""TimeSformer-L on Kinetics-400: divided attention, 96 frames x 4, 224 pixels.

    timesformer train --config=configs/k400_l.py --workdir=runs/k400_l \\
        --config.data.directory=data/k400 --config.pretrained=vit_base_patch16_224_in21k.pth \\
        --config.model.remat=block

config.pretrained names an ImageNet-21K ViT-B/16, of any layout in docs/checkpoints.md.
8 GPUs of 24 GB: 19 GiB each, 8 clips, by `timesformer plan`.
The authors' model reaches 80.6 / 94.7 top-1 / top-5 (model zoo, 1 x 3 views).
We have not trained it.
"""

from timesformer_jax.recipes import kinetics400, with_arguments


def get_config(arguments=""):
    return with_arguments(kinetics400("timesformer_l"), arguments)
