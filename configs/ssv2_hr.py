"""TimeSformer-HR on Something-Something V2: divided attention, 16 segments, 448 pixels.

    timesformer train --config=configs/ssv2_hr.py --workdir=runs/ssv2_hr \\
        --config.data.directory=data/ssv2 --config.pretrained=vit_base_patch16_224_in21k.pth \\
        --config.model.remat=block

config.pretrained names an ImageNet-21K ViT-B/16, of any layout in docs/checkpoints.md.
Prepare the videos with --short_side=512.
One frame of each segment of the video; no clip is mirrored. The authors' weights take BGR: to go on
from them, --config.clip.channel_order=bgr.
8 GPUs of 24 GB: 18 GiB each, 8 clips, by `timesformer plan`.
The authors' model reaches 61.8 / 86.9 top-1 / top-5 (model zoo, 1 x 3 views).
We have not trained it.
"""

from timesformer_jax.recipes import something_v2, with_arguments


def get_config(arguments=""):
    return with_arguments(something_v2("timesformer_hr"), arguments)
