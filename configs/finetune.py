"""Fine-tuning of a pretrained model on your own videos, with the classes of the data.

    timesformer train --config=configs/finetune.py --workdir=runs/mine \\
        --config.data.directory=data/mine \\
        --config.pretrained=facebook/timesformer-base-finetuned-k400

Takes the shape of the checkpoint, and fits itself to the data (docs/finetune.md).
AdamW with a learning rate of 1e-4 for 15 epochs, in batches of 8 clips.
Hardware: one GPU.
Expected accuracy: depends on your data.
"""

from timesformer_jax.recipes import finetune, with_arguments


def get_config(arguments=""):
    return with_arguments(finetune(), arguments)
