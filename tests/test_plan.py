"""Plans: compiled on the virtual devices, counted for GPUs, and for TPUs where libtpu is."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

import timesformer_jax as tsf
from timesformer_jax import recipes
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.records.open import open_split
from timesformer_jax.distributed.hardware import CHIPS, GIB, link_rate
from timesformer_jax.distributed.mesh import make_mesh
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.costs import macs
from timesformer_jax.models.timesformer import abstract, parameters, with_parameters
from timesformer_jax.planning import command, make_plan
from timesformer_jax.planning.collectives import Collective
from timesformer_jax.planning.command import plan
from timesformer_jax.planning.largest import largest
from timesformer_jax.planning.memory import (
    _residuals,
    counted_memory,
    kept_for_backward,
)
from timesformer_jax.planning.plan import counted_collectives
from timesformer_jax.planning.program import build
from timesformer_jax.planning.report import as_json, as_text
from timesformer_jax.planning.roofline import roofline, sent
from timesformer_jax.planning.topology import open_topology
from timesformer_jax.ranges import RANGES, Range

pytestmark = pytest.mark.compiles

CONFIGS = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py"))


def tiny(**changes):
    """Wide enough for matrix products to be nearly all of the FLOPs."""
    config = recipes.demo()
    config.batch_size = 16
    config.model.num_classes = 8
    config.model.depth = 2
    config.model.hidden_size = 128
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def planned():
    return make_plan(tiny(), "cpu:8", memory=1.0)


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_memory_by_kind_adds_up_to_what_the_compiled_program_takes(planned):
    compiled = planned.program.lower().compile().memory_analysis()
    memory = planned.compiled.memory
    assert memory.parameters == bytes_of(planned.program.state.params)  # whole on every device
    assert memory.optimizer == 2 * memory.parameters + 3 * 4  # Adam's moments, its counts, the step
    assert memory.inputs == bytes_of(planned.program.batch) // 8
    assert 0 <= memory.padding < 1e4
    assert memory.total == (
        compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
        + compiled.output_size_in_bytes - compiled.alias_size_in_bytes
        + compiled.generated_code_size_in_bytes
    )  # fmt: skip
    assert planned.fits


def test_a_parameter_sharing_mesh_holds_less(planned):
    config = tiny(**{"mesh.data": 2, "mesh.fsdp": 4})
    shared, whole = build(config, jax.devices(), 16), planned.program
    a, b = counted_memory(shared), counted_memory(whole)
    kernels = sum(x.size * 4 for x in jax.tree.leaves(whole.state.params) if x.ndim > 1)
    assert a.parameters < b.parameters
    assert a.parameters >= b.parameters - kernels * 3 / 4
    assert a.inputs == b.inputs


def test_the_compiled_flops_are_the_models(planned):
    # Beside products a program has norms, softmax, GELU, resampling and the optimizer; the last
    # MLP on the patches is not computed. Counted: 2 a product, 3 times the forward pass.
    assert planned.compiled.flops / planned.counted.flops == pytest.approx(1, abs=0.35)
    assert planned.counted.flops == 6 * macs(planned.program.model) * 16 / 8


def test_data_parallel_sums_every_gradient_once_on_paper(planned):
    (reduce,) = planned.counted.collectives
    assert reduce == Collective("all-reduce", bytes_of(planned.program.state.params), ("data",), 1)
    assert sent(reduce, planned.program.mesh) == 2 * 7 / 8 * reduce.num_bytes


def test_the_compiled_program_sums_gradients_and_little_else(planned):
    # XLA for CPUs sums a kernel's gradients by patches and by tokens one by one: at most twice.
    gradients = bytes_of(planned.program.state.params)
    found = planned.compiled.collectives
    assert {(c.kind, c.axes) for c in found} == {("all-reduce", ("data",))}
    assert gradients <= sum(c.num_bytes * c.count for c in found) <= 2 * gradients


def test_shared_parameters_are_gathered_twice_and_their_gradients_scattered():
    program = build(tiny(**{"mesh.data": 2, "mesh.fsdp": 4}), jax.devices(), 16)
    found = {(c.kind, c.axes): c.num_bytes for c in counted_collectives(program)}
    params = jax.tree.leaves(program.state.params)
    split = sum(x.size * 4 for x in params if not x.sharding.is_fully_replicated)
    whole = sum(x.size * 4 for x in params) - split
    assert found == {
        ("all-gather", ("fsdp",)): 2 * split,
        ("reduce-scatter", ("fsdp",)): split,
        ("all-reduce", ("data",)): split // 4,
        ("all-reduce", ("data", "fsdp")): whole,
    }


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("all-reduce", 2 * 3 / 4), ("all-gather", 3 / 4), ("reduce-scatter", 3 / 4),
     ("all-to-all", 3 / 4), ("collective-permute", 1)],
)  # fmt: skip
def test_bytes_sent_along_an_axis_of_four(kind, expected):
    mesh = make_mesh(data=2, fsdp=4)
    assert sent(Collective(kind, 1000, ("fsdp",), 3), mesh) == pytest.approx(3000 * expected)


def test_the_batch_is_what_training_feeds_the_step(demo_data):
    from timesformer_jax.data.input import pipeline
    from timesformer_jax.training.loop import step_inputs

    config = recipes.demo()
    split = open_split(demo_data, "train")
    clip = ClipSpec(**config.clip, short_side=int(split.height[0]))
    batches = pipeline.train_batches(
        split,
        clip,
        batch_size=8,
        short_side_range=tuple(config.data.short_side_range),
        flip=False,
        seed=0,
    )
    fed = step_inputs(next(batches)[0])
    planned = build(config, jax.devices(), 8).batch
    assert {k: (v.shape, v.dtype) for k, v in fed.items()} == {
        k: (v.shape, v.dtype) for k, v in planned.items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_planned_for_gpus_that_are_not_here(name):
    config = _config(name)
    config.model.depth = 1  # the test is cheap; nothing but the number of blocks changes
    found = make_plan(config, "h100:8")
    assert found.compiled is None
    assert "analytic, not compiled" in as_text(found)
    written = as_json(found)
    assert json.loads(json.dumps(written)) == written
    assert written["source"] == "counted"
    assert written["mfu"] is None
    # Gradients are all of the parameters; the bytes an all-reduce sends are 2 (n - 1) / n of them.
    (reduce,) = written["counted"]["collectives"]
    assert reduce["sent_bytes"] == 2 * 7 / 8 * 4 * written["parameters"]


@pytest.mark.parametrize(("model", "fits"), [("base", True), ("hr", False)])
def test_eight_clips_a_gpu_fit_or_not(model, fits):
    found = make_plan(recipes.kinetics400(f"timesformer_{model}"), "h100:8")
    assert found.fits is fits
    assert ("does not fit" in as_text(found)) is not fits


def _config(name):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("remat", ["none", "block"])
def test_what_blocks_keep_is_counted_from_two_of_them(remat):
    model = TimeSformerConfig(
        num_classes=3, image_size=16, num_frames=2, patch_size=8, hidden_size=16, depth=6,
        num_heads=2, remat=remat,
    )  # fmt: skip
    counted, all_of_them = kept_for_backward(model, 2, 16, 4), _residuals(model, 2, 16, 4)
    if remat == "none":
        assert counted == pytest.approx(all_of_them, rel=0.01)
    else:  # and the inside of one of six
        none = _residuals(dataclasses.replace(model, remat="none"), 2, 16, 4)
        assert all_of_them + none / 8 < counted < all_of_them + none / 4


@pytest.mark.parametrize("name", ["k400_space", "k400_joint"])
def test_the_recipes_say_what_the_planner_counts(name):
    config = _config(name)
    text = (REPOSITORY / "configs" / f"{name}.py").read_text()
    said = re.search(r"`timesformer plan` says (\d+) GiB each", text)
    assert round(make_plan(config, "h100:8").needed / GIB) == int(said[1])


def test_a_gpu_that_is_not_there_is_counted_with_the_operations_of_a_gpu():
    """A CPU computes 1,569 tokens by blocks, and keeps no weights of attention; a GPU keeps all."""
    config = _config("k400_joint")
    program = build(config, jax.devices(), 8)
    here, gpu = (counted_memory(program, chip).total for chip in (None, CHIPS["h100"]))
    weights = 12 * 12 * (8 * 196 + 1) ** 2 * 4  # blocks, heads, float32: of one clip on a device
    assert gpu - here == pytest.approx(weights, rel=0.05)


def test_what_is_offloaded_is_not_on_the_chip():
    model = TimeSformerConfig(
        num_classes=3, image_size=16, num_frames=2, patch_size=8, hidden_size=16, depth=2,
        num_heads=2, remat="block",
    )  # fmt: skip
    offloaded = _residuals(dataclasses.replace(model, remat="offload"), 2, 16, 4)
    inputs = 4 * (2 * 4 + 1) * 16 * 4  # of a block: patches and token of four clips, float32
    assert _residuals(model, 2, 16, 4) - offloaded == 2 * inputs


def test_the_backward_pass_is_given_what_jax_says_it_saves(capsys):
    model = TimeSformerConfig(
        num_classes=3, image_size=16, num_frames=2, patch_size=8, hidden_size=16, depth=2,
        num_heads=2,
    )  # fmt: skip
    params = parameters(abstract(model))
    video = jax.ShapeDtypeStruct((4, 2, 16, 16, 3), jnp.float32)

    def loss(params, video):
        return with_parameters(model, params)(video, key=jax.random.key(0)).sum()

    jax.ad_checkpoint.print_saved_residuals(loss, params, video)
    saved = 0
    for line in capsys.readouterr().out.splitlines():
        kind, sizes = re.match(r"(\w+)\[([\d,]*)\]", line).groups()
        if "from the argument" not in line:
            saved += math.prod(map(int, filter(None, sizes.split(",")))) * int(kind[1:]) // 8
    assert kept_for_backward(model, 2, 16, 4) == pytest.approx(saved, rel=0.02)


@settings(max_examples=200, deadline=None)
@given(
    slope=st.floats(1, 100),
    base=st.floats(0, 1000),
    bend=st.floats(-0.1, 0.5),
    limit=st.floats(0, 20000),
    unit=st.integers(1, 16),
    start=st.integers(1, 500),
    silent=st.booleans(),
    line=st.booleans(),
    most=st.sampled_from([3000, 1 << 40]),
)
def test_the_search_finds_the_last_batch_that_fits_in_few_trials(
    slope, base, bend, limit, unit, start, silent, line, most
):
    tried = []

    def needed(batch):
        tried.append(batch)
        assert batch <= most
        value = base + slope * batch * (1 if line else (batch / 100 + 1) ** bend)
        return math.inf if silent and value > limit else value

    empty = base if line else base / 2
    found, trials = largest(needed, limit, unit, start * unit, empty, most), len(tried)
    assert found % unit == 0
    assert found + unit > most or needed(found + unit) > limit
    assert found == 0 or needed(found) <= limit
    tried = tried[:trials]
    assert len(tried) == len(set(tried))
    if line and not silent:  # start, where the line meets the limit, and the next
        assert len(tried) <= 2 + math.ceil(math.log(max(found / unit, 1) / start + 1, 4)) + 1
    assert len(tried) <= 3 * math.log2(max(start, found / unit, 2)) + 4


def test_find_batch_finds_the_edge_of_a_given_memory():
    changes = {"model.depth": 1, "model.hidden_size": 16}
    found = make_plan(tiny(**changes), "h100:8", find_batch=True, memory=0.1)
    assert found.largest_batch > 16

    def fits(batch):
        return make_plan(tiny(batch_size=batch, **changes), "h100:8", memory=0.1).fits

    assert fits(found.largest_batch)
    assert not fits(found.largest_batch + 8)
    assert f"largest batch that fits: {found.largest_batch}" in as_text(found)


def test_a_search_ends_at_the_longest_clip_that_a_config_can_have(monkeypatch):
    monkeypatch.setitem(RANGES, "frames", Range(1, 64, whole=True))
    config = tiny(**{"batch_size": 8, "model.depth": 1, "model.hidden_size": 16})
    assert make_plan(config, "h100:8", find_frames=True, memory=100.0).longest_clip == 64


def test_a_batch_that_never_fits_compiled():
    config = tiny(**{"batch_size": 1, "model.depth": 1, "model.hidden_size": 16})
    found = make_plan(config, "cpu:1", find_batch=True, memory=1e-4)
    assert (found.fits, found.largest_batch) == (False, 0)
    assert found.needed == found.compiled.memory.total > 1e-4 * GIB


def test_a_batch_that_never_fits():
    found = make_plan(tiny(**{"model.depth": 1}), "h100:8", find_batch=True, memory=1e-3)
    assert found.fits is False
    assert found.largest_batch == 0
    assert "no batch fits" in as_text(found)


def torus(*sides):
    """A mesh of one axis a side, of devices that only know where they are."""
    devices = np.empty(sides, object)
    for place in np.ndindex(*sides):
        devices[place] = types.SimpleNamespace(coords=(*place, 0, 0)[:3])
    names = ("data", "fsdp", "tensor")[: len(sides)]
    return types.SimpleNamespace(devices=devices, axis_names=names, shape=dict(zip(names, sides)))


@pytest.mark.parametrize(
    ("chip", "sides", "axes", "links"),
    [
        ("v5e", (2, 2), ("data",), 1),
        ("v5e", (2, 2), ("data", "fsdp"), 2),
        ("v5e", (8, 16), ("data",), 1),
        ("v5e", (8, 16), ("fsdp",), 2),
        ("v6e", (16, 16), ("data", "fsdp"), 4),
        ("v5p", (4, 4, 4), ("data", "fsdp", "tensor"), 6),
        ("v5p", (2, 4, 4), ("fsdp", "tensor"), 2),  # no cube: nothing is closed
    ],
)
def test_links_of_a_torus(chip, sides, axes, links):
    link = CHIPS[chip].links.link
    assert link_rate(CHIPS[chip], torus(*sides), axes) == links * link


def test_links_of_hosts():
    chip = CHIPS["h100"]
    mesh = types.SimpleNamespace(devices=np.empty((4, 8)), axis_names=("data", "fsdp"))
    assert link_rate(chip, mesh, ("fsdp",)) == chip.links.within
    assert link_rate(chip, mesh, ("data",)) == chip.links.between


def test_the_roofline_is_the_slowest_part_at_its_peak():
    mesh = make_mesh()
    reduce = [Collective("all-reduce", 450_000_000, ("data",), 2)]
    found = roofline(CHIPS["h100"], mesh, "bfloat16", 989.4e12, 3.35e12 / 4, reduce)
    assert found == pytest.approx((1, 0.25, 2 * 2 * 7 / 8 * 1e-3))
    assert (found.overlapped, found.bound_by) == (1, "compute")
    assert found.one_by_one == pytest.approx(1.0035)
    assert roofline(CHIPS["h100"], mesh, "float32", 494.7e12, None, []).compute == 1


@pytest.mark.parametrize(
    ("topology", "changes", "said"),
    [
        ("v5f:4x4", {}, "no chip 'v5f'.*did you mean 'v5"),
        ("h100:4x4", {}, "after h100: give their number, for example 8"),
        ("v5e:16", {}, "after v5e: give the sides of the slice, for example 4x4"),
        ("v5e", {}, "after v5e: give the sides"),
        ("cpu:0", {}, "after cpu: give their number"),
        ("cpu:512", {}, "needs 512 devices and this process has 8"),
        ("cpu:6", {}, "a batch of 16 cannot be divided .* multiple of 6"),
        ("cpu:8", {"mesh.data": 3}, "does not fit 8 devices"),
        ("cpu:8", {"optimizer.name": "lion"}, "optimizer.name must be sgd or adamw"),
        ("cpu:8", {"model.attention": "dividet"}, "did you mean 'divided'"),
    ],
)
def test_errors_are_one_line(topology, changes, said):
    with pytest.raises(tsf.InputError, match=said) as caught:
        make_plan(tiny(**changes), topology)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("topology", ["cpu:8", "h100:8"])
def test_inference_holds_parameters_and_runs_forward(topology):
    config = tiny(**{"eval.batch_size": 8, "eval.views": 2, "eval.crops": 3})
    found = make_plan(config, topology, work="inference", memory=1.0)
    memory = found.best.memory
    assert memory.parameters == bytes_of(found.program.state.params)
    assert memory.optimizer == 0
    assert memory.inputs == bytes_of(found.program.batch) // 8
    assert found.program.clips == 8 * 2 * 3
    assert found.counted.flops == 2 * macs(found.program.model) * 8 * 6 / 8
    assert found.counted.collectives == []
    text = as_text(found)
    assert "inference, a batch of 8 videos in 6 clips each" in text
    assert "optimizer" not in text
    written = as_json(found)
    assert (written["work"], written["batch_size"], written["clips"]) == ("inference", 8, 48)
    if found.compiled:
        assert found.compiled.flops / found.counted.flops == pytest.approx(1, abs=0.35)
    if topology == "cpu:8":  # its devices share the cores
        seconds = found.counted.flops * 8 / found.host_rate
        assert found.step_seconds == written["step_seconds"] == seconds
        assert f"at best {seconds:.3g} s a step on this CPU, at the " in text


def test_the_batch_of_inference_is_what_evaluation_feeds_the_step(demo_data):
    from timesformer_jax.data.input import pipeline

    config = recipes.demo()
    split = open_split(demo_data, "validation")
    clip = ClipSpec(**config.clip, short_side=int(split.height[0]))
    config.data.short_side_range = (clip.short_side, clip.short_side)
    (fed, *_) = pipeline.eval_batches(split, clip, batch_size=8, views=1, crops=3)
    planned = build(config, jax.devices(), 8, "inference").batch
    assert {k: (fed[k].shape, fed[k].dtype) for k in planned} == {
        k: (v.shape, v.dtype) for k, v in planned.items()
    }


def test_parameters_that_devices_share_are_gathered_once_for_inference():
    config = tiny(**{"mesh.data": 2, "mesh.fsdp": 4})
    found = build(config, jax.devices(), 16, "inference")
    split = sum(
        x.size * 4
        for x in jax.tree.leaves(found.state.params)
        if not x.sharding.is_fully_replicated
    )
    assert counted_collectives(found) == [Collective("all-gather", split, ("fsdp",), 1)]


def test_the_largest_batch_of_inference_is_of_videos():
    changes = {"model.depth": 1, "model.hidden_size": 16}
    found = make_plan(tiny(**changes), "h100:8", work="inference", find_batch=True, memory=0.1)
    assert f"largest batch that fits: {found.largest_batch} videos" in as_text(found)
    other = tiny(**changes, **{"eval.batch_size": found.largest_batch})
    assert make_plan(other, "h100:8", work="inference", memory=0.1).fits


def test_costs_that_a_compiler_counts_once_a_loop_are_not_reported():
    """Blocks of a long attention, which no field of the config names."""
    changes = {"model.attention": "joint", "clip.frames": 64, "clip.crop": 64, "model.depth": 1}
    found = make_plan(tiny(**changes), "cpu:8", work="inference", memory=1.0)
    assert (found.compiled.flops, found.compiled.moved) == (None, None)
    assert "a compiled program with loops: its FLOPs and traffic are not counted" in as_text(found)


def test_an_unknown_work_is_refused():
    with pytest.raises(tsf.InputError, match="--work=testing: there are training and inference"):
        make_plan(tiny(), "cpu:8", work="testing")


def test_the_compiled_program_is_written(tmp_path):
    small = tiny(**{"batch_size": 1, "model.depth": 1, "model.hidden_size": 16})
    plan(small, "cpu:1", work="inference", hlo=str(tmp_path / "step.hlo"))
    text = (tmp_path / "step.hlo").read_text()
    assert "\nENTRY " in text
    assert "/spatial/" in text  # the scopes of the model
    with pytest.raises(tsf.InputError, match="no program was compiled that fits"):
        plan(small, "h100:1", hlo=str(tmp_path / "none.hlo"))
    assert not (tmp_path / "none.hlo").exists()


def test_a_search_without_a_limit_is_refused():
    with pytest.raises(tsf.InputError, match="has no memory limit; give one, --memory=16"):
        make_plan(tiny(), "cpu:8", find_batch=True)


def test_a_file_that_cannot_be_written_gives_a_one_line_error(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(command, "make_plan", lambda *_, **__: compiled.append(1))
    for flag, path in (("json", tmp_path), ("hlo", tmp_path), ("json", tmp_path / "no" / "a.json")):
        said = f"--{flag}={path} cannot be written: give a file in a folder that is"
        with pytest.raises(tsf.InputError, match=f"^{re.escape(said)}$"):
            plan(tiny(**{"model.depth": 1}), "h100:8", **{flag: str(path)})
    assert not compiled  # it is refused before the work


@pytest.mark.parametrize(
    ("name", "clip", "said"),
    [
        ("facebook/timesformer-hr-finetuned-k600", (16, 16, 448), "as the checkpoint facebook/"),
        ("TimeSformer_divST_96x32_224_HowTo100M.pyth", (96, 32, 224), "as the checkpoint TimeS"),
        ("someone/timesformer", (8, 32, 224), "someone/timesformer is not here: the recipe's own"),
    ],
)
def test_a_published_model_is_planned_without_a_download(name, clip, said, monkeypatch, caplog):
    def seen(config, *_, **__):
        ours = config.clip
        assert (ours.frames, ours.frame_stride, ours.crop) == clip
        assert (config.model.num_frames, config.model.image_size) == (clip[0], clip[2])
        raise tsf.InputError("seen")

    caplog.set_level("INFO", logger="absl")
    monkeypatch.setattr(command, "make_plan", seen)
    config = recipes.finetune()
    config.pretrained = name
    with pytest.raises(tsf.InputError, match="seen"):
        plan(config, "h100:8")
    assert said in caplog.text


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name)
    )
    with pytest.raises(tsf.InputError, match=r"pip install '.\[tpu\]'"):
        open_topology("v5e:4x4")


def test_the_command_needs_no_tensorflow(timesformer, tmp_path):
    for name in ("tensorflow", "clu", "tensorflow_datasets"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('absent')")
    out = tmp_path / "plan.json"
    done = timesformer(
        "plan", f"--config={REPOSITORY}/configs/demo.py", "--topology=a100:4", f"--json={out}",
        cwd=tmp_path,
    )  # fmt: skip
    assert "fits: " in done.stdout
    assert json.loads(pathlib.Path(out).read_text())["chips"] == 4
