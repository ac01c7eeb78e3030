"""TimeSformer on Something-Something V2: divided attention, 8 segments, 224 pixels.

    timesformer train --config=configs/ssv2_base.py --workdir=runs/ssv2_base \\
        --config.data.directory=data/ssv2

Training starts from a ViT-B/16 of ImageNet-21K, which is downloaded (docs/checkpoints.md).
A clip has one frame from each segment of the video, and is never flipped. The authors' weights
expect BGR: to continue from them, set --config.clip.channel_order=bgr.
Hardware: 8 GPUs of 24 GB, 8 clips on each; `timesformer plan` says 16 GiB each.
Expected accuracy: 59.1 / 85.6 top-1 / top-5, of the authors' weights (model zoo, 1 x 3 views).
We have not trained it.

The paper's ablations are arguments, as in configs/k400_base.py. Top-1 in the paper, where its
divided model has 59.5:
    attention           space 36.6, joint 58.5, local_global 56.3, axial 56.2 (table 1)
    position_embedding  none 45.8, space 52.5 (table 4)
    train_fraction      0.25, 0.5, 0.75 of the training videos of each class (figure 4)
"""

from timesformer_jax.recipes import something_v2, with_arguments


def get_config(arguments=""):
    return with_arguments(something_v2("timesformer_base"), arguments)
