"""Devices that share a clip: what they exchange, and that nothing changes by it."""

import math
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from flax import nnx
from meshes import (
    CLIPS,
    ONE,
    assert_same_training,
    mesh_of,
    patch_bytes,
    random_parameters,
    tiny,
    trained,
)
from test_attention import LAYERS

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.distributed import sequence
from timesformer_jax.distributed.mesh import put_batch
from timesformer_jax.distributed.sharding import spec
from timesformer_jax.evaluation.step import make_probabilities
from timesformer_jax.models import schemes
from timesformer_jax.models.attention import Tokens
from timesformer_jax.models.schemes import SCHEMES
from timesformer_jax.models.timesformer import abstract, with_parameters
from timesformer_jax.planning.collectives import collectives

pytestmark = pytest.mark.compiles

SEQUENCE, ALL = (2, 1, 1, 4), (2, 1, 2, 2)


def exchanged(found, config, devices):
    """How often devices exchange their patches, and their projections, three times as large.

    Asserts that they send them in no other way. What is gathered are tokens of shared heads.
    """
    whole = patch_bytes(config, devices)
    exchanges = [c for c in found if c.kind == "all-to-all"]
    assert {(c.num_bytes, c.axes) for c in exchanges} <= {
        (size, ("sequence",)) for size in (whole, 3 * whole)
    }
    wide = [layer for layer in config.scheme.layers if layer.within == "clip"]
    tokens = [layer.partition(config.num_frames, config.grid).max() + 1 for layer in wide]
    tokens = [s * CLIPS * config.hidden_size * 4 for s in tokens]  # bytes
    others = [c for c in found if c.kind not in ("all-to-all", "all-reduce")]
    others = [c for c in others if c.num_bytes >= whole / 10]
    assert all(c.kind == "all-gather" for c in others), others
    assert {c.num_bytes for c in others} <= {
        k * s // n for s in tokens for k in (1, 3) for n in (2, 4)
    }
    return tuple(sum(c.count for c in exchanges if c.num_bytes == k * whole) for k in (1, 3))


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
    assert exchanged(run.collectives, config, sizes[0] * sizes[3]) == (each * config.depth, 0)
    assert_same_training(run, trained(tiny("divided"), ONE))


def test_devices_that_share_heads_exchange_as_planned():
    # Projections to heads, results to frames, and the gradients of both; patches of the last block
    # are not computed. The heads are split by "tensor" already.
    config = tiny("joint", num_heads=4)
    run = trained(config, ALL, steps=2)
    assert exchanged(run.collectives, config, 8) == (2 * config.depth - 2, 2 * config.depth)
    assert_same_training(run, trained(config, ONE, steps=2))


def block(config, sizes):
    """What a block makes of random tokens, its gradients, and what devices exchange for both."""
    mesh, rng = mesh_of(sizes), np.random.default_rng(0)
    graph, shapes = nnx.split(abstract(config).blocks[0])

    def random(shape):
        return (rng.standard_normal(shape) * 0.3).astype(np.float32)

    one_a_frame = (config.num_frames,) if config.scheme.token_per_frame else ()
    d = config.hidden_size
    x = Tokens(
        random((CLIPS, *one_a_frame, d)),
        random((CLIPS, config.num_frames, math.prod(config.grid), d)),
    )
    params = jax.tree.map(lambda leaf: random(leaf.shape), shapes)
    directions = jax.tree.map(lambda leaf: random(leaf.shape), x)
    names = Tokens("token", "frames")
    places = jax.tree.map(
        lambda name, t: jax.NamedSharding(mesh, spec(f"activations/{name}", t.ndim)), names, x
    )
    x, directions = jax.device_put((x, directions), (places, places))

    def forward(params, x):
        return nnx.merge(graph, params)(x, config.grid, jax.random.key(3), 0.3)

    def both_ways(params, x):
        out, backward = jax.vjp(forward, params, x)
        return out, backward(directions)

    with jax.set_mesh(mesh):
        program = jax.jit(both_ways).lower(params, x).compile()
    return jax.device_get(program(params, x)), collectives(program, mesh)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_block_of_every_scheme_can_be_shared_and_computes_the_same(scheme):
    config = tiny(scheme, num_heads=4)
    found, exchanges = block(config, SEQUENCE)
    expected, _ = block(config, ONE)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected
    )
    by = Counter(layer.within for layer in config.scheme.layers)
    expected = 4 * by["position"] + 2 * by["clip"], 2 * by["clip"]
    assert exchanged(exchanges, config, 8) == expected


def test_temporal_attention_that_follows_from_its_partition_can_be_shared(monkeypatch):
    """Devices add positions to those of an odd number."""
    time = schemes.TIME._replace(attention_fn=None)
    monkeypatch.setitem(SCHEMES, "stated", schemes.Scheme((time,)))
    config = tiny("stated", num_heads=4, image_size=12)
    assert math.prod(config.grid) % 2
    found, _ = block(config, SEQUENCE)
    expected, _ = block(config, ONE)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected
    )


@pytest.mark.parametrize("name", LAYERS)
@hypothesis.settings(deadline=None)
@hypothesis.given(t=st.integers(1, 5), h=st.integers(1, 5), w=st.integers(1, 5))
def test_a_layer_states_what_its_sequences_lie_within(name, t, h, w):
    layer = LAYERS[name]
    number = layer.partition(t, (h, w))
    frame, position = np.indices(number.shape)
    for which in np.unique(number):
        if layer.within == "frame":
            assert len(np.unique(frame[number == which])) == 1
        if layer.within == "position":
            assert len(np.unique(position[number == which])) == 1


@pytest.mark.parametrize("n", [6, 5])  # positions; zeros make up what 2 devices do not divide
def test_an_exchange_moves_patches_and_changes_none(n):
    mesh = mesh_of(ALL)
    patches = np.random.default_rng(0).standard_normal((4, 4, n, 3)).astype(np.float32)
    here = jax.NamedSharding(mesh, spec("activations/frames", 4))
    there = jax.NamedSharding(mesh, spec("activations/positions", 4))

    with jax.set_mesh(mesh):
        array = jax.device_put(patches, here)
        moved = jax.jit(sequence.to_positions)(array)
        back = jax.jit(lambda moved: sequence.to_frames(moved, n))(moved)
    assert moved.sharding.is_equivalent_to(there, 4)
    assert moved.addressable_shards[0].data.shape == (2, 4, 3, 3)
    assert back.sharding.is_equivalent_to(here, 4)
    assert back.addressable_shards[0].data.shape == (2, 2, n, 3)
    np.testing.assert_array_equal(moved, np.pad(patches, ((0, 0), (0, 0), (0, 6 - n), (0, 0))))
    np.testing.assert_array_equal(back, patches)


def test_without_a_mesh_there_is_no_sharding_in_the_program():
    config = tiny("divided")
    arguments = random_parameters(config), np.zeros((CLIPS, 4, 16, 16, 3), np.float32)

    def program():
        return str(jax.make_jaxpr(lambda p, v: with_parameters(config, p)(v))(*arguments))

    words = ("sharding_constraint", "shard_map", "all_to_all")
    assert not any(word in program() for word in words)
    with jax.set_mesh(mesh_of(ALL)):
        assert all(word in program() for word in words)


def test_evaluation_shares_every_view_and_exchanges_twice_in_a_layer():
    config = tiny("divided", depth=1)
    clip = ClipSpec(config.num_frames, crop=16, short_side=20)
    rng = np.random.default_rng(0)
    batch = {
        "frames": rng.integers(0, 256, (4, 2, config.num_frames, 20, 20, 3), np.uint8),
        "crop_boxes": np.tile(np.float32([1, 2, 17]), (4, 2, 1)),
    }

    def probabilities(sizes):
        mesh = mesh_of(sizes)
        arrays = put_batch(mesh, batch)
        shares = sizes[0], 1, sizes[3]
        part = arrays["frames"].addressable_shards[0].data.shape
        assert part[:3] == tuple(n // s for n, s in zip((4, 2, config.num_frames), shares))
        arguments = random_parameters(config), arrays["frames"], arrays["crop_boxes"]
        with jax.set_mesh(mesh):
            program = jax.jit(make_probabilities(config, clip)).lower(*arguments).compile()
        return program(*arguments), collectives(program, mesh)

    found, exchanges = probabilities(SEQUENCE)
    np.testing.assert_allclose(found, probabilities(ONE)[0], rtol=1e-4)
    assert exchanged(exchanges, config, 8) == (2 * config.depth, 0)
