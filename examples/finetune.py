"""Fine-tune a model on a prepared data set from Python, without the command line.

    python examples/finetune.py DATA WORKDIR [PRETRAINED]

DATA is what `timesformer prepare` wrote. Without PRETRAINED (a checkpoint of any format, see
docs/checkpoints.md) a tiny model is trained from scratch. Stopped and run again, it goes on.
"""

import sys

import timesformer_jax as tsf
from timesformer_jax import recipes


def main(data: str, workdir: str, pretrained: str = "", epochs: int = 15) -> None:
    config = recipes.finetune("timesformer_base" if pretrained else "timesformer_tiny")
    config.data.directory = data
    config.pretrained = pretrained
    config.epochs = epochs
    if not pretrained:
        config.optimizer.learning_rate = 2e-3
        config.data.short_side_range = (config.clip.crop, config.clip.crop * 5 // 4)
    results = tsf.train(config, workdir)
    print(f"top-1 {results['top1']:.1%} of {results['videos']} videos, step {results['step']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
