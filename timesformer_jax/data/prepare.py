"""Clips to TFRecord shards, by a pool of processes, each shard whole or not there at all.

Everything in the output follows from the clips and the options alone, so that a run that was
killed, at any moment, goes on where it was and ends with the same bytes. In the order written:

    prepare.json             the options, and a fingerprint of the clips
    NAME-SPLIT.tfrecord-*    a shard, renamed from *.part when it is whole
    manifests/SHARD.json     its index rows and failures; a shard is done once this is there
    failures.csv             clips that could not be decoded, and why
    SPLIT.index.npz, labels.txt, features.json, dataset_info.json     see records.py
"""

import csv
import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from timesformer_jax.data import annotations as annotations_lib
from timesformer_jax.data.annotations import Clip
from timesformer_jax.data.decode import VideoError, VideoFile
from timesformer_jax.errors import InputError

OPTIONS_FILE = "prepare.json"
FAILURES_FILE = "failures.csv"
MANIFESTS = "manifests"

# A serialized Example cannot exceed 2 GiB; far below that, a record is no longer quick to read.
MAX_CLIP_BYTES = 1 << 30


@dataclass(frozen=True)
class Options:
    """What decides the bytes of a shard, beside its clips; see `prepare`."""

    short_side: int
    quality: int
    store_stride: int
    records_per_shard: int
    name: str


@dataclass(frozen=True)
class Summary:
    """What a prepared directory holds.

    output: the directory. clips: how many records each split has. classes: how many labels.
    failures: how many clips could not be decoded; failures.csv lists them.
    num_bytes: of all shards.
    """

    output: str
    clips: dict[str, int]
    classes: int
    failures: int
    num_bytes: int

    def __str__(self) -> str:
        lines = [f"{self.output}: {self.classes} classes, {self.num_bytes / 1e6:.1f} MB"]
        lines += [f"  {split}: {count} clips" for split, count in self.clips.items()]
        if self.failures:
            listed = os.path.join(self.output, FAILURES_FILE)
            lines.append(f"  {self.failures} clips could not be decoded; {listed} says why")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Shard:
    """A shard to write: the work of one task."""

    path: Path
    split: str
    clips: tuple[Clip, ...]

    @property
    def manifest(self) -> Path:
        return self.path.parent / MANIFESTS / f"{self.path.name}.json"

    def is_done(self) -> bool:
        return (
            self.manifest.exists()
            and self.path.exists()
            and self.path.stat().st_size == self.read_manifest()["bytes"]
        )

    def read_manifest(self) -> dict:
        return json.loads(self.manifest.read_text())


def prepare(
    videos: str | os.PathLike,
    output: str | os.PathLike,
    annotations: str | os.PathLike | None = None,
    labels: str | os.PathLike | None = None,
    short_side: int = 256,
    quality: int = 90,
    store_stride: int = 1,
    records_per_shard: int = 32,
    workers: int = 0,
    validation_fraction: float = 0.1,
    name: str = "videos",
) -> Summary:
    """Prepares a data set: decodes its clips and writes them as TFRecord shards.

    Killed and run again with the same arguments, it finishes; run once more, it says that all is
    done. Clips that cannot be decoded are left out and listed with the reason in failures.csv.

    Args:
      videos: the folder that holds the video files.
      output: the directory to write, made if it is not there.
      annotations: a csv of clips; None: a folder a class. See `annotations.read`.
      labels: a file with a label name a line, which fixes the classes and their order; None: the
        labels met, sorted.
      short_side: pixels; the shorter side of the stored frames.
      quality: of the stored JPEGs (4:2:0), 1 to 100.
      store_stride: every how many source frames one is stored. A clip's record is read whole, so
        its size is the speed of the input; 4 moves a sampled frame by at most 2.
      records_per_shard: clips a shard at most.
      workers: processes; 0: as many as there are processors.
      validation_fraction: share of the clips without a split that goes to validation.
      name: of the data set, as the file names begin.

    Returns:
      What was prepared; it is printed as well. Progress goes to standard error.

    Raises:
      InputError: arguments or annotations that cannot be used, an output that other options or
        clips were prepared to, a split of which no clip could be decoded, a full disk, a killed
        worker. Shards that are finished stay.
    """
    options = Options(short_side, quality, store_stride, records_per_shard, name)
    _check(options, workers)
    names = None if labels is None else annotations_lib.read_labels(labels)
    listing = annotations_lib.read(videos, annotations, names, validation_fraction)
    clips, names = list(listing.clips), listing.labels
    output = Path(os.path.abspath(output))
    with disk_errors(output):
        (output / MANIFESTS).mkdir(parents=True, exist_ok=True)
        with _locked(output):
            return _prepare(Path(videos), output, clips, names, options, workers)


def _prepare(videos, output, clips, names, options, workers) -> Summary:
    _claim(output, options, clips, names)
    shards = _shards(output, clips, options)
    complete = output / "dataset_info.json"
    if complete.exists() and all(shard.is_done() for shard in shards):
        print("already prepared, nothing to do")
    else:
        complete.unlink(missing_ok=True)
        for leftover in (*output.glob("*.part"), *(output / MANIFESTS).glob("*.part")):
            leftover.unlink()
        _write_shards(videos, shards, names, options, workers)
        _write_description(output, shards, names, options)
    summary = _summary(output, shards, names)
    print(summary)
    return summary


# ---- what to do ---------------------------------------------------------------------------------


def _check(options: Options, workers: int) -> None:
    for field in ("short_side", "store_stride", "records_per_shard"):
        if getattr(options, field) < 1:
            raise InputError(f"{field} is {getattr(options, field)}; give 1 or more")
    if not 1 <= options.quality <= 100:
        raise InputError(f"quality is {options.quality}; give 1 to 100")
    if workers < 0:
        raise InputError(f"workers is {workers}; give 1 or more, or 0 for all processors")
    if not re.fullmatch("[a-z][a-z0-9_]*", options.name):
        raise InputError(f"name '{options.name}' must be lower case letters, digits, underscores")


def _claim(output: Path, options: Options, clips: Sequence[Clip], names: Sequence[str]) -> None:
    """Says in the output what it is prepared from; refuses one that says otherwise."""
    fingerprint = hashlib.sha256(repr((clips, names)).encode()).hexdigest()
    claim = {**asdict(options), "clips": fingerprint}
    path = output / OPTIONS_FILE
    if not path.exists():
        if (output / "dataset_info.json").exists():
            raise InputError(f"{output} holds a data set not made here; choose another output")
        write_whole(path, json.dumps(claim, indent=1).encode())
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


def _shards(output: Path, clips: Sequence[Clip], options: Options) -> list[_Shard]:
    """Deals the clips of each split out, in the order of a hash, so that shards mix classes."""
    by_split = defaultdict(list)
    for clip in sorted(clips, key=lambda clip: annotations_lib.hash_of(clip.id)):
        by_split[clip.split].append(clip)
    shards = []
    for split, members in sorted(by_split.items()):
        count = -(-len(members) // options.records_per_shard)
        for i in range(count):
            # The file name that TFDS looks for.
            file = f"{options.name}-{split}.tfrecord-{i:05d}-of-{count:05d}"
            shards.append(_Shard(output / file, split, tuple(members[i::count])))
    return shards


# ---- the pool -----------------------------------------------------------------------------------


def _write_shards(videos, shards, names, options, workers) -> None:
    todo = [shard for shard in shards if not shard.is_done()]
    total = sum(len(shard.clips) for shard in shards)
    done = total - sum(len(shard.clips) for shard in todo)
    if not todo:
        return
    with (
        tqdm(total=total, initial=done, unit="clip", desc="preparing") as progress,
        worker_pool(min(workers or processors(), len(todo))) as pool,
    ):
        tasks = {pool.submit(_write_shard, videos, shard, names, options): shard for shard in todo}
        for task in as_completed(tasks):
            task.result()
            progress.update(len(tasks[task].clips))


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool that is gone as soon as anything goes wrong: what is half done is done again."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers,
        # TensorFlow does not survive a fork, and some decoders do not either.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    )
    try:
        yield pool
        pool.shutdown()
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise InputError(
                "a worker process was killed (out of memory?); run the same command again, with"
                " fewer workers if it recurs: finished shards are kept"
            ) from error
        raise


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # TensorFlow is here to write files; it would take the accelerator's memory all the same.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent killed with -9 cannot tell its workers, who would go on writing."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- a shard, in a worker -----------------------------------------------------------------------


def _write_shard(videos: Path, shard: _Shard, names: Sequence[str], options: Options) -> None:
    records = _import_records()
    definition = records.features(names)
    rows, failures = [], []
    # Named by process, so that a straggler of a run before cannot spoil what is written here.
    temporary = shard.path.with_name(f"{shard.path.name}.{os.getpid()}.part")
    try:
        with records.ShardWriter(os.fspath(temporary)) as writer:
            for clip in shard.clips:
                try:
                    example, shape = _encode(videos, clip, options)
                except VideoError as error:
                    failures.append({**asdict(clip), "reason": str(error)})
                    continue
                place = writer.write(records.serialize(definition, example))
                columns = {key: example[key] for key in ("id", "fps", "stride", "num_frames")}
                label = names.index(clip.label)
                rows.append({**columns, **shape, **place, "label": label, "video": clip.id})
        _sync(temporary)
        size = temporary.stat().st_size
        os.replace(temporary, shard.path)
    finally:
        temporary.unlink(missing_ok=True)
    manifest = {"bytes": size, "records": rows, "failures": failures}
    write_whole(shard.manifest, json.dumps(manifest).encode())


def _encode(videos: Path, clip: Clip, options: Options) -> tuple[dict, dict[str, int]]:
    """Decodes a clip; returns its record (`records.features`) and the frames' height and width."""
    jpegs, stored_bytes = [], 0
    with VideoFile(videos / clip.path) as video:
        for position, frame in enumerate(video.frames(clip.start, clip.end)):
            if position % options.store_stride:
                continue
            rgb = video.rgb(frame, options.short_side)
            jpegs.append(_jpeg(rgb, options.quality))
            stored_bytes += len(jpegs[-1])
            if stored_bytes > MAX_CLIP_BYTES:
                raise VideoError(
                    "over 1 GiB as one record; trim it (start, end) or raise the stride"
                )
        example = {
            "video": jpegs,
            "label": clip.label,
            "id": clip.id,
            "fps": video.info.fps,
            "stride": options.store_stride,
            "num_frames": position + 1,
        }
    return example, {"height": rgb.shape[0], "width": rgb.shape[1]}


def _jpeg(rgb, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def _import_records():
    """Imports TensorFlow where it is first needed, without what it says of CUDA."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Its libraries write to the descriptor before they read the log level.
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)
    try:
        from timesformer_jax.data import records
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    return records


# ---- the description ----------------------------------------------------------------------------


def _write_description(output: Path, shards, names, options) -> None:
    manifests = {shard: shard.read_manifest() for shard in shards}
    _write_failures(output, manifests.values())
    by_split = _by_split(manifests)
    for split, contents in by_split.items():
        if not any(manifest["records"] for manifest in contents.values()):
            first = next(iter(contents.values()))["failures"][0]
            raise InputError(
                f"none of the clips of {split} could be decoded (first: {first['path']}:"
                f" {first['reason']}); see {output / FAILURES_FILE}"
            )
    records = _import_records()
    for split, contents in by_split.items():
        rows = [
            {**row, "shard": i}
            for i, manifest in enumerate(contents.values())
            for row in manifest["records"]
        ]
        number = {name: i for i, name in enumerate(dict.fromkeys(row["video"] for row in rows))}
        rows = [{**row, "video": number[row["video"]]} for row in rows]
        records.write_index(os.fspath(output), split, [shard.path.name for shard in contents], rows)
    records.write_metadata(
        os.fspath(output),
        options.name,
        names,
        {
            split: [len(m["records"]) for m in contents.values()]
            for split, contents in by_split.items()
        },
        {split: sum(m["bytes"] for m in contents.values()) for split, contents in by_split.items()},
    )


def _by_split(manifests: Mapping[_Shard, dict]) -> dict[str, dict[_Shard, dict]]:
    by_split = defaultdict(dict)
    for shard, manifest in manifests.items():
        by_split[shard.split][shard] = manifest
    return by_split


def _write_failures(output: Path, manifests) -> None:
    text = io.StringIO()
    columns = ["path", "start", "end", "label", "split", "reason"]
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    failures = [failure for manifest in manifests for failure in manifest["failures"]]
    writer.writerows(sorted(failures, key=lambda row: (row["path"], row["start"] or 0)))
    write_whole(output / FAILURES_FILE, text.getvalue().encode())


def _summary(output: Path, shards: Sequence[_Shard], names: Sequence[str]) -> Summary:
    clips, failures, num_bytes = defaultdict(int), 0, 0
    for shard in shards:
        manifest = shard.read_manifest()
        clips[shard.split] += len(manifest["records"])
        failures += len(manifest["failures"])
        num_bytes += manifest["bytes"]
    return Summary(os.fspath(output), dict(clips), len(names), failures, num_bytes)


# ---- the disk -----------------------------------------------------------------------------------


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file such that it is there whole or not at all, even if the power goes."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keeps a second run out; the system drops the lock with the process, however it ends."""
    descriptor = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another run is preparing {output}; wait for it, or end it"
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"disk full at {output}; free space and run the same command again: finished"
                " shards are kept"
            ) from error
        raise InputError(f"cannot write {output}: {error.strerror or error}") from error
