import os
import signal
import subprocess
import sys
import time

import pytest

from timesformer_jax.errors import InputError
from timesformer_jax.workers import report_progress, run_tasks, still_working


def double(task, numbers, crashed):
    """A task that doubles numbers and skips those in `crashed`; a negative number crashes."""
    doubled = {}
    for finished, number in enumerate(numbers):
        report_progress(task, str(number), finished, failed=len(crashed))
        if str(number) in crashed:
            doubled[number] = crashed[str(number)]
        elif number < 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        else:
            doubled[number] = 2 * number
    report_progress(task, None, len(numbers), failed=len(crashed))
    return doubled


def crash_at_once(crashed):
    os.kill(os.getpid(), signal.SIGABRT)


def test_a_crash_costs_one_item(capsys):
    progress = []
    tasks = {"a": ("a", [1, -2, 3]), "b": ("b", [4, 5, -6])}
    results = run_tasks(double, tasks, 1, lambda *counts: progress.append(counts))
    assert results == {"a": {1: 2, -2: "SIGSEGV", 3: 6}, "b": {4: 8, 5: 10, -6: "SIGSEGV"}}
    assert progress[-1][0] == 6
    said = capsys.readouterr().err
    for item in (-2, -6):
        assert f"{item} crashed a worker process (SIGSEGV); continuing without it" in said


def test_a_crash_outside_of_an_item_is_one_clear_error():
    with pytest.raises(InputError, match=r"handled no clip; run the same command again"):
        run_tasks(crash_at_once, {"a": ()}, 1, lambda *_: None)


def stop(finished, failed):
    raise InputError(f"enough: {finished}")


def test_what_on_progress_raises_ends_the_run():
    with pytest.raises(InputError, match="enough"):
        run_tasks(double, {"a": ("a", [1, 2])}, 1, stop)


def hang(task, worked, crashed):
    """A task of two items; the first one hangs where only the system can end it."""
    report_progress(task, "first", 0)
    if "first" not in crashed:
        for _ in range(30):  # this goes on, slowly, and is not ended
            time.sleep(0.1)
            still_working()
        worked.touch()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        time.sleep(600)
    report_progress(task, None, 2)
    return crashed["first"]


def test_a_hang_costs_one_item(tmp_path):
    tasks = {"a": ("a", tmp_path / "worked")}
    assert run_tasks(hang, tasks, 1, lambda *_: None, stall_seconds=2) == {"a": "SIGALRM"}
    assert (tmp_path / "worked").exists()  # 3 seconds of work are no hang


def test_a_script_without_a_guard_is_told_of_it(tmp_path):
    """Its workers import the script, and with it start workers."""
    script = tmp_path / "script.py"
    script.write_text(
        "import math\n"
        "from timesformer_jax.workers import run_tasks\n"
        "run_tasks(math.hypot, {'a': ()}, 1, lambda *_: None)\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    last = ended.stderr.splitlines()[-1]
    assert "a worker process could not start, and its error is above" in last
    assert 'under `if __name__ == "__main__":`' in last


def be_killed(crashed):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("kept", "said"), [("", "$"), ("shards", ": shards are kept$")])
def test_what_is_kept_is_said_where_it_is(kept, said):
    with pytest.raises(InputError, match=f"was killed .* if it recurs{said}"):
        run_tasks(be_killed, {"a": ()}, 1, lambda *_: None, kept=kept)
