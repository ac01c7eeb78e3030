"""Every mesh trains to what one device does, and its devices send each other what they must."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import ONE, assert_same_training, mesh_of, optimizer, patch_bytes, tiny, trained

from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.store import Checkpoints
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.distributed.mesh import check_batch, make_mesh
from timesformer_jax.distributed.sharding import shardings
from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformerConfig, abstract, parameters
from timesformer_jax.training.checks import check_model
from timesformer_jax.training.step import abstract_state
from timesformer_jax.transforms.augmentation import Augmentation

pytestmark = pytest.mark.compiles

DIVIDED, JOINT = tiny("divided"), tiny("joint", depth=1)
# 197 tokens a frame.
LARGE = tiny("divided", image_size=28, patch_size=2, num_frames=2, hidden_size=8, depth=1)
EIGHT, FSDP, TENSOR, ALL = (8, 1, 1, 1), (4, 2, 1, 1), (2, 2, 2, 1), (2, 1, 2, 2)
SEQUENCE = (2, 1, 1, 4)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (DIVIDED, EIGHT),
        (DIVIDED, FSDP),
        (DIVIDED, TENSOR),
        (DIVIDED, SEQUENCE),
        (DIVIDED, ALL),
        (JOINT, TENSOR),
        (LARGE, ALL),
    ],
)
def test_every_mesh_trains_as_one_device_does(config, sizes):
    assert_same_training(trained(config, sizes), trained(config, ONE))


def test_a_mesh_trains_on_augmented_clips_as_one_device_does():
    how = Augmentation(grayscale=0.5, mixup=0.8, label_smoothing=0.1)
    ours, theirs = (trained(tiny("divided", depth=1), sizes, 2, how) for sizes in (ALL, ONE))
    assert_same_training(ours, theirs)


def test_a_mesh_trains_in_bfloat16_as_one_device_does():
    half = tiny("divided", depth=1, dtype="bfloat16")
    ours, theirs = (trained(half, sizes, 2) for sizes in ((1, 2, 2, 2), ONE))
    assert_same_training(ours, theirs, rtol=0.05, atol=0.02)


# What is sent.


def kernels(config, tensor=1):
    """Bytes of each kernel, of a `tensor` part where the rules split it."""
    flat = jax.tree.leaves_with_path(parameters(abstract(config)))
    split = ("qkv", "proj", "fc1", "fc2")
    return {
        math.prod(leaf.shape) * 4 // (tensor if path[-2].key in split else 1)
        for path, leaf in flat
        if path[-1].key == "kernel"
    }


def parameter_bytes(config):
    return 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(parameters(abstract(config))))


def test_data_parallel_devices_add_up_gradients_and_nothing_else():
    config = DIVIDED
    found = trained(config, EIGHT).collectives
    assert {(c.kind, c.axes) for c in found} == {("all-reduce", ("data",))}
    sent = sum(c.num_bytes * c.count for c in found)
    # XLA for CPUs adds up what patches and what tokens give to a kernel's gradient one by one.
    assert 0.99 * parameter_bytes(config) <= sent <= 1.5 * parameter_bytes(config)


def test_fsdp_gathers_kernels_and_no_activation():
    config = DIVIDED
    assert patch_bytes(config, 8) not in kernels(config)
    found = trained(config, FSDP).collectives
    gathers = [c for c in found if c.kind == "all-gather"]
    assert {c.axes for c in gathers} == {("fsdp",)}
    assert {c.num_bytes for c in gathers} == kernels(config)
    assert {c.kind for c in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    # Gradients are the only large thing that is added up.
    reduced = sum(c.num_bytes * c.count for c in found if c.kind != "all-gather")
    assert reduced <= 2 * parameter_bytes(config)


@pytest.mark.parametrize(("config", "layers"), [(DIVIDED, 3), (JOINT, 2)])
def test_tensor_parallel_layers_end_in_one_sum(config, layers):
    # An attention or MLP sums its output forward and its input's gradient backward; of the last
    # block, patches that no token reads any more are not computed.
    found = trained(config, TENSOR).collectives
    large = [c for c in found if c.axes == ("tensor",) and c.num_bytes >= patch_bytes(config, 4)]
    assert {c.kind for c in large} == {"all-reduce"}
    assert sum(c.count for c in large) == config.depth * 2 * layers - 3
    gathers = [c for c in found if c.kind == "all-gather"]
    assert {c.axes for c in gathers} == {("fsdp",)}
    assert {c.num_bytes for c in gathers} == kernels(config, tensor=2)
    assert {c.kind for c in found} <= {"all-gather", "all-reduce", "reduce-scatter"}


@pytest.mark.parametrize("sizes", [EIGHT, FSDP, TENSOR, SEQUENCE, ALL])
def test_the_devices_share_the_work(sizes):
    alone, shared = trained(DIVIDED, ONE).flops, trained(DIVIDED, sizes).flops
    # The products of `fc`, the patch embedding and the head are whole for "tensor", and so are
    # norms and the updates of parameters that are not split.
    assert alone <= 8 * shared <= alone * (1.35 if sizes[2] > 1 else 1.15)


# Where parameters lie.


def test_parameters_and_optimizer_state_are_sharded_by_the_rules():
    state = trained(DIVIDED, TENSOR).state
    expected = {
        "attention/spatial/qkv": (P("fsdp", None, "tensor"), (12, 3, 12)),
        "attention/spatial/proj": (P("tensor", "fsdp"), (12, 12)),
        "attention/temporal/temporal_fc": (P("fsdp", None), (12, 24)),
        "mlp/fc1": (P("fsdp", "tensor"), (12, 48)),
        "mlp/fc2": (P("tensor", "fsdp"), (48, 12)),
    }
    for tree in (state.params, state.opt_state[0].trace):
        for path, (spec, part) in expected.items():
            layer = tree["blocks"]["1"]
            for name in path.split("/"):
                layer = layer[name]
            assert layer["kernel"].sharding.spec == spec, path
            assert layer["kernel"].addressable_shards[0].data.shape == part, path
        assert tree["blocks"]["1"]["mlp"]["fc2"]["bias"].sharding.is_fully_replicated
        assert tree["embedding"]["space"].sharding.is_fully_replicated


def test_an_axis_that_does_not_divide_is_not_split():
    mesh = make_mesh(1, 8)
    shape = jax.ShapeDtypeStruct((12, 8), np.float32)
    assert shardings(mesh, {"head": {"kernel": shape}})["head"]["kernel"].spec == P(None, None)


@pytest.mark.parametrize("sizes", [EIGHT, TENSOR])
def test_a_checkpoint_of_one_mesh_goes_on_with_another(sizes, tmp_path):
    state = trained(DIVIDED, SEQUENCE).state
    saved = Checkpoints(tmp_path)
    saved.save(5, state, {}, CheckpointMetadata(DIVIDED, ClipSpec(), (), {}))
    saved.wait()
    target = abstract_state(DIVIDED, optimizer()[1], mesh_of(sizes))
    restored, _ = saved.restore(5, target)
    saved.close()
    for name in ("params", "opt_state"):
        ours, theirs, places = (getattr(s, name) for s in (restored, state, target))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, ours, places))


# What cannot be.


def test_the_rest_of_the_devices_goes_to_the_free_axis():
    def sizes(**asked):
        return tuple(make_mesh(**asked).shape.values())

    assert tuple(make_mesh().shape) == ("data", "fsdp", "tensor", "sequence")
    assert sizes() == (8, 1, 1, 1)
    assert sizes(fsdp=4) == (2, 4, 1, 1)
    assert sizes(data=2, fsdp=-1) == (2, 4, 1, 1)
    assert sizes(tensor=2, sequence=2) == (2, 1, 2, 2)
    assert sizes(data=1, sequence=-1) == (1, 1, 1, 8)


@pytest.mark.parametrize(
    "sizes",
    [(3, 1), (-1, 3), (-1, -1), (4, 1), (0, -1), (16, 1), (-2, -4), (2, 2, 2, 2), (-1, 1, 3, 1)],
)
def test_an_impossible_mesh_gives_a_one_line_error(sizes):
    with pytest.raises(InputError, match="does not fit 8 devices"):
        make_mesh(*sizes)


def test_a_batch_that_the_mesh_cannot_share_gives_a_one_line_error():
    with pytest.raises(InputError, match=r"--config.batch_size to a multiple of 8, 16 for one"):
        check_batch(make_mesh(), 20, "--config.batch_size")
    with pytest.raises(InputError, match=r"data x fsdp = 4 devices; set --b to a multiple of 4,"):
        check_batch(make_mesh(tensor=2), 18, "--b")
    check_batch(make_mesh(tensor=2, sequence=2), 18, "--b")


@pytest.mark.parametrize(
    ("mesh", "model", "clip", "said"),
    [
        ({"tensor": 8}, {}, {}, "12 heads cannot be .* 8 .*mesh.tensor to a divisor of 12, 4 for"),
        (
            {"tensor": 4},
            {"hidden_size": 24, "mlp_ratio": 0.25},
            {},
            "6 hidden units of an MLP .* 2",
        ),
        (
            {"sequence": 8},
            {"attention": "joint"},
            {},
            "heads of attention 'joint', and 12 .* 8; .*sequence to a divisor of 12, 4 for one",
        ),
        (
            {"sequence": 2, "tensor": 4},
            {"attention": "local_global"},
            {},
            "and 3 .* 2; .*sequence to a divisor of 3, 1 for one",
        ),
        ({"sequence": 8}, {}, {"frames": 12}, "12 frames cannot .* a divisor of 12, 4 for one"),
        (
            {"sequence": 8},
            {"attention": "space"},
            {"frames": 4},
            "4 frames .* of 4, 4 for one",
        ),
    ],
)
def test_a_model_that_the_mesh_cannot_split_gives_a_one_line_error(mesh, model, clip, said):
    with pytest.raises(InputError, match=said) as e:
        check_model(make_mesh(**mesh), TimeSformerConfig(**model), ClipSpec(**clip))
    assert "\n" not in str(e.value)


def test_the_paper_models_can_be_split():
    for sizes, model, clip in (
        ({"tensor": 4, "sequence": 2}, {}, {}),
        ({"sequence": 4, "tensor": 2}, {}, {"frames": 96}),
        ({"sequence": 8}, {"image_size": 448}, {"frames": 16, "crop": 448}),
        ({"sequence": 8}, {}, {"frames": 16}),
        ({"sequence": 8}, {"attention": "space"}, {}),
        ({"tensor": 2, "sequence": 2}, {"attention": "joint"}, {}),
    ):
        check_model(make_mesh(**sizes), TimeSformerConfig(**model), ClipSpec(**clip))
