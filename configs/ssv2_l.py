"""TimeSformer-L on Something-Something V2: divided attention, 64 segments, 224 pixels.

    timesformer train --config=configs/ssv2_l.py --workdir=runs/ssv2_l \\
        --config.data.directory=data/ssv2 --config.model.remat=block

Training starts from a ViT-B/16 of ImageNet-21K, which is downloaded (docs/checkpoints.md).
A clip has one frame from each segment of the video, and is never flipped. The authors' weights
expect BGR: to continue from them, set --config.clip.channel_order=bgr.
Hardware: 8 GPUs of 24 GB, 8 clips on each; `timesformer plan` says 16 GiB each.
Expected accuracy: 62.0 / 87.5 top-1 / top-5, of the authors' weights (model zoo, 1 x 3 views).
We have not trained it.
"""

from timesformer_jax.recipes import something_v2, with_arguments


def get_config(arguments=""):
    return with_arguments(something_v2("timesformer_l"), arguments)
