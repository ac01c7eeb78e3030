"""TimeSformer-L on Kinetics-400: divided attention, 96 frames x 4, 224 pixels.

    timesformer train --config=configs/k400_l.py --workdir=runs/k400_l \\
        --config.data.directory=data/k400 --config.pretrained=vit_base_patch16_224_in21k.pth

config.pretrained names an ImageNet-21K ViT-B/16 in timm's layout.
--config.model.remat=block trades time for memory.
The paper's model reaches 80.6 top-1, 94.7 top-5 (1 x 3 views).
"""

from timesformer_jax import recipes


def get_config():
    return recipes.kinetics400("timesformer_l")
