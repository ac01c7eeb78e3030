"""The rows of the paper's tables: what they train, what is kept, and what is compared."""

import json

import experiments_page
import numpy as np
import pytest
import run
from absl.testing import flagsaver
from paper_tables import ABLATED, TABLES

from timesformer_jax import recipes
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.schemes import SCHEMES

pytestmark = pytest.mark.compiles  # its imports are those of training

ROWS = {row.name: row for table in TABLES.values() for row in table.rows}


@pytest.fixture(autouse=True)
def kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments_page, "RESULTS", tmp_path / "experiments.json")
    monkeypatch.setattr(experiments_page, "PAGE", tmp_path / "experiments.md")
    monkeypatch.setattr(experiments_page, "DOCS", tmp_path)
    run.flags.FLAGS(["run"])
    for name, scheme in ABLATED.items():
        monkeypatch.setitem(SCHEMES, name, scheme)


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
        made.append(run.config_of(row, "motion", 1))
        assert made[-1].seed == 1
        assert bool(made[-1].pretrained) == bool(row.start)
    if row.arguments is not None:
        made.append(recipes.load(run.named("ssv2_base", row)))
    models = [TimeSformerConfig(**config.model.to_dict() | {"num_classes": 8}) for config in made]
    assert models


def test_killed_between_runs_it_goes_on(monkeypatch):
    done = []

    def trained(row, task, seed):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((task, row.name, seed))
        right = np.arange(10) < 6
        packed = np.packbits(right).tobytes().hex()
        return {"top1": 0.6, "right": packed, "videos": 10, "parameters": 5, "macs": 7}

    monkeypatch.setattr(run, "run", trained)
    table = {"table4": TABLES["table4"]}
    with flagsaver.flagsaver(seeds=1):
        with pytest.raises(KeyboardInterrupt):
            run.run_tables(table)
        first = list(done)
        assert len(json.loads(experiments_page.RESULTS.read_text())) == 3
        done.clear()
        run.run_tables(table)
    rows = [row.name for row in TABLES["table4"].rows]
    assert first + done == [(task, row, 0) for task in run.TASKS for row in rows]
    experiments_page.write()
    page = experiments_page.PAGE.read_text()
    assert page.count("## ") == len([t for t in TABLES.values() if t.rows[0].name == "divided"]) + 1
    assert "| no positions | 75.4 | 45.8 | 60.0 | 60.0 | 1; 1 | 5 | 0.0 |" in page


def test_p_is_small_for_a_difference_and_not_for_chance():
    rng = np.random.default_rng(0)

    def runs(share):
        rights = [rng.uniform(size=800) < share for _ in range(3)]
        return [{"right": np.packbits(r).tobytes().hex(), "videos": 800} for r in rights]

    same = [float(experiments_page._p(runs(0.8), runs(0.8))) for _ in range(5)]
    assert float(experiments_page._p(runs(0.8), runs(0.9))) < 0.001
    assert min(same) > 0.001
    assert max(same) > 0.1
