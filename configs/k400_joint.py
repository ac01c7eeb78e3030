"""Joint space-time attention on Kinetics-400: 8 frames x 32, 224 pixels.

    timesformer train --config=configs/k400_joint.py --workdir=runs/k400_joint \\
        --config.data.directory=data/k400 --config.pretrained=vit_base_patch16_224_in21k.pth

config.pretrained names an ImageNet-21K ViT-B/16 in timm's layout.
The paper reports 77.4 top-1 (table 1).
"""

from timesformer_jax import recipes


def get_config():
    return recipes.kinetics400(attention="joint")
