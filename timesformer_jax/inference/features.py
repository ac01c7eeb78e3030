"""`timesformer features`: the vectors of many videos, as a table for other programs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from timesformer_jax.errors import InputError, PartlyDone
from timesformer_jax.inference import feature_table
from timesformer_jax.inference.clip_model import Outputs
from timesformer_jax.inference.predict import compute_all, remaining
from timesformer_jax.inference.predictor import Predictor
from timesformer_jax.inference.sources import Source, find, of_annotations


def features(
    videos: Sequence[str],
    checkpoint: str,
    output: str,
    views: int = 1,
    crops: int = 3,
    start: float | None = None,
    end: float | None = None,
    frames: bool = False,
    positions: bool = False,
    annotations: str | None = None,
    dataset: str | None = None,
    labels: str | None = None,
    attention_kernels: str = "auto",
    batch_size: int | None = None,
    workers: int = 0,
    follow: bool = False,
) -> None:
    """Writes the features of videos to a table, a row a video.

    Until it is complete, the table grows in the folder OUTPUT.part. If the run is killed, the same
    command goes on after what is there. With a table that is complete, it adds what is missing.

    Args:
      videos: files, folders and globs, as for `sources.find`; with `annotations`, one folder.
      checkpoint, views, crops, attention_kernels, batch_size: as for `Predictor`; the checkpoint
        needs no head, so it may be an image ViT.
      output: a file .parquet or .npz; see `feature_table` for the columns.
      start, end: seconds.
      frames, positions: as for `Predictor.features`.
      annotations, dataset, labels: which clips of the folder, with their labels, as for `prepare`.
      workers: threads that decode; 0: one per core.
      follow: accept links and paths that lead out of a folder.

    Raises:
      InputError: if there is no video, or something cannot be used.
      PartlyDone: after all videos, if some could not be read; each was named before.
    """
    feature_table.check_output(output)
    sources = _sources(videos, start, end, annotations, dataset, labels, follow)
    predictor = Predictor(
        checkpoint, views, crops, attention_kernels, batch_size=batch_size, needs_head=False
    )
    settings: dict[str, Any] = {"checkpoint": checkpoint, "weights": predictor.fingerprint}
    settings |= {"views": views, "crops": crops, "start": start, "end": end}
    encode = functools.partial(predictor.encode, frames=frames, positions=positions)
    shapes = _shapes(predictor, frames, positions)
    with feature_table.GrowingTable(output, settings, shapes) as table:
        left = remaining(sources, table.ids, output)

        def take(source: Source, outputs: Outputs) -> None:
            table.append(source, {"features": outputs["clips"].mean(axis=(0, 1)), **outputs})

        try:
            compute_all(predictor, encode, left, take, workers)
        except PartlyDone:
            _finish(table)
            raise
        _finish(table)


def _finish(table: feature_table.GrowingTable) -> None:
    if rows := table.finish():
        print(f"{table.output}: {rows} videos")


def _sources(
    videos: Sequence[str],
    start: float | None,
    end: float | None,
    annotations: str | None,
    dataset: str | None,
    labels: str | None,
    follow: bool,
) -> list[Source]:
    if not videos:
        raise InputError("no video given: timesformer features VIDEO... --checkpoint=DIR")
    if annotations is None:
        if dataset or labels:
            raise InputError("--dataset and --labels are those of --annotations, which is missing")
        return find(videos, start, end, follow)
    if len(videos) != 1:
        raise InputError("with --annotations give one folder, which their paths are relative to")
    if start is not None or end is not None:
        raise InputError("with --annotations, the start and end of clips are theirs")
    return of_annotations(videos[0], annotations, dataset, labels, follow)


def _shapes(predictor: Predictor, frames: bool, positions: bool) -> feature_table.Shapes:
    model, clip = predictor.metadata.model, predictor.metadata.clip
    clips, width = (predictor.views, predictor.crops), model.hidden_size
    shapes: feature_table.Shapes = {"features": (width,), "clips": (*clips, width)}
    if frames:
        shapes["frames"] = (*clips, clip.frames, width)
    if positions:
        shapes["positions"] = (*clips, (clip.crop // model.patch_size) ** 2, width)
    return shapes
