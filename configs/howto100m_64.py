"""TimeSformer on HowTo100M's tasks: 64 frames x 32, 68.3 s of video, 224 pixels.

    timesformer prepare --dataset=howto100m --videos=howto100m --annotations=howto100m_csvs \\
        --output=data/howto100m_64 --segment_seconds=68.27
    timesformer train --config=configs/howto100m_64.py --workdir=runs/howto100m_64 \\
        --config.data.directory=data/howto100m_64 \\
        --config.pretrained=TimeSformer_divST_8x32_224_K400.pyth \\
        --config.model.remat=block

From the authors' weights for Kinetics-400. A record is a piece as long as a clip; the probabilities
of a video's pieces, which do not overlap, are averaged.
8 GPUs of 24 GB: 13 GiB each, 8 clips, by `timesformer plan`.
The paper reports 62.2 top-1 (SlowFast: 51.5). We have not trained it; the authors' split was never
published (docs/data.md).
"""

from timesformer_jax.recipes import howto100m, with_arguments


def get_config(arguments=""):
    return with_arguments(howto100m(64), arguments)
