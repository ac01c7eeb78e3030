"""Peak memory of predict, timeline and evaluate against the length of a video.

    .venv/bin/python experiments/long_videos.py runs/long_videos 5 30 120

Makes a video of each length in minutes (a moving pattern, 128 x 96, 10 frames a second, H.264),
prepares it as one record, and runs the commands with a small model of random weights, each in a
process of its own. Measured is VmHWM, the most memory that a process ever had, summed over the
process and its decoder. Writes the table of docs/long-clips.md. Linux only.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
from docs_tables import DOCS, markdown_table, replace_table
from flax import nnx

from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.store import save_parameters
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.encode import encode_mp4
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.timesformer import TimeSformer, parameters

FPS, HEIGHT, WIDTH = 10, 96, 128
CLIP = ClipSpec(frames=8, frame_stride=15, crop=32, short_side=HEIGHT)  # 4 s
MODEL = TimeSformerConfig(
    num_classes=2, image_size=32, num_frames=8, hidden_size=32, depth=1, num_heads=2
)
LABELS = ("a", "b")


def main(folder: str, *minutes: str) -> None:
    work = pathlib.Path(folder)
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        params = parameters(TimeSformer(MODEL, rngs=nnx.Rngs(0)))
        save_parameters(checkpoint, params, CheckpointMetadata(MODEL, CLIP, LABELS, config={}))
    lines = [row(work, checkpoint, int(number)) for number in minutes]
    head = ["minutes", "clips", "record, MB", "predict, MB", "timeline, MB", "evaluate, MB"]
    page = DOCS / "long-clips.md"
    table = markdown_table(head, lines, 0)
    page.write_text(replace_table(page.read_text(), "long_videos.py", "memory", table))
    print(table)


def row(work: pathlib.Path, checkpoint: pathlib.Path, minutes: int) -> list[str]:
    video, data = made(work, minutes), work / f"data_{minutes}"
    if not data.exists():
        clips, labels, other = work / f"{minutes}.csv", work / "labels.txt", made(work, 1)
        clips.write_text(f"path,label,split\n{video.name},a,validation\n{other.name},b,train\n")
        labels.write_text("\n".join(LABELS))
        timesformer(
            "prepare", f"--videos={work}", f"--annotations={clips}", f"--output={data}",
            f"--labels={labels}", f"--short_side={HEIGHT}", "--workers=1",
        )  # fmt: skip
    record = next(data.glob("*validation.tfrecord*")).stat().st_size
    once = [f"--checkpoint={checkpoint}", "--crops=1"]
    evaluated = ["--split=validation", "--batch_size=8"]
    peaks = [
        timesformer("predict", video, *once, "--views=cover"),
        timesformer("timeline", video, *once, "--stride=4"),
        timesformer("evaluate", *once, f"--data={data}", *evaluated, "--views=cover"),
    ]
    clips = round(60 * minutes / (CLIP.frames * CLIP.frame_stride / 30))
    found = [minutes, clips, record / 1e6, *peaks]
    print(found, flush=True)
    return [f"{number:,.0f}" for number in found]


def made(work: pathlib.Path, minutes: int) -> pathlib.Path:
    """The video of that length, made if there is none yet."""
    video = work / f"{minutes}.mp4"
    if not video.exists():
        video.write_bytes(encode_mp4(pattern(60 * FPS * minutes), FPS, preset="veryfast"))
    return video


def pattern(frames: int) -> Iterator[np.ndarray]:
    """Coloured waves that move, with a little noise: neither still nor easy to encode."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH] / 16
    noise = rng.integers(0, 24, (16, HEIGHT, WIDTH, 3))
    for number in range(frames):
        waves = [np.sin(x + number / 7), np.sin(y - number / 11), np.sin(x + y + number / 5)]
        yield (115 + 100 * np.stack(waves, axis=-1) + noise[number % 16]).astype(np.uint8)


def timesformer(*arguments: object) -> float:
    """Runs a command; returns the sum of the peaks of its processes, in MB."""
    command = [sys.executable, "-m", "timesformer_jax.cli", *map(str, arguments)]
    peaks: dict[int, int] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for pid in (process.pid, *children(process.pid)):
                peaks[pid] = max(peaks.get(pid, 0), peak(pid))
            time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
    return sum(peaks.values()) / 1e6


def children(pid: int) -> list[int]:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        found = [pathlib.Path(f"/proc/{pid}/task/{task}/children").read_text() for task in tasks]
    except OSError:  # it has ended
        return []
    return [int(child) for text in found for child in text.split()]


def peak(pid: int) -> int:
    """VmHWM in bytes; 0 of a process that has ended."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
