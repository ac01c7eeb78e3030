"""Load a checkpoint and predict the class of a video.

    python examples/predict.py CHECKPOINT VIDEO

CHECKPOINT is a run's --workdir, or what `timesformer convert ... --to=ours` wrote.
"""

import sys

import numpy as np

from timesformer_jax.inference.predict import Predictor


def main(checkpoint: str, video: str) -> None:
    predictor = Predictor(checkpoint, views=1, crops=3)
    probabilities = predictor(video)
    for i in np.argsort(-probabilities)[:5]:
        print(f"{probabilities[i]:7.2%}  {predictor.labels[i]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
