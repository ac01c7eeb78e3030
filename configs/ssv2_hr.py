"""TimeSformer-HR on Something-Something V2: divided attention, 16 segments, 448 pixels.

    timesformer train --config=configs/ssv2_hr.py --workdir=runs/ssv2_hr \\
        --config.data.directory=data/ssv2_512 --config.model.remat=block

Training starts from a ViT-B/16 of ImageNet-21K, which is downloaded (docs/checkpoints.md).
Prepare the videos into a folder of their own: --short_side=512 --output=data/ssv2_512.
A clip has one frame from each segment of the video, and is never flipped. The authors' weights
expect BGR: to continue from them, set --config.clip.channel_order=bgr.
Hardware: 8 GPUs of 32 GB, 8 clips on each; `timesformer plan` says 18 GiB each.
Expected accuracy: 61.8 / 86.9 top-1 / top-5, of the authors' weights (model zoo, 1 x 3 views).
We have not trained it.
"""

from timesformer_jax.recipes import something_v2, with_arguments


def get_config(arguments=""):
    return with_arguments(something_v2("timesformer_hr"), arguments)
