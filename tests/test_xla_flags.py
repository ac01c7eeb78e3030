"""experiments/xla_flags.py: gains come from pairs of runs; processes run for unknown flags."""

import importlib
import json
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY

SETTINGS = {"preset": "timesformer_tiny", "workload": "inference", "batch_size": 1, "dtype": None}


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    sys.path.insert(0, str(REPOSITORY / "experiments"))
    yield importlib.import_module("xla_flags")
    sys.path.remove(str(REPOSITORY / "experiments"))


@pytest.fixture
def listed(script):
    return [script.Flag("cpu", "--a", "first"), script.Flag("cpu", "--c", "last")]


def test_every_listed_flag_is_of_a_platform(script):
    assert {flag.platform for flag in script.FLAGS} == {"gpu", "cpu"}
    assert len({flag.text for flag in script.FLAGS}) == len(script.FLAGS)


def test_an_unknown_flag_is_reported_in_one_line(script):
    with pytest.raises(script.MeasurementError, match="Unknown flag") as error:
        script.rate("--xla_no_such_flag=true", SETTINGS, "", time.monotonic() + 300)
    assert "--xla_no_such_flag=true" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_gain_is_the_ratio_of_a_pair(script, listed, monkeypatch, tmp_path, capsys):
    reason = "does not fit: needs 9 of 8 GiB"
    rates = iter([10.0, 12.0, 10.0, script.MeasurementError(reason), 20.0, 18.0])

    def rate(*_):
        found = next(rates)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(script, "rate", rate)
    path = tmp_path / "flags.json"
    script.measure(listed, SETTINGS, path=str(path), about={"versions": {"jax": "1"}})
    figures = json.loads(path.read_text())
    assert figures["versions"] == {"jax": "1"}
    first, last = figures["rows"]
    assert first["gain"] == pytest.approx({"median": 1.05, "min": 0.9, "max": 1.2})
    assert first["clips_per_second"] == [[12.0, 10.0], [18.0, 20.0]]
    assert (last["status"], last["reason"]) == ("failed", reason)
    assert "+5.0% (-10.0% to +20.0%)" in capsys.readouterr().out


def test_what_is_stopped_leaves_what_was_measured(script, listed, monkeypatch, tmp_path, capsys):
    rates = iter([10.0, 12.0])

    def rate(flag, settings, cache, deadline):
        for found in rates:
            return found
        raise subprocess.TimeoutExpired("benchmark model", deadline)

    monkeypatch.setattr(script, "rate", rate)
    path = tmp_path / "flags.json"
    script.measure(listed, SETTINGS, path=str(path))
    first, last = json.loads(path.read_text())["rows"]
    assert first["gain"]["median"] == pytest.approx(1.2)
    assert (last["status"], last["reason"]) == ("not run", "no time left")
    assert capsys.readouterr().out.splitlines()[-1].startswith("not run: no time left")


def test_a_process_is_stopped_at_the_deadline(script):
    with pytest.raises(subprocess.TimeoutExpired):
        script.rate("", SETTINGS, "", time.monotonic() + 0.1)


def test_without_a_rate_the_script_ends_with_one_line(script, monkeypatch):
    def rate(*_):
        raise script.MeasurementError("no device")

    monkeypatch.setattr(script, "first_device", lambda: ("cpu", "a CPU"))
    monkeypatch.setattr(script, "rate", rate)
    with pytest.raises(SystemExit, match="nothing to compare flags with: no device"):
        script.main([])


def test_a_wrong_workload_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--workload=trainin"])
    assert "choose from" in (error := capsys.readouterr().err)
    assert all(name in error for name in ("inference", "training"))
