"""Load a checkpoint and predict the class of a video.

    python examples/predict.py CHECKPOINT VIDEO

CHECKPOINT is any checkpoint of docs/checkpoints.md: a run's --workdir, a file or a name.
"""

import sys

import timesformer_jax as tsf


def main(checkpoint: str, video: str) -> None:
    predictor = tsf.Predictor(checkpoint)
    for label, probability in predictor.predict(video):
        print(f"{probability:7.2%}  {label}")


if __name__ == "__main__":
    main(*sys.argv[1:])
