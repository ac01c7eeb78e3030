"""The choice among attention kernels by trying them: stand-ins for kernels, on the CPU."""

import dataclasses
import functools
import json
import threading
import time
import types

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import environment, tiny_run
from flax import nnx
from meshes import mesh_of

from timesformer_jax import recipes
from timesformer_jax.benchmark import model, programs
from timesformer_jax.benchmark.machine import DevicePeak
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.cli.main import load_command
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.distributed import hosts
from timesformer_jax.errors import InputError
from timesformer_jax.evaluation import multi_view
from timesformer_jax.inference import clip_model
from timesformer_jax.inference.predict import Predictor
from timesformer_jax.models import attention, tuning
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.ops.kernels import cache, measure, registry, select
from timesformer_jax.models.ops.kernels.registry import Case, Kernel
from timesformer_jax.models.schemes import SCHEMES, AttentionLayer, Scheme, by_row
from timesformer_jax.models.timesformer import TimeSformer, abstract
from timesformer_jax.training import loop, run

pytestmark = pytest.mark.compiles

CASE = Case("temporal", (3, 4, 6, 3, 2, 8), "bfloat16", True, (2, 3))
PEAK = DevicePeak("float32", {"wall": 1e12, "cpu": 1e12}, None, 1e12)
SMALL = TimeSformerConfig(
    num_classes=5, image_size=56, num_frames=3, patch_size=8, hidden_size=16, depth=2, num_heads=2,
    init="width_scaled", drop_path=0.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    """An empty cache, and nothing chosen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(select, "_choices", {})


def kernel(attention, why=None):
    return Kernel(lambda device: True, lambda case: why, attention)


def kernels(monkeypatch, kind="temporal", **attentions):
    """Makes these the kernels of a kind, and the only ones."""
    for other in registry.KERNELS:
        monkeypatch.setitem(registry.KERNELS, other, {})
    known = {name: kernel(attention) for name, attention in attentions.items()}
    monkeypatch.setitem(registry.KERNELS, kind, known)


def on_the_device(attention, work):
    """The attention after some work that a device does when it runs the program."""

    @jax.custom_jvp
    def worked(x):
        return jax.pure_callback(work, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    worked.defjvp(lambda primals, tangents: (worked(*primals), *tangents))
    return lambda qkv, grid: attention(qkv._replace(patches=worked(qkv.patches)), grid)


def slow(attention, seconds):
    return on_the_device(attention, lambda x: time.sleep(seconds) or x)


good = attention._temporal
xla = slow(good, 0.2)  # far above what else runs on the machine adds to the others


def wrong_values(qkv, grid):
    return jax.tree.map(lambda x: x * 1.05, good(qkv, grid))


@jax.custom_vjp
def wrong_keys(x):
    return x


def without_key_gradients(residuals, g):
    return (g.at[..., 1, :, :].set(0),)


wrong_keys.defvjp(lambda x: (x, None), without_key_gradients)


def wrong_gradients(qkv, grid):
    return good(jax.tree.map(wrong_keys, qkv), grid)


def broken(qkv, grid):
    raise RuntimeError("no kernel image\nand more")


def fails(x):
    raise ValueError("illegal address")


breaks_down = on_the_device(good, fails)


def fastest(gradients=True, case=CASE, xla=xla):
    names = list(registry.KERNELS[case.kind])
    return measure.fastest(case, names, xla, gradients, jax.devices()[0])


def forbidden(*_):
    raise AssertionError("measured again")


def test_the_fastest_that_agrees_is_taken_and_the_others_are_named(monkeypatch):
    kernels(
        monkeypatch, good=good, values=wrong_values, gradients=wrong_gradients, broken=broken,
        down=breaks_down,
    )  # fmt: skip
    entry, new = fastest()
    tried = entry["tried"]
    assert new
    assert entry["chosen"] == "good"
    assert 0 < tried["good"] < 0.2 < tried["xla"]
    assert "its values differ from the reference's by 0.0" in tried["values"]
    assert "its gradients of the keys differ from the reference's by 1 of" in tried["gradients"]
    assert tried["broken"] == "it does not compile (RuntimeError: no kernel image)"
    assert tried["down"].startswith("it does not run (")
    text = tuning.describe(entry)
    assert text.startswith("temporal of 3 x 4 x 6 patches by good ")
    assert all(f"not {name}: " in text for name in ("values", "gradients", "broken", "down"))


def test_a_compilation_that_does_not_end_is_passed_over(monkeypatch):
    over = threading.Event()

    def endless(qkv, grid):
        monkeypatch.setattr(measure, "COMPILE_SECONDS", 1.0)
        over.wait()
        return good(qkv, grid)

    kernels(monkeypatch, endless=endless)
    tried = fastest()[0]["tried"]
    over.set()
    assert tried["endless"] == "it does not compile (TimeoutError: not over after 1 s)"


def test_gradients_count_only_where_the_program_needs_them(monkeypatch):
    kernels(monkeypatch, gradients=wrong_gradients)
    assert fastest(gradients=False)[0]["chosen"] == "gradients"
    assert fastest(gradients=True)[0]["chosen"] == "xla"


@pytest.mark.parametrize("kind", registry.KERNELS)
@pytest.mark.parametrize("cls", [True, False])
def test_every_kind_agrees_with_its_reference(kind, cls, monkeypatch):
    formulation = getattr(attention, f"_{kind}")
    kernels(monkeypatch, kind, same=formulation)
    case = CASE._replace(kind=kind, cls=cls, dtype=["float32", "bfloat16"][cls])
    tried = fastest(case=case, xla=formulation)[0]["tried"]
    assert all(isinstance(found, float) for found in tried.values()), tried


def test_xla_stays_where_no_kernel_is_faster(monkeypatch):
    kernels(monkeypatch, slow=slow(good, 0.05))
    assert fastest(xla=good)[0]["chosen"] == "xla"


def test_no_kernel_is_chosen_where_the_reference_fails(monkeypatch):
    def too_large(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(measure, "_reference", too_large)
    kernels(monkeypatch, good=good)
    entry, _ = fastest()
    assert entry["chosen"] == "xla"
    assert "no numbers to compare it with (RuntimeError: RESOURCE_EX" in entry["tried"]["good"]


def test_a_kernel_that_crashed_the_device_is_skipped_the_next_time(monkeypatch):
    kernels(monkeypatch, stuck=breaks_down, good=good)
    monkeypatch.setattr(measure, "_answers", lambda device: False)
    with pytest.raises(measure.DeviceLost, match="does not answer after the temporal attention 's"):
        fastest()
    kernels(monkeypatch, stuck=forbidden, good=good)
    entry, new = fastest()  # as the next process does
    assert new
    assert entry["chosen"] == "good"
    assert entry["tried"]["stuck"] == measure.UNFINISHED


def test_a_run_that_does_not_end_is_passed_over(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(measure, "RUN_SECONDS", 3.0)  # a busy machine runs the other one in time
    kernels(monkeypatch, endless=on_the_device(good, lambda x: over.wait() and x))
    entry, _ = fastest(xla=good)
    over.set()
    assert entry["tried"]["endless"] == "it does not run (TimeoutError: not over after 3 s)"


# ---- the cache ----------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """A kernel that is measured to be faster than xla, without a run."""
    kernels(monkeypatch, good=good)
    monkeypatch.setattr(measure, "_measure", lambda *_: {"xla": 2.0, "good": 1.0})


@pytest.mark.usefixtures("measured")
def test_what_was_measured_is_not_measured_again(monkeypatch):
    first, _ = fastest()
    monkeypatch.setattr(measure, "_measure", forbidden)
    assert fastest() == (first, False)
    with pytest.raises(AssertionError):  # what the times depend on has changed
        fastest(case=CASE._replace(dtype="float32"))
    with pytest.raises(AssertionError):
        fastest(gradients=False)
    monkeypatch.setattr(cache, "_versions", lambda: {"jax": "1.0"})
    with pytest.raises(AssertionError):
        fastest()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\x00", b"[1]", b'{"a": 1}', b'{"a": {"about": {}, "tried": {"xla": []}}}'],
)
@pytest.mark.usefixtures("measured")
def test_a_damaged_cache_is_an_empty_one(content):
    fastest()
    file = cache.directory() / cache.NAME
    file.write_bytes(content)
    assert fastest()[1]
    assert len(json.loads(file.read_text())) == 1
    assert not fastest()[1]


@pytest.mark.usefixtures("measured")
def test_a_choice_that_is_no_kernel_here_is_made_again():
    entry, _ = fastest()
    cache.keep(entry | {"chosen": "bad"})
    assert fastest()[1]


@pytest.mark.usefixtures("measured")
def test_a_cache_that_cannot_be_written_is_only_warned_of(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fastest()[0]["chosen"] == "good"
    assert "cannot be kept" in caplog.text


def test_the_cache_keeps_the_newest(monkeypatch):
    monkeypatch.setattr(cache, "ENTRIES", 2)
    for i in (0, 1, 0, 2):
        cache.keep({"about": {"i": i}, "tried": {}})
    assert [bool(cache.read({"i": i})) for i in (0, 1, 2)] == [True, False, True]


MEASURES = """
import sys, time
sys.path.insert(0, "tests")
import jax, test_tuning as t
t.registry.KERNELS["temporal"] = {"good": t.kernel(t.good)}
inner = t.measure._measure
def counted(*args):
    time.sleep(2)
    return inner(*args)
t.measure._measure = counted
entry, new = t.fastest()
print(entry["chosen"], new)
"""


@pytest.mark.processes
def test_of_two_processes_one_measures():
    running = [
        forked.Process(forked.run_script, MEASURES, environment=environment()) for _ in range(2)
    ]
    said = sorted(run.communicate()[0] for run in running)
    assert said == ["good False\n", "good True\n"]


# ---- of a model ---------------------------------------------------------------------------------


def pretended(monkeypatch, chosen):
    """Every case is measured with this result; yields what was asked."""
    asked = []

    def measured(case, names, xla, gradients, device):
        asked.append((case, gradients))
        about = cache.describe(case, gradients, device)
        return {"about": about, "tried": {"xla": 2.0, chosen: 1.0}, "chosen": chosen}, True

    monkeypatch.setattr(measure, "fastest", measured)
    return asked


def for_every_kind(monkeypatch):
    for kind, known in registry.KERNELS.items():
        run = functools.partial(
            lambda kind, qkv, grid: getattr(attention, f"_{kind}")(qkv, grid), kind
        )
        monkeypatch.setitem(known, "other", kernel(run))


@pytest.fixture
def registered(monkeypatch):
    """A scheme of one's own."""
    layer = AttentionLayer("own", lambda t, grid: by_row(t, grid) // 2)
    monkeypatch.setitem(SCHEMES, "own", Scheme((layer,)))


@pytest.mark.parametrize("axes", [(1, 1, 1, 1), (2, 1, 2, 1)])
@pytest.mark.parametrize("scheme", [*SCHEMES, "own"])
@pytest.mark.usefixtures("registered")
def test_what_is_tried_is_what_the_model_asks_for(scheme, axes, monkeypatch):
    for_every_kind(monkeypatch)
    asked = pretended(monkeypatch, "other")
    config = dataclasses.replace(SMALL, attention=scheme)
    video = jax.ShapeDtypeStruct((4, 3, 56, 56, 3), jnp.float32)
    with jax.set_mesh(mesh_of(axes)):
        entries = tuning.choose_kernels(config, 4, 3, 56, gradients=True)
        seen = set()
        inner = select.select_implementation

        def selected(case):
            seen.add(case)
            assert inner(case) == "other"
            return "xla"  # so that those inside are asked for too

        monkeypatch.setattr(select, "select_implementation", selected)
        nnx.eval_shape(lambda model, video: model(video), abstract(config), video)
    assert len(entries) == len(asked) == len(seen) > 0
    assert {case for case, _ in asked} == seen
    assert all(gradients for _, gradients in asked)


@pytest.mark.parametrize(
    ("scheme", "kinds"),
    [("divided", {"spatial"}), ("axial", {"rows", "columns", "spatial"}), ("joint", set())],
)
def test_of_clips_that_are_filled_up_attention_within_frames_is_tried(scheme, kinds, monkeypatch):
    for_every_kind(monkeypatch)
    asked = pretended(monkeypatch, "other")
    config = dataclasses.replace(SMALL, attention=scheme)
    tuning.choose_kernels(config, 4, 3, 56, gradients=True, masked=True)
    assert {case.kind for case, _ in asked} == kinds
    with tuning.using("other"):
        if kinds:
            tuning.choose_kernels(config, 4, 3, 56, gradients=True, masked=True)
        else:
            with pytest.raises(InputError, match="not for clips that are filled up"):
                tuning.choose_kernels(config, 4, 3, 56, gradients=True, masked=True)


def test_the_choice_is_used_and_said_once(monkeypatch, caplog):
    caplog.set_level("INFO")
    used = []

    def counted(qkv, grid):
        used.append(qkv.patches.shape)
        return good(qkv, grid)

    kernels(monkeypatch, counted=counted, broken=broken)
    monkeypatch.setitem(registry.KERNELS["temporal"], "absent", kernel(broken, why="not here"))
    classifier = TimeSformer(SMALL, rngs=nnx.Rngs(0))
    video = jnp.ones((2, 3, 56, 56, 3))
    monkeypatch.setattr(attention, "_temporal", slow(attention._temporal, 0.03))
    expected = classifier(video)
    assert not used
    for _ in range(2):
        tuning.choose_kernels(SMALL, 2, 3, 56, gradients=False)
    used.clear()
    np.testing.assert_allclose(classifier(video), expected, atol=1e-5)
    assert used == [(2, 3, 49, 3, 2, 8)] * SMALL.depth
    with tuning.using("xla"):
        used.clear()
        classifier(video)
        assert not used
    [record] = (record for record in caplog.records if record.name == "absl")
    assert record.getMessage().startswith(
        "attention on cpu, without gradients: temporal of 2 x 3 x 49 patches by counted "
    )
    assert "not broken: it does not compile" in record.getMessage()
    assert "absent" not in record.getMessage()


def test_the_kernel_chosen_for_training_is_used_without_gradients_too(monkeypatch):
    for_every_kind(monkeypatch)
    pretended(monkeypatch, "other")
    tuning.choose_kernels(SMALL, 2, 3, 56, gradients=True)
    pretended(monkeypatch, "xla")
    tuning.choose_kernels(SMALL, 2, 3, 56, gradients=False)
    assert {choice.name for choice in select._choices.values()} == {"other"}
    tuning.choose_kernels(SMALL, 2, 3, 56, gradients=True)
    assert {choice.name for choice in select._choices.values()} == {"xla"}


def test_on_a_cpu_nothing_is_tried(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(tuning, "_attentions", forbidden)
    assert tuning.choose_kernels(SMALL, 2, 3, 56, gradients=True) == []
    assert not [record for record in caplog.records if record.name == "absl"]
    assert not cache.directory().exists()


def test_all_processes_take_the_choice_of_the_first(monkeypatch):
    for_every_kind(monkeypatch)
    monkeypatch.setattr(measure, "fastest", forbidden)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    sent = []

    def of_first(numbers):
        sent.append(numbers)
        return np.full_like(numbers, 1)

    monkeypatch.setattr(hosts, "of_first", of_first)
    assert tuning.choose_kernels(SMALL, 2, 3, 56, gradients=True) == []
    assert [numbers.tolist() for numbers in sent] == [[0, 0]]
    assert {choice.name for choice in select._choices.values()} == {"other"}


def test_a_kernel_may_be_named(monkeypatch):
    kernels(monkeypatch, good=good, other=good)
    monkeypatch.setitem(registry.KERNELS, "rows", {"only_rows": kernel(good)})
    monkeypatch.setitem(registry.KERNELS["temporal"], "absent", kernel(good, why="too long"))
    monkeypatch.setattr(measure, "fastest", forbidden)
    choose = functools.partial(tuning.choose_kernels, SMALL, 2, 3, 56, gradients=True)
    with tuning.using("good"):
        choose()
        assert select.select_implementation(CASE) == "good"
        assert select.select_implementation(CASE._replace(kind="spatial")) == "xla"
    with tuning.using("xla"):
        choose()
        assert select.select_implementation(CASE) == "xla"
    with (
        tuning.using("absent"),
        pytest.raises(InputError, match=r"=absent cannot .*: too long; us"),
    ):
        choose()
    with (
        tuning.using("only_rows"),
        pytest.raises(InputError, match=r"is for rows attention, which"),
    ):
        choose()
    with pytest.raises(
        InputError, match=r"one of auto, xla, absent, good, .*; did you mean 'good'?"
    ):
        tuning.using("goods")


# ---- of the commands ----------------------------------------------------------------------------


@pytest.mark.parametrize("short", ["mask", "repeat"])
def test_every_program_says_whether_its_clips_are_filled_up(short, monkeypatch):
    clip = ClipSpec(frames=3, crop=56, short=short)
    metadata = CheckpointMetadata(SMALL, clip, ("a", "b", "c", "d", "e"), {})
    mesh, said = mesh_of((1, 1, 1, 1)), []

    class AskedError(Exception):
        """Ends the program where it asks for kernels."""

    def asked(*_, masked, **__):
        said.append(masked)
        raise AskedError

    monkeypatch.setattr(tuning, "choose_kernels", asked)
    config = recipes.demo()
    frames, boxes = np.zeros((3, 56, 56, 3), np.uint8), np.array([[0.0, 0.0, 56.0]])
    predictor = clip_model.ClipModel(metadata, {}, 1, 1, "auto")
    for program in (
        lambda: run.choose_kernels(types.SimpleNamespace(config=config, metadata=metadata)),
        lambda: multi_view.evaluate({}, SMALL, clip, None, mesh, batch_size=1),
        lambda: predictor.classify([(frames, boxes)]),
    ):
        with pytest.raises(AskedError):
            program()
    assert said == [short == "mask"] * 3


@pytest.mark.training
def test_every_command_chooses_before_it_traces(demo_data, tmp_path, monkeypatch, refusal):
    for_every_kind(monkeypatch)
    asked = pretended(monkeypatch, "other")
    traced = []
    run_kernel = select.run_kernel
    monkeypatch.setattr(select, "run_kernel", lambda *a: traced.append(a[3]) or run_kernel(*a))

    def asks(kind, clips, gradients):
        devices = jax.device_count()
        case = next(case for case, _ in asked if case.kind == kind)
        assert case.shape[0] == clips // devices
        assert {each for _, each in asked} == {gradients}
        assert set(traced) == {"other"}
        asked.clear()
        traced.clear()

    def evaluated(*args, **options):
        asks("temporal", 8, gradients=True)
        return evaluate(*args, **options)

    evaluate = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", evaluated)
    workdir = tmp_path / "run"
    once = {"epochs": 1, "model.depth": 1, "eval.every_epochs": 0}
    load_command(tiny_run(demo_data, workdir, **once))()
    asks("temporal", 8 * 3, gradients=False)
    load_command(["evaluate", f"--checkpoint={workdir}", "--crops=1"])()
    asks("spatial", 8, gradients=False)
    predictor = Predictor(workdir, views=2, batch_size=2)
    assert not asked  # until it has clips, it does not know how many go through the model at a time
    predictor.predict(np.zeros((40, 40, 40, 3), np.uint8), fps=30)
    assert {(case.shape[0], gradients) for case, gradients in asked} == {(2 * 3, False)}
    assert set(traced) == {"other"}
    program = model.training(dataclasses.replace(SMALL, depth=1), 2)
    asked.clear()
    measured = programs.measure_program(program, PEAK, seconds=60)
    assert [entry["chosen"] for entry in measured["kernels"]] == ["other", "other"]
    for arguments in (
        ["predict", "x.mp4", f"--checkpoint={workdir}"],
        ["evaluate", f"--checkpoint={workdir}"],
        ["benchmark", "model"],
        ["benchmark", "attention"],
    ):
        assert "did you mean 'cudnn'" in refusal(*arguments, "--attention_kernels=cudn")
    assert "cannot compute the" in refusal(
        "evaluate", f"--checkpoint={workdir}", "--attention_kernels=cudnn"
    )
    changed = tiny_run(demo_data, tmp_path / "other", **once, attention_kernels="cudn")
    assert "did you mean 'cudnn'" in refusal(*changed)
