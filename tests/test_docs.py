"""The pages: what they name is there, links lead somewhere, drawings and figures are the code's."""

import ast
import dataclasses
import re
import shlex

import jax
import numpy as np
import pytest
import scheme_drawings
import yaml
from conftest import REPOSITORY
from videos import write_video

import timesformer_jax as tsf
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.store import save_parameters
from timesformer_jax.cli import flags
from timesformer_jax.cli.commands import COMMANDS
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.models import presets
from timesformer_jax.models.schemes import SCHEMES
from timesformer_jax.models.timesformer import parameters
from timesformer_jax.models.tokens import Tokens

DOCS = REPOSITORY / "docs"
PAGES = {
    str(path.relative_to(REPOSITORY)): path.read_text()
    for path in sorted([*REPOSITORY.glob("*.md"), *DOCS.glob("*.md")])
}
FAQ = PAGES["docs/faq.md"]


def commands(page):
    """The command lines of the blocks of a page, each in one line, without `timesformer`."""
    lines = re.findall(r"^ *(?:[A-Z_]+=\S+ )?timesformer ((?:.*\\\n)*.*)$", page, re.MULTILINE)
    return [re.sub(r"\\\n *", "", line).split("  #")[0].strip() for line in lines]


def named(line):
    """The command that a command line names, of one word or two."""
    words = line.split()
    return next((name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS), None)


@pytest.mark.parametrize("name", PAGES)
def test_every_command_flag_config_and_target_named_is_there(name):
    from timesformer_jax import recipes
    from timesformer_jax.recipes import files

    page = PAGES[name]
    for line in commands(page):
        command = named(line)
        assert command, line
        values = COMMANDS[command].define_flags()
        for flag in re.findall(r"--([\w.]+)", line):
            if flag.startswith("config."):
                config = recipes.recipe()
                for part in flag.split(".")[1:]:
                    assert part in config, flag
                    config = config[part]
            else:
                assert flag in values, f"{flag} of {line}"
        for config in re.findall(r"--config=([^\s:`]+)", line):
            known = config in files.names() or (REPOSITORY / config).exists()
            assert known or config == "...", config
    for script in re.findall(r"python (experiments/\w+\.py)", page):
        assert (REPOSITORY / script).exists(), script
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"^    make (\w[\w-]*)", page, re.MULTILINE):
        assert f"\n{target}:" in makefile, target


def prose(page):
    """The page without its blocks of code."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)


def anchors(page):
    """The names that a browser can go to: the headings, as GitHub and MkDocs write them."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name):
    for target in re.findall(r"\]\((?!\w+:)([^)]+)\)", prose(PAGES[name])):
        path, _, anchor = target.partition("#")
        file = (REPOSITORY / name).parent / path if path else REPOSITORY / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


def test_the_fields_of_a_config_are_listed_with_their_defaults():
    from timesformer_jax import recipes
    from timesformer_jax.recipes.fit import flatten

    def shown(value):
        value = value if isinstance(value, tuple) else (value,)
        return ",".join(f"{x:g}" if isinstance(x, float) else str(x) for x in value) or '""'

    def fields(recipe):
        return {k: shown(v) for k, v in flatten(recipe).items() if not k.startswith("defaults.")}

    listed, paper, own = {}, fields(recipes.kinetics400()), fields(recipes.finetune())
    for row in PAGES["docs/recipes.md"].split("## Fields")[1].splitlines():
        if row.startswith("| `"):
            name, first, second, what = (cell.strip() for cell in row.strip("|").split("|"))
            assert what, name
            listed[name.strip("`")] = first.strip("`"), second.strip("`") or first.strip("`")
    assert listed == {name: (paper[name], own[name]) for name in paper}


def test_the_site_has_every_page_once():
    def pages(nav):
        for entry in nav:
            for value in entry.values():
                yield from pages(value) if isinstance(value, list) else [value]

    navigation = list(pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]))
    assert sorted(navigation) == sorted(path.name for path in DOCS.glob("*.md"))


def test_every_public_name_is_in_the_reference():
    written = set(re.findall(r"^::: (\S+)$", PAGES["docs/api.md"], re.MULTILINE))
    for name in tsf.__all__:
        assert f"timesformer_jax.{tsf._MODULES[name]}.{name}" in written, name


@pytest.mark.parametrize("line", commands(FAQ))
def test_the_commands_of_the_faq_are_understood(line):
    """With the values of their flags, and the fields of their configs."""
    name = named(line)
    words = shlex.split(line)[len(name.split()) :]
    flags.parse(name, COMMANDS[name], COMMANDS[name].define_flags(), words)


@pytest.mark.processes
@pytest.mark.compiles
def test_the_python_of_the_faq_runs(tmp_path, monkeypatch):
    """With a tiny checkpoint, and one of the twelve blocks of the base model."""
    base = dataclasses.replace(presets.PRESETS["timesformer_base"], depth=1, hidden_size=24)
    monkeypatch.setitem(presets.PRESETS, "timesformer_base", base)
    tiny = tsf.create(
        "timesformer_tiny", num_classes=2, image_size=16, num_frames=2, hidden_size=8, depth=1,
        num_heads=2,
    )  # fmt: skip
    metadata = CheckpointMetadata(tiny.config, ClipSpec(2, 4, 16, short_side=24), ("a", "b"), {})
    monkeypatch.chdir(tmp_path)
    save_parameters(tmp_path / "runs/mine", parameters(tiny), metadata)
    write_video(tmp_path / "new.mp4", frames=30)
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", FAQ, re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert names["label"] in ("a", "b")
    assert names["features"].frames.shape == (4, 3, 2, 8)
    assert names["heat"].sum() == pytest.approx(1)
    assert len(names["timeline"].times) > 3


@pytest.mark.parametrize("name", PAGES)
def test_python_blocks_can_be_parsed(name):
    for block in re.findall(r"^```python\n(.*?)^```", PAGES[name], re.MULTILINE | re.DOTALL):
        ast.parse(block)


def test_the_table_of_recipes_says_what_the_configs_say():
    rows = re.findall(
        r"^\| `(\w+)` \| .+? \| ([\d.]+)(?: \(([\d.]+)\))? \| .+? \| (\d+) \|$",
        PAGES["docs/recipes.md"], re.MULTILINE,
    )  # fmt: skip
    expected = []
    for path in sorted((REPOSITORY / "configs").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text()))
        if found := re.search(r"accuracy: ([\d.]+)(?: / ([\d.]+))? top-1", text):
            memory = re.search(r"`timesformer plan` says (\d+) GiB", text)
            expected.append((path.stem, found[1], found[2] or "", memory[1]))
        else:
            assert f"| `{path.stem}` |" in PAGES["docs/recipes.md"]
    assert sorted(rows) == sorted(expected)


def test_drawings_are_those_of_the_schemes():
    assert {path.stem for path in scheme_drawings.FOLDER.iterdir()} == set(SCHEMES)
    for scheme in SCHEMES:
        path = scheme_drawings.FOLDER / f"{scheme}.svg"
        assert path.read_text() == scheme_drawings.drawing(scheme)
        assert f"(schemes/{scheme}.svg)" in PAGES["docs/attention.md"]


@pytest.mark.parametrize("scheme", ["local_global", "axial", "joint"])
def test_what_is_drawn_is_what_the_model_attends_to(scheme):
    """A key is a patch whose value changes what the query receives."""
    frames, grid = scheme_drawings.FRAMES, scheme_drawings.GRID
    frame, row, column = scheme_drawings.QUERY
    count, position = grid[0] * grid[1], row * grid[1] + column
    for layer in SCHEMES[scheme].layers:
        sequences = int(layer.partition(frames, grid).max()) + 1
        rng = np.random.default_rng(0)
        cls = rng.standard_normal((1, sequences, 3, 1, 4)) if layer.joins_cls else None
        qkv = Tokens(cls, rng.standard_normal((1, frames, count, 3, 1, 4)))

        def received(qkv, layer=layer):
            return layer.attend(qkv, grid).patches[0, frame, position].sum()

        gradient = jax.jit(jax.grad(received))(qkv)
        reached = np.asarray(gradient.patches)[0, :, :, 2, 0].any(axis=-1)
        np.testing.assert_array_equal(
            reached.reshape(frames, *grid), scheme_drawings.keys(layer), err_msg=layer.name
        )
        if layer.joins_cls:
            assert np.asarray(gradient.cls)[..., 2, :, :].any()
