"""TimeSformer on Kinetics-400: divided attention, 8 frames x 32, 224 pixels.

    timesformer train --config=configs/k400_base.py --workdir=runs/k400_base \\
        --config.data.directory=data/k400 --config.pretrained=vit_base_patch16_224_in21k.pth

config.pretrained names an ImageNet-21K ViT-B/16 in timm's layout.
The release trained on 8 GPUs with a global batch of 64.
The paper's model reaches 77.9 top-1, 93.2 top-5 (1 x 3 views).
"""

from timesformer_jax import recipes


def get_config():
    return recipes.kinetics400("timesformer_base")
