"""Devices that share a clip: what they exchange, and that nothing changes by it."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from meshes import CLIPS, ONE, assert_same_training, mesh_of, patch_bytes, tiny, trained
from test_attention import QUICK, STEPS

from timesformer_jax.distributed import sequence
from timesformer_jax.distributed.collectives import collectives
from timesformer_jax.distributed.sharding import shardings, spec
from timesformer_jax.models.attention import SCHEMES
from timesformer_jax.models.timesformer import TimeSformer, parameters, with_parameters

SEQUENCE, ALL = (2, 1, 1, 4), (2, 1, 2, 2)
SHARED = [
    name
    for name, scheme in SCHEMES.items()
    if all(step.within in ("frame", "position") for step in scheme.steps)
]


def exchanged(found, config, devices):
    """How often devices exchange their patches; asserts that they send them in no other way."""
    exchanges = [c for c in found if c.kind == "all-to-all"]
    assert {(c.num_bytes, c.axes) for c in exchanges} <= {
        (patch_bytes(config, devices), ("sequence",))
    }
    others = [c for c in found if c.kind not in ("all-to-all", "all-reduce")]
    assert all(c.num_bytes < patch_bytes(config, devices) / 10 for c in others), others
    return sum(c.count for c in exchanges)


@pytest.mark.parametrize(
    ("fields", "sizes", "each"),
    [
        ({}, SEQUENCE, 4),
        ({}, ALL, 4),
        # Forward again; where layers are not scanned the compiler may find one of them done.
        ({"remat": "block", "scan_layers": True}, SEQUENCE, 6),
    ],
)
def test_a_training_step_exchanges_twice_each_way_in_a_layer(fields, sizes, each):
    config = tiny("divided", **fields)
    run = trained(config, sizes)
    assert exchanged(run.collectives, config, sizes[0] * sizes[3]) == each * config.depth
    assert_same_training(run, trained(tiny("divided"), ONE))


@functools.cache
def forward(config, sizes):
    """Logits without drop path, the gradient of a loss with it, and the forward's collectives."""
    mesh = mesh_of(sizes)
    params = parameters(TimeSformer(config, rngs=nnx.Rngs(0)))
    side = config.image_size
    video = np.random.default_rng(0).standard_normal((CLIPS, config.num_frames, side, side, 3))
    places = shardings(mesh, params), jax.NamedSharding(mesh, spec("batch/frames", 5))

    def logits(params, video, key=None):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return with_parameters(config, params)(video, key=key)

    def loss(params, video):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.grad(lambda p: (logits(p, video, jax.random.key(3)) ** 2).sum())(params)

    arguments = jax.device_put((params, video.astype(np.float32)), places)
    run = jax.jit(lambda *a: (logits(*a), loss(*a)), compiler_options=QUICK)
    alone = jax.jit(logits, in_shardings=places).lower(*arguments).compile(QUICK)
    return *jax.device_get(run(*arguments)), collectives(alone, mesh)


@pytest.mark.parametrize("scheme", SHARED)
def test_every_scheme_that_can_be_shared_computes_the_same(scheme):
    config = tiny(scheme, depth=1)
    logits, gradient, found = forward(config, SEQUENCE)
    expected, direction, _ = forward(config, ONE)
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient, direction
    )
    through_time = sum(step.within == "position" for step in config.scheme.steps)
    if config.scheme.steps[-1].within == "position":  # then no token reads the last one's patches
        most = 2 * config.depth * through_time - 1
        assert exchanged(found, config, 8) in (most, most - 1)
    else:
        assert exchanged(found, config, 8) == 2 * config.depth * through_time


def test_which_schemes_can_be_shared():
    assert set(SHARED) == set(SCHEMES) - {"joint", "local_global"}


@pytest.mark.parametrize("name", STEPS)
@hypothesis.settings(deadline=None)
@hypothesis.given(t=st.integers(1, 5), h=st.integers(1, 5), w=st.integers(1, 5))
def test_a_step_says_what_its_sequences_lie_within(name, t, h, w):
    step = STEPS[name]
    number = step.sequences(t, (h, w))
    frame, position = np.indices(number.shape)
    for which in np.unique(number):
        if step.within == "frame":
            assert len(np.unique(frame[number == which])) == 1
        if step.within == "position":
            assert len(np.unique(position[number == which])) == 1


def test_an_exchange_moves_patches_and_changes_none():
    mesh = mesh_of(ALL)
    patches = np.random.default_rng(0).standard_normal((4, 4, 6, 3)).astype(np.float32)
    here = jax.NamedSharding(mesh, spec("activations/frames", 4))
    there = jax.NamedSharding(mesh, spec("activations/positions", 4))

    with jax.set_mesh(mesh):
        array = jax.device_put(patches, here)
        moved = jax.jit(sequence.to_positions)(array)
        back = jax.jit(sequence.to_frames)(moved)
    assert moved.sharding.is_equivalent_to(there, 4)
    assert moved.addressable_shards[0].data.shape == (2, 4, 3, 3)
    assert back.sharding.is_equivalent_to(here, 4)
    assert back.addressable_shards[0].data.shape == (2, 2, 6, 3)
    np.testing.assert_array_equal(moved, patches)
    np.testing.assert_array_equal(back, patches)


def test_without_a_mesh_there_is_no_sharding_in_the_program():
    config = tiny("divided")
    params = parameters(TimeSformer(config, rngs=nnx.Rngs(0)))
    video = jnp.zeros((1, 4, 16, 16, 3))
    alone = str(jax.make_jaxpr(lambda p, v: with_parameters(config, p)(v))(params, video))
    assert not any(word in alone for word in ("sharding_constraint", "shard_map", "all_to_all"))
    with jax.set_mesh(mesh_of(ALL)):
        shared = str(
            jax.make_jaxpr(lambda p, v: with_parameters(config, p)(v))(params, video[[0] * 8])
        )
    assert shared.count("all_to_all[") == 2 * config.depth
