"""TimeSformer-HR on Kinetics-400: divided attention, 16 frames x 16, 448 pixels.

    timesformer train --config=configs/k400_hr.py --workdir=runs/k400_hr \\
        --config.data.directory=data/k400 --config.pretrained=vit_base_patch16_224_in21k.pth

config.pretrained names an ImageNet-21K ViT-B/16 in timm's layout.
Prepare the videos with --short_side=512.
The paper's model reaches 79.6 top-1, 94.0 top-5 (1 x 3 views).
"""

from timesformer_jax import recipes


def get_config():
    return recipes.kinetics400("timesformer_hr")
