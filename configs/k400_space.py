"""Space-only attention on Kinetics-400: 8 frames x 32, 224 pixels.

    timesformer train --config=configs/k400_space.py --workdir=runs/k400_space \\
        --config.data.directory=data/k400 --config.pretrained=vit_base_patch16_224_in21k.pth

config.pretrained names an ImageNet-21K ViT-B/16 in timm's layout.
The paper reports 76.9 top-1 (table 1).
"""

from timesformer_jax import recipes


def get_config():
    return recipes.kinetics400(attention="space")
