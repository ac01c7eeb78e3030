"""TimeSformer on Kinetics-400: divided attention, 8 frames x 32, 224 pixels.

    timesformer train --config=configs/k400_base.py --workdir=runs/k400_base \\
        --config.data.directory=data/k400

Training starts from a ViT-B/16 of ImageNet-21K, which is downloaded (docs/checkpoints.md).
Hardware: 8 GPUs of 24 GB, 8 clips on each; `timesformer plan` says 16 GiB each. The paper
reports 416 V100 hours.
Expected accuracy: 77.9 / 93.2 top-1 / top-5, of the authors' weights (model zoo, 1 x 3 views).
We have not trained it.

The paper's ablations are arguments: add :NAME=VALUE,NAME=VALUE to the file's name. Top-1 in the
paper, where its divided model has 78.0:
    attention           space 76.9, joint 77.4, local_global 75.9, axial 73.5 (table 1);
                        space_then_time 0.5 and parallel 0.4 lower than divided; time: not reported
    position_embedding  none 75.4, space 77.8 (table 4)
    init                imagenet1k 75.8 (table 2), scratch 64.8
    backbone            vit_l about 1 lower, vit_s about 5 lower; patch_size=32 about 3 lower
    frames, crop        figure 5; a clip spans the same time, so frames=16 has a frame_stride of 16
    train_fraction      0.25, 0.5, 0.75 of the training videos of each class (figure 4)
"""

from timesformer_jax.recipes import kinetics400, with_arguments


def get_config(arguments=""):
    return with_arguments(kinetics400("timesformer_base"), arguments)
