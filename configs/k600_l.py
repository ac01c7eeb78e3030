"""TimeSformer-L on Kinetics-600: divided attention, 96 frames x 4, 224 pixels.

    timesformer train --config=configs/k600_l.py --workdir=runs/k600_l \\
        --config.data.directory=data/k600 --config.pretrained=vit_base_patch16_224_in21k.pth \\
        --config.model.remat=block

config.pretrained names an ImageNet-21K ViT-B/16, of any layout in docs/checkpoints.md.
As configs/k400_l.py but for the classes.
8 GPUs of 24 GB: 19 GiB each, 8 clips, by `timesformer plan`.
The authors' model reaches 82.2 / 95.6 top-1 / top-5 (model zoo, 1 x 3 views).
We have not trained it.
"""

from timesformer_jax.recipes import kinetics600, with_arguments


def get_config(arguments=""):
    return with_arguments(kinetics600("timesformer_l"), arguments)
