"""What XLA's flags gain: from pairs of runs, real ones where a flag is not known."""

import json
import subprocess
import time

import jax
import pytest

from timesformer_jax.benchmark import flags
from timesformer_jax.benchmark.flags import Flag
from timesformer_jax.errors import InputError

SETTINGS = {"preset": "timesformer_tiny", "work": "inference", "batch_size": 1, "dtype": None}


def test_a_flag_that_xla_does_not_know_is_a_row():
    said = flags._rate("--xla_no_such_flag=true", SETTINGS, "", time.monotonic() + 300)
    assert "Unknown flag" in said
    assert "--xla_no_such_flag=true" in said
    assert "\n" not in said


@pytest.fixture
def listed(monkeypatch):
    found = Flag("cpu", "--a", "first"), Flag("gpu", "--b", "other"), Flag("cpu", "--c", "last")
    monkeypatch.setattr(flags, "_device", lambda: ("cpu", "a CPU"))
    monkeypatch.setattr(flags, "FLAGS", found)


def test_a_gain_is_of_pairs(listed, monkeypatch, tmp_path, capsys):
    rates = iter([10.0, 12.0, 10.0, "does not fit: needs 9 of 8 GiB", 20.0, 18.0])
    monkeypatch.setattr(flags, "_rate", lambda *_: next(rates))
    path = tmp_path / "flags.json"
    flags.benchmark_flags(json=str(path))
    figures = json.loads(path.read_text())
    assert figures["versions"] == {"jax": jax.__version__}
    first, last = figures["rows"]
    assert first["gain"] == pytest.approx({"median": 1.05, "least": 0.9, "largest": 1.2})
    assert first["clips_per_second"] == [[12.0, 10.0], [18.0, 20.0]]
    assert (last["status"], last["reason"]) == ("failed", "does not fit: needs 9 of 8 GiB")
    assert "+5.0% (-10.0% to +20.0%)" in capsys.readouterr().out


def test_what_is_stopped_leaves_what_was_measured(listed, monkeypatch, tmp_path, capsys):
    rates = iter([10.0, 12.0])

    def rate(flag, settings, cache, until):
        for found in rates:
            return found
        raise subprocess.TimeoutExpired("benchmark model", until)

    monkeypatch.setattr(flags, "_rate", rate)
    path = tmp_path / "flags.json"
    flags.benchmark_flags(json=str(path))
    first, last = json.loads(path.read_text())["rows"]
    assert first["gain"]["median"] == pytest.approx(1.2)
    assert (last["status"], last["reason"]) == ("not run", "no time left")
    assert capsys.readouterr().out.splitlines()[-1].startswith("not run: no time left")


def test_a_process_is_stopped_when_the_time_is_over():
    with pytest.raises(subprocess.TimeoutExpired):
        flags._rate("", SETTINGS, "", time.monotonic() + 0.1)


def test_where_nothing_can_be_measured_it_is_one_line(monkeypatch):
    monkeypatch.setattr(flags, "_rate", lambda *_: "no device")
    with pytest.raises(InputError, match="nothing to compare flags with: no device"):
        flags.benchmark_flags()
    with pytest.raises(InputError, match="there are inference, training"):
        flags.benchmark_flags(work="trainin")
