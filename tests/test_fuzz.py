"""A small part of `make fuzz`: bad command lines and configs are one line and leave nothing."""

import os

import pytest
from conftest import REPOSITORY
from fuzz import audit, commands
from hypothesis import HealthCheck, given, settings

FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
RECIPE = os.fspath(REPOSITORY / "configs" / "finetune.py")


@pytest.fixture
def empty(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert os.listdir() == []


def refused(words):
    status, out, errors = commands.run(words)
    if {"-h", "--help", "-help", "--version"} & set(words):
        return
    assert status == 2, (words, status, out)
    assert errors.splitlines()[-1].startswith("error: "), (words, errors)
    assert "Traceback" not in errors
    assert len(errors.splitlines()[-1]) < 2100


def test_any_command_line_works_or_gives_a_one_line_error(empty):
    FEW(given(commands.command_lines())(refused))()


def test_any_field_of_a_recipe_works_or_gives_a_one_line_error(empty):
    FEW(given(commands.training_lines(RECIPE, "run"))(refused))()


@pytest.mark.parametrize("name", commands.CONFIGS)
def test_an_error_in_a_config_is_told_with_its_file_and_line(name, tmp_path, empty, capsys):
    commands.write_configs(tmp_path)
    status, _, errors = commands.run(["train", f"--config={tmp_path / name}", "--workdir=run"])
    assert status == 2
    [line] = errors.splitlines()
    assert name in line
    assert commands.CONFIGS[name][1] in line


def test_the_audit_hook_sees_what_is_opened(tmp_path):
    """Otherwise `make fuzz` could not fail."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    (tmp_path / "in" / "link").symlink_to("../b")
    with audit.opens(allowed=[tmp_path / "in"]) as opened:
        (tmp_path / "in" / "a").read_text()
        assert opened.pop_all() == []
        (tmp_path / "b").read_text()
        (tmp_path / "in" / "link").read_text()
        assert opened.pop_all() == [f"open {tmp_path / 'b'}"] * 2
