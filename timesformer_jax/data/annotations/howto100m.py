"""HowTo100M as the paper uses it: the class of a video is its task (section 4.6)."""

from collections import Counter
from collections.abc import Sequence

from etils import epath

from timesformer_jax.data.annotations.clips import Clip, ParsedAnnotations, clip_hash
from timesformer_jax.data.annotations.files import (
    AnnotationFiles,
    nonblank_lines,
    parse_integer,
    parse_split,
    read_table,
)
from timesformer_jax.data.annotations.videos import VideoFolder
from timesformer_jax.errors import InputError

# The paper uses the 1059 tasks with at least this many videos.
MIN_VIDEOS = 100

# The ratio of the paper's 85K training and 35K test videos, whose lists are not published.
TRAIN_SHARE, TEST_SHARE = 85, 35

_COLUMNS = ("video_id", "rank", "task_id")
_HINT = "give the publisher's HowTo100M_v1.csv"


def read(
    folder: VideoFolder, annotations: AnnotationFiles, labels: Sequence[str] | None
) -> ParsedAnnotations:
    """Reads HowTo100M_v1.csv and, if they exist, task_ids.csv (names) and split.csv.

    A video with several tasks belongs to the task that ranks it best. split.csv (video_id, split)
    lists the videos to use. Without it, these are the videos of all tasks with at least MIN_VIDEOS,
    and the split depends on the SHA-256 of a video's id: its first 8 bytes, as a big-endian number,
    modulo 120, are below 35 for test.
    """
    path = annotations.require("HowTo100M_v1.csv")
    tasks = _best_tasks(path)
    names = _task_names(annotations.find("task_ids.csv"), {task for _, task in tasks.values()})
    splits = _splits(annotations.find("split.csv"), tasks)
    if splits is None:
        videos = Counter(task for _, task in tasks.values())
        kept = {task for task, count in videos.items() if count >= MIN_VIDEOS}
        splits = {name: _hashed_split(name) for name, (_, task) in tasks.items() if task in kept}
        notes = (
            f"{len(kept):,} of {len(videos):,} tasks have {MIN_VIDEOS} videos or more; their"
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
    """For each video: the place that lists its task, and the task."""
    best: dict[str, tuple[int, int, str]] = {}
    for where, row in read_table(path, _COLUMNS, _HINT):
        rank, task = (parse_integer(where, name, row[name]) for name in _COLUMNS[1:])
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
    for number, (where, line) in enumerate(nonblank_lines(path)):
        task, _, name = line.partition("\t")
        if number == 0 and not task.isdecimal():
            continue  # a header
        if not name:
            raise InputError(f"{where} is not an id, a tab and a name; correct it")
        names[parse_integer(where, "task id", task)] = name.strip()
    # Several tasks may have the same title.
    titles = Counter(names.values())
    return {task: name if titles[name] == 1 else f"{name} ({task})" for task, name in names.items()}


def _splits(path: epath.Path | None, tasks: dict) -> dict[str, str] | None:
    if path is None:
        return None
    splits = {}
    for where, row in read_table(path, ("video_id", "split"), "give a csv with both columns"):
        name = row["video_id"]
        if name not in tasks:
            raise InputError(f"{where}: HowTo100M_v1.csv has no video '{name}'; correct the id")
        if name in splits:
            raise InputError(f"{where}: {name} is listed twice; remove one of the lines")
        splits[name] = parse_split(where, row["split"])
    return splits


def _hashed_split(name: str) -> str:
    draw = int.from_bytes(clip_hash(name)[:8]) % (TRAIN_SHARE + TEST_SHARE)
    return "test" if draw < TEST_SHARE else "train"
