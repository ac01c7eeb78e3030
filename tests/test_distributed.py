"""The mesh and the rule table: every mesh trains to the same parameters as one device."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from timesformer_jax.distributed.mesh import check_batch, make_mesh, put_batch
from timesformer_jax.distributed.sharding import shardings
from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformer, TimeSformerConfig, parameters
from timesformer_jax.preprocessing import ClipSpec
from timesformer_jax.training.step import abstract_state, init_state, make_train_step

CLIP = ClipSpec(frames=2, crop=16, short_side=20)


def model(attention):
    # 17 tokens a frame, and 6 classes that 8 devices cannot share.
    return TimeSformerConfig(
        num_classes=6, image_size=16, num_frames=2, patch_size=4, hidden_size=16, depth=2,
        num_heads=2, attention=attention, drop_path=0.2, init="width_scaled",
    )  # fmt: skip


def batches(n=3):
    rng = np.random.default_rng(0)
    for _ in range(n):
        yield {
            "frames": rng.integers(0, 256, (8, 2, 20, 20, 3), dtype=np.uint8),
            "windows": np.tile(np.float32([1, 2, 17]), (8, 1)),
            "flip": rng.random(8) < 0.5,
            "label": rng.integers(0, 6, 8, dtype=np.int32),
        }


def run(attention, mesh):
    config = model(attention)
    schedule = optax.constant_schedule(0.01)
    optimizer = optax.chain(optax.trace(0.9, nesterov=True), optax.scale_by_learning_rate(schedule))
    target = abstract_state(config, optimizer, mesh)
    step = make_train_step(config, CLIP, optimizer, schedule, target, mesh, seed=1)
    with jax.set_mesh(mesh):
        state = init_state(
            lambda: parameters(TimeSformer(config, rngs=nnx.Rngs(0))), optimizer, target
        )
        found = []
        for batch in batches():
            state, metrics = step(state, put_batch(mesh, batch))
            found.append(jax.device_get(metrics))
        assert int(state.step) == 3
        return jax.device_get(state.params), found, state


@pytest.mark.parametrize(
    ("attention", "sizes"), [("divided", (8, 1)), ("divided", (2, 4)), ("joint", (4, 2))]
)
def test_every_mesh_gives_one_devices_losses_and_parameters(attention, sizes):
    params, found, _ = run(attention, make_mesh(1, 1, jax.devices()[:1]))
    others, again, _ = run(attention, make_mesh(*sizes))
    for a, b in zip(found, again):
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=2e-4, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=2e-5), params, others)


def test_fsdp_splits_the_matrices_and_what_mirrors_them():
    _, _, state = run("divided", make_mesh(2, 4))
    kernel = state.params["blocks"]["0"]["attention"]["spatial"]["qkv"]["kernel"]
    momentum = state.opt_state[0].trace["blocks"]["0"]["attention"]["spatial"]["qkv"]["kernel"]
    for array in (kernel, momentum):
        assert array.sharding.spec == P("fsdp", None)
        assert array.addressable_shards[0].data.shape == (4, 48)
    bias = state.params["blocks"]["0"]["attention"]["spatial"]["qkv"]["bias"]
    assert bias.sharding.is_fully_replicated


def test_an_axis_that_does_not_divide_is_not_split():
    mesh = make_mesh(1, 8)
    shape = jax.ShapeDtypeStruct((12, 8), np.float32)
    assert shardings(mesh, {"head": {"kernel": shape}})["head"]["kernel"].spec == P(None, None)


def test_the_rest_of_the_devices_goes_to_the_free_axis():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4}
    assert dict(make_mesh(data=2, fsdp=-1).shape) == {"data": 2, "fsdp": 4}


@pytest.mark.parametrize("sizes", [(3, 1), (-1, 3), (-1, -1), (4, 1), (0, -1), (16, 1)])
def test_an_impossible_mesh_is_one_line(sizes):
    with pytest.raises(InputError, match="does not fit 8 devices"):
        make_mesh(*sizes)


def test_a_batch_that_the_mesh_cannot_share_is_one_line():
    with pytest.raises(InputError, match=r"--config.batch_size to a multiple of 8, 16 for one"):
        check_batch(make_mesh(), 20, "--config.batch_size")
