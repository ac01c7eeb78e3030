"""TimeSformer on HowTo100M's tasks: 64 frames x 32, 68.3 s of video, 224 pixels.

    timesformer prepare --dataset=howto100m --videos=howto100m --annotations=howto100m_csvs \\
        --output=data/howto100m_64 --segment_seconds=68.27
    timesformer train --config=configs/howto100m_64.py --workdir=runs/howto100m_64 \\
        --config.data.directory=data/howto100m_64 --config.model.remat=block

Training starts from the authors' weights for Kinetics-400, which are downloaded. A record is a
segment as long as a clip. Segments do not overlap, and a video's probabilities are the average over
its segments.
Hardware: 8 GPUs of 24 GB, 8 clips on each; `timesformer plan` says 16 GiB each.
Expected accuracy: 62.2 top-1 in the paper (SlowFast: 51.5). We have not trained it.
The authors' split was never published (docs/data.md).
"""

from timesformer_jax.recipes import howto100m, with_arguments


def get_config(arguments=""):
    return with_arguments(howto100m(64), arguments)
