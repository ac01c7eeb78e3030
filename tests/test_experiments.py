"""The rows of the paper's tables: what they train, what is kept, and what is compared."""

import json
import os
import shlex
import subprocess
import sys

import demo_runs
import experiments_page
import numpy as np
import paper_commands
import pytest
import run
from absl.testing import flagsaver
from paper_tables import ABLATED_SCHEMES, ROWS, TABLES

from timesformer_jax import recipes
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.schemes import IMPORT_VARIABLE, MODULES, SCHEMES

pytestmark = pytest.mark.compiles  # its imports are those of training


@pytest.fixture(autouse=True)
def kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments_page, "RESULTS", tmp_path / "experiments.json")
    monkeypatch.setattr(experiments_page, "PAGE", tmp_path / "experiments.md")
    monkeypatch.setattr(experiments_page, "DOCS", tmp_path)
    monkeypatch.setenv(IMPORT_VARIABLE, str(ABLATED_SCHEMES))
    run.flags.FLAGS(["run"])
    before = set(SCHEMES)
    yield
    for name in set(SCHEMES) - before:
        del SCHEMES[name], MODULES[name]


def test_a_name_is_one_row_in_all_tables():
    for table in TABLES.values():
        assert all(ROWS[row.name] == row for row in table.rows)
        assert {name for rows in table.lines.values() for name in rows.values()} <= set(ROWS)
        starts = {row.start for row in table.rows if row.start}
        names = [row.name for row in table.rows]
        assert all(start in names[: names.index(row.name)] for row in table.rows
                   for start in starts if row.start == start)  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_a_config_at_each_of_its_scales(name):
    row, made = ROWS[name], []
    if row.demo is not None:
        made.append(demo_runs.config_of("motion", row, 1, "runs"))
        assert made[-1].seed == 1
        assert bool(made[-1].pretrained) == bool(row.start)
    if row.arguments is not None:
        made.append(recipes.load(paper_commands.named("ssv2_base", row)))
    models = [TimeSformerConfig(**config.model.to_dict() | {"num_classes": 8}) for config in made]
    assert models


def test_killed_between_runs_it_goes_on(monkeypatch):
    done = []

    def trained(task, row, seed, folder):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((task, row.name, seed))
        right = np.arange(10) < 6
        packed = np.packbits(right).tobytes().hex()
        return {"top1": 0.6, "right": packed, "videos": 10, "parameters": 5, "macs": 7}

    monkeypatch.setattr(demo_runs, "run", trained)
    monkeypatch.setattr(demo_runs.jax.config, "update", lambda *_: None)
    table = TABLES["table4"]
    with flagsaver.flagsaver(seeds=1):
        with pytest.raises(KeyboardInterrupt):
            demo_runs.train_rows(run.at_the_demos_scale([table]), "runs")
        first = list(done)
        assert len(json.loads(experiments_page.RESULTS.read_text())) == 3
        done.clear()
        demo_runs.train_rows(run.at_the_demos_scale([table]), "runs")
    assert first + done == [(task, row.name, 0) for task in table.tasks for row in table.rows]
    experiments_page.write()
    page = experiments_page.PAGE.read_text()
    assert page.count("## ") == len([t for t in TABLES.values() if t.rows[0].name == "divided"]) + 2
    assert "| no positions | 75.4 | 45.8 | 60.0 | 60.0 | 1.000; 1.000 | -; - | 5 | 0.0 |" in page


def test_a_row_that_starts_from_another_trains_that_first(monkeypatch):
    trained = []

    class Stop(Exception):
        pass

    def train(config, workdir):
        trained.append((config.clip.frames, config.get("pretrained"), workdir))
        if len(trained) == 2:
            raise Stop

    monkeypatch.setattr(demo_runs, "train", train)
    with pytest.raises(Stop):
        demo_runs.run("motion", ROWS["divided, from the image model"], 1, "runs")
    (frames, _, image), (_, pretrained, _) = trained
    assert frames == 1
    assert pretrained == image


def test_the_papers_commands_can_be_run(tmp_path):
    """The shell script sets what the ablations' schemes need, and each command's config exists."""
    with flagsaver.flagsaver(only=["divided", "half_width_time", "no drop path", "ssv2_base"]):
        wanted = list(run.at_the_papers_scale([TABLES["ablations"], TABLES["table1"]]))
    paper_commands.write(wanted, "h100:8", str(tmp_path))
    lines = (tmp_path / "experiments.sh").read_text().splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("timesformer ")]
    assert [words[2].partition(":")[2] for words in commands] == [
        "",
        "attention=half_width_time",
        "",
    ]
    assert "--config.model.drop_path=0.0" in commands[2]
    assert sum(" h, " in line and "fits" in line for line in lines) == 3
    (export,) = [line for line in lines if line.startswith("export ")]
    name, path = shlex.split(export)[1].split("=")
    program = (
        "import sys; from timesformer_jax import recipes\n"
        "for name in sys.argv[1:]: print(recipes.load(name).model.attention)"
    )
    names = [words[2].partition("=")[2] for words in commands]
    done = subprocess.run([sys.executable, "-c", program, *names], env=os.environ | {name: path},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.split() == ["divided", "half_width_time", "divided"]


def test_an_unknown_table_or_topology_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no table 'table9', there are: all, table1"):
        run.main(["run", "table9"])
    with (
        flagsaver.flagsaver(scale="paper", topology="v9:4", workdir=str(tmp_path)),
        pytest.raises(SystemExit, match=r"^error: .*v9"),
    ):
        run.main(["run", "table1"])
    assert not list(tmp_path.iterdir())


def runs_of(shares, seed):
    rng = np.random.default_rng(seed)
    rights = [rng.uniform(size=800) < share for share in shares]
    return [
        {"right": np.packbits(r).tobytes().hex(), "videos": 800, "top1": r.mean()} for r in rights
    ]


def test_p_of_videos_is_small_for_a_difference_and_not_for_chance():
    p = experiments_page._p_of_videos
    same = [p(runs_of([0.8] * 3, seed), runs_of([0.8] * 3, seed + 9)) for seed in range(5)]
    assert p(runs_of([0.8] * 3, 0), runs_of([0.9] * 3, 1)) < 0.001
    assert min(same) > 0.001
    assert max(same) > 0.1


def test_p_of_seeds_is_that_of_their_differences():
    """One seed of ten that fell behind proves nothing of the row, though its videos differ."""
    p = experiments_page._p_of_seeds
    good, one_low = runs_of([0.9] * 3, 0), runs_of([0.9, 0.9, 0.3], 1)
    assert p(good, one_low) > 0.3
    assert experiments_page._p_of_videos(good, one_low) < 0.001
    assert p(good, runs_of([0.3, 0.31, 0.32], 2)) < 0.01
    assert p(good[:2], one_low[:2]) is None
