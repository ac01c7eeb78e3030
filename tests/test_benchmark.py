"""The benchmarks of attention, of the model and against PyTorch: what they count, do and refuse."""

import importlib
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY, environment
from hypothesis import given, settings
from hypothesis import strategies as st

from timesformer_jax import timing
from timesformer_jax.benchmark import attention, model, programs, report
from timesformer_jax.benchmark.machine import DevicePeak
from timesformer_jax.cli.main import load_command
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.errors import InputError
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.costs import comparisons, macs, parameter_count
from timesformer_jax.models.presets import preset
from timesformer_jax.models.schemes import SCHEMES
from timesformer_jax.models.timesformer import with_parameters
from timesformer_jax.transforms.preprocess import preprocess

pytestmark = pytest.mark.compiles

CONFIG = TimeSformerConfig(
    num_classes=3, image_size=16, num_frames=2, patch_size=8, hidden_size=8, depth=1, num_heads=2,
    init="width_scaled",
)  # fmt: skip
PEAK = DevicePeak("float32", {"wall": 1e12, "cpu": 1e12}, 2e12, 1e9)


class Clock:
    """Stands still but for what runs tell it."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing.time, "process_time", lambda: 2 * self.now)


@pytest.mark.parametrize(("each", "runs"), [(0.5, 1), (0.03, 4)])
def test_runs_are_timed_without_the_first(monkeypatch, each, runs):
    clock, started, waited = Clock(monkeypatch), [], []

    def run(i):
        clock.now += 100 if i == 0 else each
        started.append(i)
        return i

    found = timing.time_runs(run, waited.append, seconds=3, min_samples=2)
    assert started == list(range(len(started)))
    assert found.wall["median"] == pytest.approx(each)
    assert found.wall["max"] == pytest.approx(each)
    assert found.cpu["median"] == pytest.approx(2 * each)
    assert found.runs == runs
    assert 3 <= found.samples * runs * each < 4
    # Of a sample the last run is waited for, and it is the last that was started.
    assert waited[-1] == started[-1]
    assert len(waited) == 1 + found.samples + (runs > 1)


def test_slow_runs_are_sampled_as_often_as_asked(monkeypatch):
    clock = Clock(monkeypatch)
    took = iter([9.0, 7.0, 1.0, 2.0])

    def run(i):
        clock.now += next(took)

    found = timing.time_runs(run, lambda _: None, seconds=0, min_samples=3)
    assert found.wall == {"median": 2.0, "min": 1.0, "max": 7.0}


# ---- the search of the best batch ---------------------------------------------------------------


@given(
    fits=st.integers(0, 7),
    rates=st.lists(st.floats(1, 1e6), min_size=8, max_size=8),
    start=st.sampled_from([1, 3]),
)
@settings(deadline=None)
def test_batches_double_while_they_fit_and_the_rate_grows(fits, rates, start):
    def measure(size):
        n = round(math.log2(size / start))
        if n >= fits:
            return {"batch_size": size, "status": "does not fit"}
        found = {"batch_size": size, "status": "measured"}
        return found | {"clips_per_second": {"wall": rates[n]}}

    rows = list(model.search_batch_sizes(measure, None, start))
    assert [row["batch_size"] for row in rows] == [start * 2**n for n in range(len(rows))]
    done = [row["clips_per_second"]["wall"] for row in rows if row["status"] == "measured"]
    best = model.best_row(rows)
    assert (best is None) == (not done)
    if done:
        assert best["clips_per_second"]["wall"] == max(done)
    grew = [b >= model.MIN_GAIN * max(done[: i + 1]) for i, b in enumerate(done[1:])]
    ended_by_rate = bool(grew) and not grew[-1]
    assert all(grew[:-1])
    assert ended_by_rate or len(done) == fits


def test_given_batches_are_all_measured():
    rows = [{"batch_size": n, "status": "does not fit"} for n in range(9)]
    assert list(model.search_batch_sizes(rows.__getitem__, [4, 2, 8])) == [
        rows[4],
        rows[2],
        rows[8],
    ]


# ---- one program --------------------------------------------------------------------------------


def doubling(start=None):
    """A program of one addition that says it computes 1 GFLOP."""

    def lower():
        return jax.jit(lambda x: x + x).lower(jax.ShapeDtypeStruct((256,), jnp.float32))

    start = start or (lambda c: lambda i: c(jnp.ones(256)))
    return programs.Program(1e9, 2, list, lower, start)


def test_figures_follow_from_the_seconds_and_the_yardstick():
    found = programs.measure_program(doubling(), PEAK, seconds=60)
    assert found["status"] == "measured"
    assert found["bytes"] == 2 * 256 * 4
    assert found["executed_flops"] == 256
    wall, cpu = (found["seconds"][kind]["median"] for kind in ("wall", "cpu"))
    assert found["clips_per_second"] == {"wall": 2 / wall, "cpu": 2 / cpu}
    assert found["flops_per_second"] == {"wall": 1e9 / wall, "cpu": 1e9 / cpu}
    assert found["gemm_share"]["wall"] == pytest.approx(1e-3 / wall)
    assert found["mfu"] == pytest.approx(0.5e-3 / wall)
    assert found["peak_bytes"] is None  # a CPU does not say


def test_what_does_not_fit_is_compiled_and_not_run():
    def start(compiled):
        raise AssertionError("it was run")

    found = programs.measure_program(doubling(start), PEAK._replace(memory=2047), seconds=60)
    assert found["status"] == "does not fit"
    assert found["bytes"] == 2048
    assert found["reason"] == "needs 0.0 of 0.0 GiB"


@pytest.mark.parametrize("when", ["compiled", "run"])
def test_a_device_that_fails_ends_the_row_alone(when):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    program = doubling(fail) if when == "run" else doubling()._replace(lower=fail)
    found = programs.measure_program(program, PEAK, seconds=60)
    assert found["status"] == "does not fit"
    assert found["reason"] == "needs more of 0.9 GiB"

    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    found = programs.measure_program(doubling(broken), PEAK, seconds=60)
    assert (found["status"], found["reason"]) == ("failed", "INTERNAL: something else")


def test_what_would_take_too_long_is_not_compiled():
    program = doubling()._replace(lower=None, flops=30e12)
    found = programs.measure_program(program, PEAK, seconds=60)
    assert found == {"status": "not run", "reason": "predicted 120 s"}


# ---- the model's programs -----------------------------------------------------------------------


def test_inference_is_the_model_on_preprocessed_frames():
    program = model.inference(CONFIG, 2)
    assert program.flops == 2 * 2 * macs(CONFIG)
    found = program.start(program.lower().compile())(1)
    batch = model.random_batches(CONFIG, 2)[1]
    clip = ClipSpec(frames=2, crop=16)
    params = programs.random_parameters(CONFIG)

    @jax.jit
    def expected(frames, crop_boxes):
        return with_parameters(CONFIG, params)(preprocess(frames, crop_boxes, clip))

    np.testing.assert_allclose(found, expected(batch["frames"], batch["crop_boxes"]), atol=1e-6)
    assert np.ptp(found) > 0


def test_training_is_the_step_that_trains():
    program = model.training(CONFIG, 2)
    assert program.flops == 6 * 2 * macs(CONFIG)
    run = program.start(program.lower().compile())
    losses = [float(run(i)["loss"]) for i in (0, 2, 4)]  # on one batch
    assert losses[0] == pytest.approx(math.log(3), abs=0.1)
    assert losses[0] > losses[1] > losses[2]


def test_random_frames_are_as_training_decodes_them():
    base = preset("timesformer_base")
    assert model.batch_shapes(base, 4)["frames"].shape == (4, 8, 227, 227, 3)
    frames, crop_boxes = (model.random_batches(CONFIG, 1)[0][k] for k in ("frames", "crop_boxes"))
    top, left, side = crop_boxes[0]
    assert side == 16
    assert max(top, left) + side < frames.shape[2]


# ---- the commands -------------------------------------------------------------------------------

# What a machine with an accelerator need not have.
ABSENT = """
import sys

for name in ("tensorflow", "tensorflow_datasets", "clu", "ml_collections", "av", "torch",
             "transformers", "psutil"):
    sys.modules[name] = None  # it is not found
from timesformer_jax.cli.main import main
import timesformer_jax.benchmark.model
main(["timesformer", *sys.argv[1:]])
"""


def test_attention_is_measured_where_there_is_no_tensorflow(tmp_path):
    path = tmp_path / "attention.json"
    done = subprocess.run(
        [
            sys.executable, "-c", ABSENT, "benchmark", "attention", "--preset=timesformer_tiny",
            "--schemes=space", "--frames=2,40", "--sides=16", "--depth=1", "--seconds=3e7",
            "--memory=0.001", "--minutes=3", f"--json={path}",
        ],
        capture_output=True, text=True, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())  # which has no NaN: it is written with allow_nan=False
    rows = figures["rows"]
    assert [(row["scheme"], row["frames"]) for row in rows] == [("space", 2), ("space", 40)]
    for row in rows:
        config = preset(
            "timesformer_tiny", attention=row["scheme"], num_frames=row["frames"], image_size=16,
            depth=1,
        )  # fmt: skip
        assert row["macs"] == macs(config)
        assert row["comparisons"] == comparisons(config)
        assert row["parameters"] == parameter_count(config)
        for name, times in (("forward", 2), ("training", 6)):
            found = row[name]
            fits = found["bytes"] <= 0.001 * 2**30
            assert found["status"] == ("measured" if fits else "does not fit")
            if fits:
                flops = found["flops_per_second"]["wall"] * found["seconds"]["wall"]["median"]
                assert flops == pytest.approx(times * macs(config))
                # The compiler's: with norms and softmax, without what no output needs.
                assert 0.3 < found["executed_flops"] / (times * macs(config)) < 2
    statuses = {row[name]["status"] for row in rows for name in attention.PASSES}
    assert statuses == {"measured", "does not fit"}
    assert figures["device_peak"]["memory"] == pytest.approx(0.001 * 2**30)
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert "does not fit: needs 0.0 of 0.0 GiB" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["attention", "--schemes=divide"], "did you mean 'divided'"),
        (["attention", "--frames=8,x"], "--frames=8,x must be whole numbers"),
        (["attention", "--sides=0"], "--sides=0 must be whole numbers"),
        (["attention", "--sides=100"], "image_size 100 is not divisible by patch_size 16"),
        (["attention", "--json=/nowhere/x.json"], "the folder of --json=/nowhere/x.json"),
        (["attention", "--json=/"], "--json=/ is a folder; give the name of a file in it"),
        (["attention", "--dtype=float16"], "dtype must be one of float32, bfloat16"),
        (["model", "--presets=timesformer_bas"], "did you mean 'timesformer_base'"),
        (["model", "--workloads=train"], "there are inference, training"),
        (["model", "--batch_sizes=-1"], "--batch_sizes=-1 must be whole numbers"),
        (["model", "--remat=all"], "remat must be one of"),
    ],
)
def test_impossible_measurements_give_one_line_errors(arguments, said):
    with pytest.raises(InputError) as error:
        load_command(["benchmark", *arguments])()
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_no_row_is_started_after_the_time_limit(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model, "measure_peak", lambda *_: PEAK)
    path = tmp_path / "model.json"
    model.benchmark_model(minutes=0.0, json=str(path))
    rows = json.loads(path.read_text())["rows"]
    assert [(row["workload"], row["batch_size"], row["status"]) for row in rows] == [
        ("inference", 1, "not run"),
        ("training", 1, "not run"),
    ]
    assert rows[0]["macs"] == macs(preset("timesformer_base"))
    assert "not run: no time left" in capsys.readouterr().out


def test_figures_that_are_no_numbers_are_not_written(tmp_path):
    path = tmp_path / "x.json"
    report.write(str(path), {"a": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write(str(path), {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1.0}


# ---- the race -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experiments():
    """The scripts' folder, as it is on the path of a script."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    sys.path.insert(0, str(REPOSITORY / "experiments"))
    yield
    sys.path.remove(str(REPOSITORY / "experiments"))


FIELDS = {
    "num_classes": 5, "image_size": 16, "num_frames": 3, "patch_size": 8, "hidden_size": 8,
    "depth": 1, "num_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(experiments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    importlib.import_module("contender_transformers").write_weights(FIELDS, folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["inference", "training"])
def test_contenders_do_the_same_work(weights, kind):
    contenders = importlib.import_module("contenders")
    ours, theirs = map(importlib.import_module, ("contender_ours", "contender_transformers"))
    task = contenders.Task(kind, FIELDS, weights, "cpu", 1, 1.0)
    fused = contenders.Options(sdpa=True, fused=True)
    runs = {
        "ours": ours.Ours(task, None),
        "as is": theirs.Transformers(task, contenders.Options()),
        "fused": theirs.Transformers(task, fused),
    }
    # Whatever the batch: the checked clip is repeated. Beginning again begins with the weights.
    found = {name: run.begin(2)["check"] for name, run in runs.items()}
    found["again"] = runs["fused"].begin(3)["check"]
    assert len(found["ours"]) == (5 if kind == "inference" else contenders.CHECKED_STEPS)
    for check in found.values():
        np.testing.assert_allclose(check, found["as is"], rtol=1e-4, atol=1e-5)
    if kind == "training":  # the optimizer has an effect
        assert found["ours"][0] - found["ours"][-1] > 0.01
    else:
        assert np.ptp(found["ours"]) > 0.01


def test_the_race_ends_if_outputs_differ(experiments):
    race = importlib.import_module("race_pytorch")
    rows = {
        race.AS_IS: {"check": [1.0, -4.0]},
        race.OURS: {"check": [1.002, -4.0]},
        "slow": {"tried": []},
    }
    race.compare({name: dict(row) for name, row in rows.items()}, 1e-3)
    with pytest.raises(SystemExit, match=r"ours computes something else .* 0\.0005 of the largest"):
        race.compare({name: dict(row) for name, row in rows.items()}, 1e-4)
    with pytest.raises(SystemExit, match="ours computes something else"):
        race.compare({race.AS_IS: {"check": [1.0]}, race.OURS: {"check": [math.nan]}}, 1e-3)
    with pytest.raises(SystemExit, match="must run, to compare with"):
        race.compare({race.OURS: {"check": [1.0]}, race.AS_IS: {"tried": []}}, 1e-3)


def test_a_contender_that_is_lost_in_the_race_leaves_it(experiments, monkeypatch):
    race = importlib.import_module("race_pytorch")
    turns = iter([{"turn": 1}, race.Lost("it broke"), {"turn": 2}, {"turn": 3}])

    def take_turn(runner, ends):
        turn = next(turns)
        if isinstance(turn, Exception):
            raise turn
        return turn

    monkeypatch.setattr(race, "take_turn", take_turn)
    rows = {name: {"batch_size": 4, "tried": []} for name in ("ours", "theirs")}
    found = race.take_turns(dict.fromkeys(rows), rows, rounds=3, ends=0)
    assert found == {"ours": [{"turn": 1}, {"turn": 2}, {"turn": 3}]}
    assert rows["theirs"]["tried"][-1]["reason"] == "it broke"
    assert "batch_size" not in rows["theirs"]


def test_the_summary_pairs_the_turns_of_a_round(experiments):
    race = importlib.import_module("race_pytorch")
    workload = race.Workload("training", race.DEMO, {"cpu": 32})
    rows = {
        "ours": {"batch_size": 32, "tried": [{"batch_size": 32, "status": "measured"}]},
        "theirs": {"batch_size": 64, "tried": [{"batch_size": 128} | report.NO_TIME_LEFT]},
        "lost": {"tried": [{"batch_size": 32, "status": "failed", "reason": "it broke"}]},
    }
    turns = {
        name: [
            {"step": {"wall": s}, "gemm": {"wall": g}, "others": 0.01}
            for s, g in zip(seconds, (1e12, 2e12, 4e12))
        ]
        for name, seconds in {"ours": (1.0, 2.0, 4.0), "theirs": (4.0, 8.0, 4.0)}.items()
    }
    ours, theirs, lost = race.summary(workload, rows, turns, ["wall"])
    assert ours["ours_is_faster"]["wall"] == {"median": 1, "min": 1, "max": 1}
    # A clip takes them 1/16, 1/8 and 1/16 of a second, us 1/32, 1/16 and 1/8.
    assert theirs["ours_is_faster"]["wall"] == {"median": 2, "min": 0.5, "max": 2}
    assert ours["clips_per_second"]["wall"] == {"median": 16, "min": 8, "max": 32}
    products = macs(TimeSformerConfig(**race.DEMO))
    assert ours["product_share"]["wall"] == pytest.approx(6 * products * 16 / 2e12)
    assert "clips_per_second" not in lost
    figures = {
        "machine": {"processor": "x", "cores": 1, "load_average": 0.0}, "versions": {"jax": "1"},
        "kind": "training", "gmacs": 1.0, "rounds": 3, "contenders": [ours, theirs, lost],
    }  # fmt: skip
    *_, at_32, at_64, last = race.as_text(figures).splitlines()
    assert at_32.split()[:2] == ["ours", "32"]
    assert "64 (128 not tried)" in at_64
    assert "it broke" in last
    # Ours may be what did not end.
    alone = race.summary(
        workload, {"theirs": rows["theirs"]}, {"theirs": turns["theirs"]}, ["wall"]
    )
    tables = importlib.import_module("benchmark_tables")
    name, batch, rate, _, ratio = tables.racer(alone[0], 5, on_cpu=False)
    assert (name, batch, rate, ratio) == ("theirs", "64 (128 not tried)", "16 (8-16)", "")


def test_a_contender_that_compiles_nothing_leaves_its_time_to_the_others(experiments, monkeypatch):
    race = importlib.import_module("race_pytorch")
    monkeypatch.setattr(race, "DEVICE", SimpleNamespace(value="cuda"))
    monkeypatch.setattr(race, "time", SimpleNamespace(monotonic=lambda: 0.0))
    given = {}

    def ready(name, batch, until, ends):
        given[name] = until
        return {"batch_size": batch}

    monkeypatch.setattr(race, "ready", ready)
    names = list(race.CONTENDERS["cuda"])
    rows = race.all_ready({name: name for name in names}, 16, 60.0, 100.0)
    assert list(rows) == names
    # As it is and bfloat16; ours, compiled, and compiled with all else.
    assert list(given) == [names[1], names[2], names[0], names[3], names[4]]
    assert list(given.values()) == pytest.approx([12, 15, 20, 30, 60])


def test_the_demo_of_the_race_is_the_demo(experiments):
    race = importlib.import_module("race_pytorch")
    demo = preset("timesformer_tiny", num_classes=8)
    assert {name: getattr(demo, name) for name in race.DEMO} == race.DEMO
    base = preset("timesformer_base")
    assert {name: getattr(base, name) for name in race.BASE} == race.BASE


def test_the_page_has_the_tables_of_the_results(experiments):
    tables = importlib.import_module("benchmark_tables")
    page = tables.PAGE.read_text()
    assert tables.tabulated(page) == page  # if not: python experiments/benchmark_tables.py
    assert "`demo_training`" in page


@pytest.fixture
def benchmarks(tmp_path):
    """Runs benchmarks.sh with a stand-in for python, which writes down what it is given."""

    def run(*parts, does=""):
        python, given = tmp_path / "python", tmp_path / "given"
        python.write_text(f'#!/bin/sh\necho "$@" >> {given}\n{does}\n')
        python.chmod(0o755)
        script = REPOSITORY / "experiments" / "benchmarks.sh"
        variables = os.environ | {"PYTHON": str(python), "RESULTS": str(tmp_path / "results")}
        done = subprocess.run(
            [script, "gpu", *parts], env=variables, capture_output=True, text=True
        )
        return done, given.read_text() if given.exists() else ""

    return run


def test_one_command_runs_every_part(benchmarks, tmp_path):
    done, ran = benchmarks()
    assert done.returncode == 0
    for part in ("attention", "schemes", "model", "race", "flags"):
        assert f"--json={tmp_path}/results/gpu/{part}.json" in ran
    assert all(f"--workloads=base_{workload}" in ran for workload in ("inference", "training"))
    commands = [line.split()[2:] for line in ran.splitlines() if line.startswith("-m ")]
    given = [load_command(command).keywords for command in commands]  # flags that there are
    schemes = [name for flags in given for name in flags.get("schemes") or []]
    assert set(schemes) == set(SCHEMES)


def test_a_part_that_fails_leaves_the_others(benchmarks):
    done, ran = benchmarks(does='case "$*" in *model.json) exit 3;; esac')
    assert done.returncode == 1
    assert done.stderr == "error: failed, or not over in 9 minutes: model\n"
    assert "race_pytorch.py" in ran
    assert "benchmark_tables.py" in ran


def test_nothing_is_run_of_a_wrong_part_or_without_a_gpu(benchmarks):
    done, ran = benchmarks("model", "speed")
    assert (done.returncode, ran) == (2, "")
    assert "no part speed; there are: attention" in done.stderr
    done, ran = benchmarks(does='case "$1" in -c) exit 1;; esac')
    assert done.returncode == 2
    assert "JAX has no GPU here" in done.stderr
    assert "benchmark" not in ran
