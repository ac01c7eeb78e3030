"""Hostile input in great numbers: `python -m fuzz [KIND ...] [--seed=N]` in tests/, or `make fuzz`.

None may end in a traceback, hang, open another file, or succeed where nothing could. What is opened
is seen by an audit hook of Python, and by the system where FFmpeg opens it. Each kind prints what
became of how many; the exit status is 1 if anything went wrong.
"""

import argparse
import collections
import faulthandler
import os
import pathlib
import sys
import tempfile
import time
import traceback

from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzz import audit, commands, videos
from fuzz.canary import Canary
from timesformer_jax.checkpoints.load import load
from timesformer_jax.data.decode import isolated
from timesformer_jax.errors import InputError

# Seconds for one input. A machine may be busy; what hangs, hangs for longer.
PATIENCE = 120

KINDS = ("videos", "checkpoints", "commands")

REPOSITORY = pathlib.Path(__file__).parents[2]


class Count(collections.Counter):
    """What became of inputs of one kind; prints those that went wrong."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.wrong, self.begin = kind, 0, time.monotonic()

    def took(self, what: object, outcome: str, is_wrong: bool) -> None:
        self[outcome] += 1
        if is_wrong:
            self.wrong += 1
            print(f"WRONG {self.kind}: {outcome}: {what!r:.600}", flush=True)

    def check(self, what: str, found: object) -> None:
        """Counts what must not be, if it was found."""
        if found:
            self.took(found, what, True)

    def report(self) -> int:
        seconds = time.monotonic() - self.begin
        found = ", ".join(f"{number} {outcome}" for outcome, number in self.most_common())
        print(f"{self.kind}: {self.total()} in {seconds:.0f} s: {found}; {self.wrong} wrong")
        return self.wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("kinds", nargs="*", default=KINDS, help="by default all")
    parser.add_argument("--videos", type=int, default=300)
    parser.add_argument("--commands", type=int, default=300)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = parser.parse_args()
    print(f"seed {asked.seed}")
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        wrong = 0
        if "videos" in asked.kinds:
            wrong += fuzz_videos(root / "videos", asked.videos, asked.seed)
        if "checkpoints" in asked.kinds:
            wrong += fuzz_checkpoints(root / "checkpoints")
        if "commands" in asked.kinds:
            wrong += fuzz_commands(root / "commands", asked.commands, asked.seed)
    return min(wrong, 1)


def fuzz_videos(folder: pathlib.Path, count: int, number: int) -> int:
    """Hostile videos, decoded as by `predict`; then all of them by `check` and `prepare`."""
    label = folder / "videos" / "label"
    for each in (folder / "canary", label):
        each.mkdir(parents=True)
    canary = Canary(folder / "canary", videos.write_seeds(folder, ("mp4",))["mp4"])
    listed = videos.write_all(label, canary, count, number)
    found = Count("videos")
    with isolated():
        for path, may_succeed in listed:
            outcome = _outcome(lambda path=path: _decoded(path))
            found.took(path, outcome, outcome not in ("refused", *["decoded"] * may_succeed))
    # Here an audit hook sees what Python opens. A mutant could crash this process.
    allowed = (label, sys.prefix, sys.base_prefix, REPOSITORY)
    with audit.opens(allowed) as opened:
        for path, _ in listed:
            if "mutant" not in path:
                outcome = _outcome(lambda path=path: _decoded(path))
                others = opened.pop_all()
                found.took((path, others), f"here {outcome}", bool(others))
    os.chdir(folder)
    whole = ("check", "failures.csv", 0, ""), ("prepare", "data", 0, "")
    for name, output, expected, said in whole:
        words = [name, "--videos=videos", "--follow", "--workers=1", f"--output={output}"]
        status, _, errors = commands.run(words)
        is_wrong = status != expected or said not in errors
        found.took(errors[-300:], f"{name}: status {status}", is_wrong)
    found.check("another file was opened", canary.opened)
    canary.close()
    return found.report()


def _decoded(path: str) -> str:
    begin = time.monotonic()
    reason = videos.decode(path)
    if "hangs" in reason or time.monotonic() - begin > PATIENCE:
        return "hangs"
    return "crashes" if "crashes" in reason else "refused" if reason else "decoded"


def fuzz_checkpoints(folder: pathlib.Path) -> int:
    from fuzz import checkpoints  # which needs PyTorch

    folder.mkdir()
    found = Count("checkpoints")
    for path, may_succeed in checkpoints.write_all(folder):
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        outcome = _outcome(lambda path=path: _loaded(path))
        faulthandler.cancel_dump_traceback_later()
        found.took(path, outcome, outcome not in ("refused", *["loaded"] * may_succeed))
    found.check("code ran", (folder / "code_ran").exists())
    return found.report()


def _loaded(path: str) -> str:
    try:
        load(path, needs_head=False)
    except InputError:
        return "refused"
    return "loaded"


def fuzz_commands(folder: pathlib.Path, count: int, number: int) -> int:
    """Bad command lines and configs, in this process, in an empty folder that must stay empty."""
    (folder / "here").mkdir(parents=True)
    (folder / "configs").mkdir()
    os.chdir(folder / "here")
    found = Count("commands")

    def one(words: list[str]) -> None:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        outcome = _outcome(lambda: _refusal(words))
        faulthandler.cancel_dump_traceback_later()
        found.took(words, outcome, outcome not in ("refused", "help"))

    often = {"deadline": None, "database": None, "phases": [Phase.generate],
             "suppress_health_check": list(HealthCheck)}  # fmt: skip
    recipe = os.fspath(REPOSITORY / "configs" / "finetune.py")
    for strategy in (commands.command_lines(), commands.training_lines(recipe, "run")):
        seed(number)(settings(max_examples=-(-count // 2), **often)(given(strategy)(one)))()
    commands.write_configs(folder / "configs")
    for name, (_, said) in commands.CONFIGS.items():
        config = os.fspath(folder / "configs" / name)
        status, _, errors = commands.run(["train", f"--config={config}", "--workdir=run"])
        good = status == 2 and said in errors and errors.count("\n") == 1
        found.took(errors, "config refused" if good else f"config: status {status}", not good)
    found.check("files were left", os.listdir())
    return found.report()


def _refusal(words: list[str]) -> str:
    """ "refused" or "help", or what a person would not expect."""
    status, _, errors = commands.run(words)
    if status == 0:
        return "help" if {"-h", "--help", "-help", "--version"} & set(words) else "succeeds"
    lines = [line for line in errors.splitlines() if not line.startswith(("W", "I", "E0000"))]
    is_line = status == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return "refused" if is_line else f"status {status}, {len(lines)} lines"


def _outcome(function) -> str:
    try:
        return function()
    except Exception as error:
        traceback.print_exc(limit=-4, file=sys.stdout)
        return f"Traceback: {type(error).__name__}"


if __name__ == "__main__":
    sys.exit(main())
