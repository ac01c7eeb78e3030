"""Clips to TFRecord shards, by processes here or on Apache Beam, each shard whole or not there.

Everything in the output follows from the clips and the options alone, so that a run that was
killed, at any moment, goes on where it was and ends with the same bytes. In the order written:

    prepare.json             the options, and a fingerprint of the clips
    unlisted.txt             video files that no clip is of
    NAME-SPLIT.tfrecord-*    a shard, renamed when it is whole
    manifests/SHARD.json     its index rows and failures; a shard is done once this is there
    failures.csv             clips that are missing or cannot be decoded, and why
    SPLIT.index.npz, labels.txt, features.json, dataset_info.json     see records.py
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict, dataclass, fields

from etils import epath
from tqdm import tqdm

from timesformer_jax.data import annotations as annotations_lib
from timesformer_jax.data.annotations import Clip, Listing
from timesformer_jax.data.layout import (
    FAILURES_FILE,
    INFO_FILE,
    MANIFESTS,
    MISSING,
    OPTIONS_FILE,
    UNLISTED_FILE,
)
from timesformer_jax.data.prepare import shards as shards_lib
from timesformer_jax.data.prepare.shards import Options, Shard
from timesformer_jax.errors import InputError
from timesformer_jax.storage import absolute, disk_errors, locked, write_atomically
from timesformer_jax.workers import CONTEXT, WorkerCrash, available_cores, worker_pool

RUNNERS = ("local", "beam")


@dataclass(frozen=True)
class Summary:
    """What a prepared directory holds.

    output: the directory. clips, records: how many each split has; they differ where long clips
    were cut. classes: how many labels. failures: how many clips are missing or could not be
    decoded; failures.csv lists them. num_bytes: of all shards.
    """

    output: str
    clips: dict[str, int]
    records: dict[str, int]
    classes: int
    failures: int
    num_bytes: int

    def __str__(self) -> str:
        lines = [f"{self.output}: {self.classes} classes, {self.num_bytes / 1e6:.1f} MB"]
        for split, count in self.clips.items():
            records = self.records[split]
            cut = f" in {records} records" if records != count else ""
            lines.append(f"  {split}: {count} clips{cut}")
        if "validation" not in self.clips and "test" not in self.clips:
            lines.append("  no clip is for validation: training could not tell how good it is")
        if self.failures:
            listed = os.path.join(self.output, FAILURES_FILE)
            lines.append(f"  {self.failures} clips are missing or not decoded; {listed} says why")
        return "\n".join(lines)


def prepare(
    videos: str | os.PathLike,
    output: str | os.PathLike,
    annotations: str | os.PathLike | None = None,
    dataset: str | None = None,
    labels: str | os.PathLike | None = None,
    name: str | None = None,
    short_side: int = 256,
    quality: int = 90,
    fps: float | None = None,
    store_stride: int | None = None,
    segment_seconds: float | None = None,
    clips_per_shard: int = 32,
    workers: int = 0,
    validation_fraction: float = 0.1,
    max_failures: int | None = None,
    runner: str = "local",
    beam_options: str = "",
) -> Summary:
    """Prepares a data set: decodes its clips and writes them as TFRecord shards.

    Killed and run again with the same arguments, it finishes; run once more, it says that all is
    done, unless videos that were missing have come: the shards they belong to are made anew.
    Clips that are missing or cannot be decoded are left out and listed in failures.csv. All paths
    may be on gs://.

    Args:
      videos: the folder that holds the video files.
      output: the directory to write, made if it is not there.
      annotations: a csv of clips, or what the publisher of `dataset` gives; None: a folder a
        class. See `annotations.read`.
      dataset: of `annotations.DATASETS`; None: one's own.
      labels: a file with a label name a line, which fixes the classes and their order; None: the
        data set's, or those met, sorted.
      name: of the data set, as the file names begin; None: `dataset`, or "videos".
      short_side: pixels; the shorter side of the stored frames.
      quality: of the stored JPEGs (4:2:0), 1 to 100.
      fps: frames a second to resample to; None: as the video has them.
      store_stride: every how many frames one is stored. A clip's record is read whole, so its size
        is the speed of the input; 4 moves a sampled frame by at most 2. None: the data set's
        (4 for Kinetics), or 1.
      segment_seconds: clips are cut into the number of equal records whose length is nearest to
        this; 0: whole; None: the data set's, or whole.
      clips_per_shard: at most.
      workers: processes; 0: as many as there are processors.
      validation_fraction: share of the clips without a split that goes to validation.
      max_failures: end the run when more clips than this are there but cannot be decoded; None:
        go on. On Beam it is only known at the end.
      runner: "local", processes on this machine, or "beam".
      beam_options: of Apache Beam, as on its command line: "--runner=DataflowRunner --project=p".

    Returns:
      What was prepared; it is printed as well. Progress goes to standard error.

    Raises:
      InputError: arguments or annotations that cannot be used, an output that other options or
        clips were prepared to, a split of which no clip could be decoded, too many failures, a
        full disk, a killed worker. Shards that are finished stay.
    """
    if published := annotations_lib.published_dataset(dataset):
        if store_stride is None:
            store_stride = published.store_stride
        if segment_seconds is None:
            segment_seconds = published.segment_seconds
    options = Options(
        name or dataset or "videos",
        short_side,
        quality,
        1 if store_stride is None else store_stride,
        fps,
        segment_seconds or None,
        clips_per_shard,
    )
    _check(options, workers, max_failures, runner, beam_options)
    listing = annotations_lib.read(
        videos,
        annotations,
        None if labels is None else annotations_lib.read_labels(labels),
        validation_fraction,
        dataset,
    )
    print(listing.report(), flush=True)
    output = absolute(output)

    work = (os.fspath(absolute(videos)), listing.labels, options)

    def write_shards(shards: Sequence[Shard]) -> None:
        if runner == "beam":
            _write_on_beam(shards, work, beam_options)
        else:
            _write_here(shards, work, workers or available_cores(), max_failures)

    with disk_errors(output):
        (output / MANIFESTS).mkdir(parents=True, exist_ok=True)
        with locked(output):
            return _prepare(output, listing, options, write_shards, max_failures)


def _prepare(output, listing, options, write_shards, max_failures) -> Summary:
    _claim(output, options, listing)
    shards = _shards(output, listing.clips, options)
    missing = frozenset(listing.missing)
    todo = [shard for shard in shards if not _is_done(shard, missing)]
    complete = output / INFO_FILE
    if complete.exists() and not todo:
        print("already prepared, nothing to do")
    else:
        complete.unlink(missing_ok=True)
        for leftover in (*output.glob("*.part"), *(output / MANIFESTS).glob("*.part")):
            leftover.unlink()
        write_atomically(
            output / UNLISTED_FILE, "".join(f"{p}\n" for p in listing.unlisted).encode()
        )
        try:
            if todo:
                write_shards(todo)
        finally:  # a run that ends early says what it has met
            manifests = [s.read_manifest() for s in shards if s.manifest.exists()]
            _write_failures(output, manifests)
        _require_few(sum(map(_undecodable, manifests)), max_failures)
        _write_description(output, shards, listing.labels, options)
    summary = _summary(output, shards, listing.labels)
    print(summary)
    return summary


# ---- what to do ---------------------------------------------------------------------------------


def _check(options: Options, workers: int, max_failures, runner: str, beam_options: str) -> None:
    for field in ("short_side", "store_stride", "clips_per_shard"):
        if getattr(options, field) < 1:
            raise InputError(f"{field} is {getattr(options, field)}; give 1 or more")
    if not 1 <= options.quality <= 100:
        raise InputError(f"quality is {options.quality}; give 1 to 100")
    for field in ("fps", "segment_seconds"):
        value = getattr(options, field)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{field} is {value}; give a number above 0")
    if workers < 0:
        raise InputError(f"workers is {workers}; give 1 or more, or 0 for all processors")
    if max_failures is not None and max_failures < 0:
        raise InputError(f"max_failures is {max_failures}; give 0 or more")
    if runner not in RUNNERS:
        raise InputError(f"there is no runner '{runner}'; give one of {', '.join(RUNNERS)}")
    if beam_options and runner != "beam":
        raise InputError("beam_options are given, but the runner is local; add --runner=beam")
    if not re.fullmatch("[a-z][a-z0-9_]*", options.name):
        raise InputError(f"name '{options.name}' must be lower case letters, digits, underscores")


def _claim(output: epath.Path, options: Options, listing: Listing) -> None:
    """Says in the output what it is prepared from; refuses one that says otherwise."""
    # Not the path: a video that was missing may come under any name.
    clips = [(clip.id, clip.label, clip.split) for clip in listing.clips]
    fingerprint = hashlib.sha256(repr((clips, listing.labels)).encode()).hexdigest()
    claim = {**asdict(options), "clips": fingerprint}
    path = output / OPTIONS_FILE
    if not path.exists():
        if (output / INFO_FILE).exists():
            raise InputError(f"{output} holds a data set not made here; choose another output")
        write_atomically(path, json.dumps(claim, indent=1).encode())
        return
    earlier = json.loads(path.read_text())
    if earlier == claim:
        return
    differing = [
        f"{key} {earlier.get(key)} there, {claim[key]} now"
        for key in asdict(options)
        if earlier.get(key) != claim[key]
    ]
    if earlier.get("clips") != fingerprint:
        differing.append("another list of clips")
    raise InputError(
        f"{output} was prepared otherwise ({'; '.join(differing)}); choose another output"
    )


def _shards(output: epath.Path, clips: Sequence[Clip], options: Options) -> list[Shard]:
    """Deals the clips of each split out, in the order of a hash, so that shards mix classes."""
    by_split = defaultdict(list)
    for clip in sorted(clips, key=lambda clip: annotations_lib.hash_of(clip.id)):
        by_split[clip.split].append(clip)
    shards = []
    for split, members in sorted(by_split.items()):
        count = -(-len(members) // options.clips_per_shard)
        for i in range(count):
            # The file name that TFDS looks for.
            file = f"{options.name}-{split}.tfrecord-{i:05d}-of-{count:05d}"
            shards.append(Shard(os.fspath(output / file), split, tuple(members[i::count])))
    return shards


def _is_done(shard: Shard, missing: frozenset[str]) -> bool:
    """Whether a shard is written, and no video that it lacked has come since."""
    return shard.is_done() and not any(
        row["reason"] == MISSING and row["id"] not in missing
        for row in shard.read_manifest()["failures"]
    )


# ---- the runners --------------------------------------------------------------------------------


def _write_here(shards: Sequence[Shard], work: tuple, processes: int, max_failures) -> None:
    """Writes shards by processes on this machine; a clip that crashes one is left out."""
    todo = {shard.name: shard for shard in shards}
    crashed = defaultdict(dict)
    with tqdm(total=sum(len(s.clips) for s in shards), unit="clip", desc="preparing") as bar:
        progress = _Progress(bar, todo, max_failures)
        while todo:
            events = CONTEXT.SimpleQueue()
            try:
                with worker_pool(min(processes, len(todo)), events) as pool:
                    tasks = {
                        pool.submit(shards_lib.write, shard, *work, crashed[name]): name
                        for name, shard in todo.items()
                    }
                    while tasks:
                        done, _ = wait(tasks, timeout=0.2, return_when=FIRST_COMPLETED)
                        progress.listen(events)
                        for task in done:
                            task.result()
                            del todo[tasks.pop(task)]
            except WorkerCrash as crash:
                progress.listen(events)
                for process, how in crash.crashed.items():
                    shard = todo[progress.shard_of(process)]
                    clip = shard.clips[progress.finished(shard.name)]
                    crashed[shard.name][clip.id] = how
                    tqdm.write(
                        f"{clip.path} crashed the decoder ({how}); going on without it", sys.stderr
                    )


class _Progress:
    """What the writers of shards told last (see `shards.write`), shown on a bar."""

    def __init__(self, bar: tqdm, shard_names: Iterable[str], max_failures: int | None):
        self._bar, self._max_failures = bar, max_failures
        self._told = dict.fromkeys(shard_names, (0, 0))
        self._shard_of = {}

    def listen(self, events) -> None:
        while not events.empty():
            process, name, *self._told[name] = events.get()
            self._shard_of[process] = name
        finished, failed = (sum(column) for column in zip(*self._told.values()))
        if failed:
            self._bar.set_postfix_str(f"{failed} failed", refresh=False)
        if finished != self._bar.n:
            self._bar.update(finished - self._bar.n)
        _require_few(failed, self._max_failures)

    def shard_of(self, process: int) -> str:
        if process not in self._shard_of:
            raise InputError("a worker crashed before its first clip; run the same command again")
        return self._shard_of[process]

    def finished(self, shard_name: str) -> int:
        return self._told[shard_name][0]


def _write_on_beam(shards: Sequence[Shard], work: tuple, options: str) -> None:
    """Writes shards by Apache Beam, a shard an element."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise InputError("--runner=beam needs Apache Beam: pip install '.[beam]'") from error
    pipeline = beam.Pipeline(options=PipelineOptions(shlex.split(options)))
    with pipeline:
        _ = (
            pipeline
            | "shards" >> beam.Create(shards)
            # Otherwise one worker may get them all.
            | "spread" >> beam.Reshuffle()
            | "write" >> beam.Map(shards_lib.write, *work)
        )


# ---- the description ----------------------------------------------------------------------------


def _write_description(output: epath.Path, shards, names, options: Options) -> None:
    by_split = defaultdict(list)
    for shard in shards:
        by_split[shard.split].append((shard.name, shard.read_manifest()))
    for split, contents in by_split.items():
        if not any(manifest["records"] for _, manifest in contents):
            first = contents[0][1]["failures"][0]
            raise InputError(
                f"none of the clips of {split} could be decoded (first: {first['path']}:"
                f" {first['reason']}); see {output / FAILURES_FILE}"
            )
    records = shards_lib.import_records()
    for split, contents in by_split.items():
        rows = [
            {**row, "shard": i}
            for i, (_, manifest) in enumerate(contents)
            for row in manifest["records"]
        ]
        number = {video: i for i, video in enumerate(dict.fromkeys(row["video"] for row in rows))}
        rows = [{**row, "video": number[row["video"]]} for row in rows]
        records.write_index(os.fspath(output), split, [name for name, _ in contents], rows)
    records.write_metadata(
        os.fspath(output),
        options.name,
        names,
        {split: [len(m["records"]) for _, m in contents] for split, contents in by_split.items()},
        {split: sum(m["bytes"] for _, m in contents) for split, contents in by_split.items()},
    )


def _undecodable(manifest: Mapping) -> int:
    return sum(row["reason"] != MISSING for row in manifest["failures"])


def _require_few(failures: int, most: int | None) -> None:
    if most is not None and failures > most:
        raise InputError(
            f"{failures} clips could not be decoded, more than --max_failures={most}; see"
            f" {FAILURES_FILE} in the output, and mend them or allow more: finished shards are kept"
        )


def _write_failures(output: epath.Path, manifests: Sequence[Mapping]) -> None:
    text = io.StringIO()
    columns = ["id", *(field.name for field in fields(Clip) if field.name != "name"), "reason"]
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    failures = [failure for manifest in manifests for failure in manifest["failures"]]
    writer.writerows(sorted(failures, key=lambda row: row["id"]))
    write_atomically(output / FAILURES_FILE, text.getvalue().encode())


def _summary(output: epath.Path, shards: Sequence[Shard], names: Sequence[str]) -> Summary:
    clips, records, failures, num_bytes = defaultdict(int), defaultdict(int), 0, 0
    for shard in shards:
        manifest = shard.read_manifest()
        clips[shard.split] += len({row["video"] for row in manifest["records"]})
        records[shard.split] += len(manifest["records"])
        failures += len(manifest["failures"])
        num_bytes += manifest["bytes"]
    return Summary(os.fspath(output), dict(clips), dict(records), len(names), failures, num_bytes)
