"""TimeSformer on Kinetics-400: divided attention, 8 frames x 32, 224 pixels.

    timesformer train --config=configs/k400_base.py --workdir=runs/k400_base \\
        --config.data.directory=data/k400 --config.pretrained=vit_base_patch16_224_in21k.pth

config.pretrained names an ImageNet-21K ViT-B/16, of any layout in docs/checkpoints.md.
8 GPUs of 24 GB: 19 GiB each, 8 clips, by `timesformer plan`. The paper took 416 V100-hours.
The authors' model reaches 77.9 / 93.2 top-1 / top-5 (model zoo, 1 x 3 views).
We have not trained it.

The paper's ablations are arguments, :NAME=VALUE,NAME=VALUE after the file's name, with top-1
(the paper's divided model: 78.0):
    attention           space 76.9, joint 77.4, local_global 75.9, axial 73.5 (table 1);
                        space_then_time 0.5 and parallel 0.4 below divided; time is not in the paper
    position_embedding  none 75.4, space 77.8 (table 4)
    init                imagenet1k 75.8 (table 2), scratch 64.8
    backbone            vit_l about 1 below, vit_s about 5 below; patch_size=32 about 3 below
    frames, crop        figure 5; over the same span, so frames=16 is at a rate of 16
    train_fraction      0.25, 0.5, 0.75 of each class's training videos (figure 4)
"""

from timesformer_jax.recipes import kinetics400, with_arguments


def get_config(arguments=""):
    return with_arguments(kinetics400("timesformer_base"), arguments)
