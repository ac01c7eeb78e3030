"""A pretrained model on your own videos; the classes are those of the data.

    timesformer train --config=configs/finetune.py --workdir=runs/mine \\
        --config.data.directory=data/mine --config.pretrained=TimeSformer_divST_8x32_224_K400.pyth

One GPU. AdamW at 1e-4 for 15 epochs; a batch of 8 clips.
"""

from timesformer_jax.recipes import finetune, with_arguments


def get_config(arguments=""):
    return with_arguments(finetune(), arguments)
