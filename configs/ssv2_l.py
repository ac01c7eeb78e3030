"""TimeSformer-L on Something-Something V2: divided attention, 64 segments, 224 pixels.

    timesformer train --config=configs/ssv2_l.py --workdir=runs/ssv2_l \\
        --config.data.directory=data/ssv2 --config.pretrained=vit_base_patch16_224_in21k.pth \\
        --config.model.remat=block

config.pretrained names an ImageNet-21K ViT-B/16, of any layout in docs/checkpoints.md.
One frame of each segment of the video; no clip is mirrored. The authors' weights take BGR: to go on
from them, --config.clip.channel_order=bgr.
8 GPUs of 24 GB: 13 GiB each, 8 clips, by `timesformer plan`.
The authors' model reaches 62.0 / 87.5 top-1 / top-5 (model zoo, 1 x 3 views).
We have not trained it.
"""

from timesformer_jax.recipes import something_v2, with_arguments


def get_config(arguments=""):
    return with_arguments(something_v2("timesformer_l"), arguments)
