"""H.264 videos for the input benchmark: a camera pans and zooms over photographs.

By default they are ten seconds long, and frames have the size of Kinetics frames at a short side of
256. Their content is natural, so their JPEGs are as large and as slow to decode as those of real
videos.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import av
import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from timesformer_jax.data.demo.drawing import REGIONS, load_photographs
from timesformer_jax.data.prepare.prepare import prepare
from timesformer_jax.storage import disk_errors, write_atomically
from timesformer_jax.workers import available_cores, worker_pool

WIDTH, HEIGHT = 340, 256
FPS = 30
ALL_SECONDS = 640  # of the videos together, unless told otherwise
CLASSES = 2
STORE_STRIDE = 4  # the stride of Kinetics in prepare


def make(
    directory: str | os.PathLike,
    videos: int | None = None,
    seconds: int = 10,
    height: int = HEIGHT,
) -> None:
    """Makes videos in DIR/videos and prepares DIR from them; existing files are kept.

    Args:
      directory: DIR.
      videos: how many; by default 64 of ten seconds, fewer if they are longer.
      seconds: length of each.
      height: of a frame in pixels, even.

    Raises:
      InputError: the directory holds something else, or the disk is full.
    """
    videos = videos or max(CLASSES, ALL_SECONDS // seconds)
    folder = Path(directory) / "videos"
    with disk_errors(directory):
        kind = f"{height}p_{seconds}s"
        paths = [folder / "train" / str(i % CLASSES) / f"{kind}_{i:05d}.mp4" for i in range(videos)]
        for path in paths[:CLASSES]:
            path.parent.mkdir(parents=True, exist_ok=True)
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        if missing:
            load_photographs(REGIONS["train"])  # so that a missing photograph fails in this process
            with worker_pool(min(available_cores(), len(missing))) as pool:
                made = pool.map(partial(_write, paths, seconds, height), missing)
                for _ in tqdm(made, total=len(missing), unit="video", desc="making videos"):
                    pass
    prepare(folder, directory, store_stride=STORE_STRIDE, short_side=height, name="synthetic")


def _write(paths: list[Path], seconds: int, height: int, number: int) -> None:
    """Encodes a video like a web video: crf 27 gives JPEGs of about 20 KB per frame."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": "27", "preset": "veryfast", "threads": "1"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = _width(height), height, "yuv420p"
        for image in frames(number, seconds, height):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    write_atomically(epath.Path(paths[number]), buffer.getvalue())


def frames(number: int, seconds: int = 10, height: int = HEIGHT) -> Iterator[np.ndarray]:
    """Yields the frames of a video in order, as (height, W, 3) uint8 RGB."""
    rng = np.random.default_rng(number)
    photographs = load_photographs(REGIONS["train"])
    photograph = photographs[number % len(photographs)]
    largest = min(photograph.width / WIDTH, photograph.height / HEIGHT)
    size = _width(height), height
    # The camera moves from one position and scale to another at a constant speed.
    ends = np.stack([rng.uniform(0.6, 0.95, 2) * largest, *rng.uniform(0, 1, (2, 2))], axis=-1)
    for scale, right, down in np.linspace(ends[0], ends[1], FPS * seconds):
        seen = scale * WIDTH, scale * HEIGHT
        left, top = right * (photograph.width - seen[0]), down * (photograph.height - seen[1])
        box = (left, top, left + seen[0], top + seen[1])
        yield np.asarray(photograph.resize(size, Image.Resampling.BICUBIC, box))


def _width(height: int) -> int:
    """An even number, as H.264 needs."""
    return 2 * round(height * WIDTH / HEIGHT / 2)
