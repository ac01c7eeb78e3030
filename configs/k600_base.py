"""TimeSformer on Kinetics-600: divided attention, 8 frames x 32, 224 pixels.

    timesformer train --config=configs/k600_base.py --workdir=runs/k600_base \\
        --config.data.directory=data/k600 --config.pretrained=vit_base_patch16_224_in21k.pth

config.pretrained names an ImageNet-21K ViT-B/16, of any layout in docs/checkpoints.md.
The authors released weights and no config: everything but the classes is as for Kinetics-400.
8 GPUs of 24 GB: 19 GiB each, 8 clips, by `timesformer plan`.
The authors' model reaches 79.1 / 94.4 top-1 / top-5 (model zoo, 1 x 3 views).
We have not trained it.
"""

from timesformer_jax.recipes import kinetics600, with_arguments


def get_config(arguments=""):
    return with_arguments(kinetics600("timesformer_base"), arguments)
