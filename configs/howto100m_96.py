"""TimeSformer on HowTo100M's tasks: 96 frames x 32, 102.4 s of video, 224 pixels.

    timesformer prepare --dataset=howto100m --videos=howto100m --annotations=howto100m_csvs \\
        --output=data/howto100m_96 --segment_seconds=102.4
    timesformer train --config=configs/howto100m_96.py --workdir=runs/howto100m_96 \\
        --config.data.directory=data/howto100m_96 --config.model.remat=block

Training starts from the authors' weights for Kinetics-400, which are downloaded. A record is a
segment as long as a clip. Segments do not overlap, and a video's probabilities are the average over
its segments.
Hardware: 8 GPUs of 40 GB, 8 clips on each; `timesformer plan` says 23 GiB each.
Expected accuracy: 62.6 top-1 in the paper (SlowFast: 51.2). We have not trained it.
The authors' split was never published (docs/data.md).
"""

from timesformer_jax.recipes import howto100m, with_arguments


def get_config(arguments=""):
    return with_arguments(howto100m(96), arguments)
