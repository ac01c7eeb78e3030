"""What leaves the repository: the installed package, its description, the files of the images."""

import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import setuptools
from conftest import REPOSITORY, environment, tiny_run

import timesformer_jax
from timesformer_jax.cli import help as help_texts


def setup_arguments(monkeypatch, folder=REPOSITORY):
    """What setup.py tells setuptools."""
    found = {}
    monkeypatch.setattr(setuptools, "setup", found.update)
    monkeypatch.chdir(folder)
    runpy.run_path(os.fspath(folder / "setup.py"))
    return found


def test_the_version_is_the_same_everywhere(monkeypatch):
    version = timesformer_jax.__version__
    assert setup_arguments(monkeypatch)["version"] == version
    assert help_texts.version().startswith(f"timesformer {version} (")
    citation = (REPOSITORY / "CITATION.cff").read_text()
    assert re.findall(r"^version: (\S+)$", citation, re.MULTILINE) == [version]
    heading = re.search(r"^## (.+)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    dated = re.search(r"^date-released: (\S+)$", citation, re.MULTILINE)
    if version.endswith(".dev0"):
        assert heading == "Unreleased"
        assert dated is None or f"({dated[1]})" in (REPOSITORY / "CHANGELOG.md").read_text()
    else:
        assert dated
        assert heading == f"{version} ({dated[1]})"


@pytest.mark.parametrize("published", [False, True])
def test_the_page_of_the_package_has_no_link_that_leads_nowhere(monkeypatch, tmp_path, published):
    for name in ("setup.py", "README.md", "CITATION.cff", "timesformer_jax/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    citation = (REPOSITORY / "CITATION.cff").read_text()
    if published:
        citation += 'repository-code: "https://example.org/us/timesformer_jax"\n'
    (tmp_path / "CITATION.cff").write_text(citation)
    text = setup_arguments(monkeypatch, tmp_path)["long_description"]
    before = (REPOSITORY / "README.md").read_text()
    links = re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", text)
    assert all(re.match(r"https?://", address) for _, address in links)
    pictures = [address for mark, address in links if mark]
    if published:
        at = f"https://example.org/us/timesformer_jax/{{}}/v{timesformer_jax.__version__}"
        assert f"{at.format('raw')}/docs/demo.png" in pictures
        assert f"]({at.format('blob')}/docs/data.md)" in text
        assert len(links) == len(re.findall(r"\]\([^)]+\)", before))
    else:
        assert not pictures
        assert "docs/data.md has the" in text.replace("\n", " ")
    kept = re.compile(r"!?\[([^]]*)\]\([^)]*\)\n*|\s+")
    if published:  # nothing else was changed
        assert kept.sub(r"\1", text) == kept.sub(r"\1", before)


@pytest.mark.processes
@pytest.mark.training
def test_an_installed_package_needs_no_file_of_the_repository(demo_data, tmp_path):
    """In an empty folder: a person's own config, the demo, a prediction with what it trained."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    build = ["setup.py", "-q", "build_py", f"--build-lib={site}"]
    subprocess.run([sys.executable, *build], cwd=REPOSITORY, check=True, capture_output=True)
    package = REPOSITORY / "timesformer_jax"
    ours = {
        path.relative_to(package) for path in package.rglob("*.*")
        if path.suffix != ".pyc" and "__pycache__" not in path.name
    }  # fmt: skip
    there = {p.relative_to(site / package.name) for p in (site / package.name).rglob("*.*")}
    assert not ours - there
    configs = {pathlib.Path("configs", p.name) for p in (REPOSITORY / "configs").glob("*.py")}
    assert there - ours == configs

    empty.mkdir()
    (empty / "mine.py").write_text(
        "from timesformer_jax import recipes\n\n\ndef get_config():\n"
        "    config = recipes.kinetics400()\n    config.batch_size = 16\n    return config\n"
    )
    train = tiny_run(demo_data, "run", epochs=1, **{"eval.every_epochs": 0, "eval.crops": 1})
    train[1] = "--config=demo"
    video = next(demo_data.rglob("*.mp4"))
    code = f"""
import timesformer_jax
from timesformer_jax.cli.main import main
from timesformer_jax.errors import install
from timesformer_jax.recipes import load
print(timesformer_jax.__file__)
print(load("mine.py").batch_size, load("k400_base").clip.frames)
print(load("configs/k400_hr.py").clip.crop)
print(install("data"))
main(["timesformer", "checkpoints"])
main(["timesformer", *{train!r}])
main(["timesformer", "predict", {os.fspath(video)!r}, "--checkpoint=run", "--csv"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=empty, capture_output=True, text=True,
        env=environment() | {"PYTHONPATH": os.fspath(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:4] == [
        os.fspath(site / "timesformer_jax" / "__init__.py"),
        "16 8",
        "448",
        "pip install 'timesformer_jax[data]'",
    ]
    assert any("facebook/timesformer-base-finetuned-k400" in line for line in lines)
    assert any(line.startswith("top-1 ") for line in lines)
    assert lines[-1].startswith(os.fspath(video))
    assert (empty / "run" / "README.md").read_text().startswith("---\nlibrary_name:")


def test_images_are_built_from_what_is_there(monkeypatch):
    extras = setup_arguments(monkeypatch)["extras_require"]
    allowed = (REPOSITORY / ".dockerignore").read_text().split()
    for path in sorted((REPOSITORY / "docker").iterdir()):
        text = path.read_text()
        assert set(re.search(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)[1].split(",")) <= set(
            extras
        )
        for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
            for source in sources.split():
                assert (REPOSITORY / source).exists(), source
                assert f"!{source.split('/')[0]}" in allowed, source
        assert re.findall(r"^USER (\d+)$", text, re.MULTILINE) == ["1000"]
