"""HowTo100M as the paper classifies it: the task that a video is for (section 4.6)."""

from collections import Counter
from collections.abc import Sequence

from etils import epath

from timesformer_jax.data.annotations.clips import Clip, ParsedAnnotations, clip_hash
from timesformer_jax.data.annotations.files import (
    AnnotationFiles,
    full_lines,
    integer,
    named_split,
    table,
)
from timesformer_jax.data.annotations.videos import VideoFolder
from timesformer_jax.errors import InputError

# The paper keeps tasks with at least so many videos: 1059 of them.
LEAST_VIDEOS = 100

# The paper's 85K videos for training and 35K for testing are not published as lists.
TRAIN_SHARE, TEST_SHARE = 85, 35

_COLUMNS = ("video_id", "rank", "task_id")
_SAYS = "give the publisher's HowTo100M_v1.csv"


def read(
    folder: VideoFolder, annotations: AnnotationFiles, labels: Sequence[str] | None
) -> ParsedAnnotations:
    """Reads HowTo100M_v1.csv, and where they are there task_ids.csv (names) and split.csv.

    A video that was found for several tasks is of the one that ranks it best. split.csv (video_id,
    split) lists the videos to use. Without it they are those of the tasks that have LEAST_VIDEOS
    or more, and a video's split follows from the SHA-256 of its id alone: its first 8 bytes, as a
    big-endian number, modulo 120, are below 35 for test.
    """
    path = annotations.require("HowTo100M_v1.csv")
    tasks = _best_tasks(path)
    names = _task_names(annotations.first("task_ids.csv"), {task for _, task in tasks.values()})
    splits = _splits(annotations.first("split.csv"), tasks)
    if splits is None:
        videos = Counter(task for _, task in tasks.values())
        kept = {task for task, count in videos.items() if count >= LEAST_VIDEOS}
        splits = {name: _split(name) for name, (_, task) in tasks.items() if task in kept}
        notes = (
            f"{len(kept):,} of {len(videos):,} tasks have {LEAST_VIDEOS} videos or more; their"
            f" videos are split {TRAIN_SHARE}:{TEST_SHARE} by a hash of the id",
        )
    else:
        notes = (f"split.csv lists {len(splits):,} of {len(tasks):,} videos",)
    rows = []
    for name, split in splits.items():
        where, task = tasks[name]
        file = folder.find(name) or f"{name}.mp4"
        rows.append((where, Clip(file, names[task], None, None, split, name=name)))
    return ParsedAnnotations(rows, notes=notes)


def _best_tasks(path: epath.Path) -> dict[str, tuple[str, int]]:
    """For each video where its task is listed, and the task."""
    best = {}
    for where, row in table(path, _COLUMNS, _SAYS):
        rank, task = (integer(where, name, row[name]) for name in _COLUMNS[1:])
        name = row["video_id"]
        if not name:
            raise InputError(f"{where} has no video_id; download the file again")
        if name not in best or (rank, task) < best[name][:2]:
            best[name] = (rank, task, where)
    return {name: (where, task) for name, (_, task, where) in best.items()}


def _task_names(path: epath.Path | None, tasks: set[int]) -> dict[int, str]:
    names = {task: str(task) for task in tasks}
    if path is None:
        return names
    for number, (where, line) in enumerate(full_lines(path)):
        task, _, name = line.partition("\t")
        if number == 0 and not task.isdecimal():
            continue  # a header
        if not name:
            raise InputError(f"{where} is not an id and a name with a tab between; write it so")
        names[integer(where, "task id", task)] = name.strip()
    # Two tasks may have one title.
    titles = Counter(names.values())
    return {task: name if titles[name] == 1 else f"{name} ({task})" for task, name in names.items()}


def _splits(path: epath.Path | None, tasks: dict) -> dict[str, str] | None:
    if path is None:
        return None
    splits = {}
    for where, row in table(path, ("video_id", "split"), "it needs both"):
        name = row["video_id"]
        if name not in tasks:
            raise InputError(f"{where}: HowTo100M_v1.csv has no video '{name}'; correct the id")
        if name in splits:
            raise InputError(f"{where}: {name} is listed twice; remove one of the lines")
        splits[name] = named_split(where, row["split"])
    return splits


def _split(name: str) -> str:
    draw = int.from_bytes(clip_hash(name)[:8]) % (TRAIN_SHARE + TEST_SHARE)
    return "test" if draw < TEST_SHARE else "train"
