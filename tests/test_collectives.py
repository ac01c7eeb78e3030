"""Collectives counted from HLO text: programs whose exchanges are known, and every notation."""

import functools
import itertools
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from timesformer_jax.planning.collectives import Collective, collectives
from timesformer_jax.planning.hlo import parse, repeated

pytestmark = pytest.mark.compiles

AXES = ("a", "b", "c")


def mesh_of(*shape):
    return jax.make_mesh(shape, AXES[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def of_mapped(mesh, function, spec, shape):
    """The collectives of a function of each device's part of an array."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    assert collectives(compiled, mesh) == collectives(compiled.as_text(), mesh)
    return collectives(compiled, mesh)


def test_what_a_program_was_told_to_send_is_listed():
    def each(x):  # (8, 8) float32 of its own
        x = jax.lax.all_to_all(x, "b", 0, 1, tiled=True)
        x = jnp.sin(x.reshape(8, 8))
        x = jnp.sin(jax.lax.psum(x, "a"))
        x = jnp.sin(jax.lax.all_gather(x, "b", tiled=True))[:8]
        x = jnp.sin(jax.lax.psum_scatter(x, ("a", "b"), tiled=True))
        return jnp.tile(jax.lax.ppermute(x, "a", [(0, 1), (1, 0)]), (8, 1))

    assert sorted(of_mapped(mesh_of(2, 4), each, P(AXES[:2]), (64, 8))) == [
        Collective("all-gather", 4 * 8 * 8 * 4, ("b",), 1),
        Collective("all-reduce", 8 * 8 * 4, ("a",), 1),
        Collective("all-to-all", 8 * 8 * 4, ("b",), 1),
        Collective("collective-permute", 8 * 4, ("a",), 1),
        Collective("reduce-scatter", 8 * 8 * 4, ("a", "b"), 1),
    ]


def test_a_loop_counts_as_often_as_it_runs():
    def step(x, _):
        inner = jax.lax.fori_loop(0, 5, lambda i, y: jnp.sin(jax.lax.psum(y, "a")), x)
        return jnp.sin(jax.lax.psum(inner, "b")), None

    found = of_mapped(
        mesh_of(2, 4), lambda x: jax.lax.scan(step, x, None, length=3)[0], P(), (6, 7)
    )
    size = 6 * 7 * 4
    assert found == [
        Collective("all-reduce", size, ("a",), 15),
        Collective("all-reduce", size, ("b",), 3),
    ]


def test_what_loops_repeat_is_a_share_of_what_is_written():
    def steps(x, length):
        return jax.lax.fori_loop(0, length, lambda i, x: jnp.sin(x @ x), x)

    def share(length):
        compiled = jax.jit(functools.partial(steps, length=length)).lower(jnp.ones((64, 64)))
        return repeated(parse(compiled.compile()))

    assert share(1) == 0
    assert 2 < share(5) < 4  # four times what the body writes, of which a copy outside is less
    drawn = jax.jit(lambda x, key: jnp.sin(x @ x) + jax.random.uniform(key, (64,)))
    text = drawn.lower(jnp.ones((1024, 64, 64)), jax.random.key(0)).compile().as_text()
    assert "while" in text
    assert repeated(parse(text)) < 0.001


def test_a_loop_of_unknown_length_repeats_without_end():
    def double(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: 2 * x, x)

    assert repeated(parse(jax.jit(double).lower(jnp.ones(8)).compile())) == float("inf")


def test_one_device_sends_nothing():
    assert of_mapped(mesh_of(1), lambda x: jax.lax.psum(x, "a"), P(), (4,)) == []


def test_collectives_of_a_sharded_product_are_those_of_the_compiled_program():
    # Rows of the left against columns of the right: summed over the axis that both are split along.
    mesh = mesh_of(2, 2, 2)
    place = functools.partial(jax.NamedSharding, mesh)
    compiled = (
        jax.jit(
            jnp.matmul,
            in_shardings=(place(P("a", "c")), place(P("c", "b"))),
            out_shardings=place(P("a", "b")),
        )
        .lower(*(jax.ShapeDtypeStruct((8, 8), jnp.bfloat16),) * 2)
        .compile()
    )
    assert [(c.kind, c.axes, c.count) for c in collectives(compiled, mesh)] == [
        ("all-reduce", ("c",), 1)
    ]


# Texts as compilers for other devices write them.


def program(*instructions):
    lines = "\n".join(f"  {line}" for line in instructions)
    return f"HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n{lines}\n}}\n"


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        (
            "%x = (f32[4]{0:T(128)}, f32[8]{0:T(128)S(1)}) all-gather-start(%p), channel_id=1, "
            "replica_groups={{0,1},{2,3}}, dimensions={0}, use_global_device_ids=true",
            ("all-gather", 32),
        ),
        (
            "%x = ((bf16[4]{0}, s8[6]{0}), (bf16[8]{0}, /*index=1*/s8[12]{0}), u32[], u32[]) "
            "all-gather-start(%p, %q), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}, "
            "use_global_device_ids=true",
            ("all-gather", 28),
        ),
        (
            "%x = (f32[4]{0}, f32[3]{0}) all-reduce-start(%p, %q), channel_id=1, "
            "replica_groups=[2,2]<=[4], use_global_device_ids=true, to_apply=%add",
            ("all-reduce", 28),
        ),
        (
            "%x = ((f32[8]{0}), f32[4]{0}) reduce-scatter-start(%p), channel_id=1, "
            "replica_groups=mesh['u'=2,'v'=2] {'v'}, dimensions={0}, "
            "use_global_device_ids=true, to_apply=%add",
            ("reduce-scatter", 32),
        ),
        (
            "%x = ((f32[8]{0}), f32[8]{0}, u32[]) all-to-all-start(%p), channel_id=1, "
            "replica_groups={{0,1},{2,3}}, dimensions={0}",
            ("all-to-all", 32),
        ),
        (
            "%x = (pred[8]{0}, pred[8]{0}, u32[], u32[]) collective-permute-start(%p), "
            "channel_id=1, source_target_pairs={{0,1},{2,3}}",
            ("collective-permute", 8),
        ),
    ],
)
def test_an_asynchronous_collective_counts_where_it_starts(instruction, expected):
    kind = expected[0]
    text = program(instruction, f"ROOT %y = f32[8]{{0}} {kind}-done(%x)")
    assert collectives(text, mesh_of(2, 2)) == [Collective(*expected, ("b",), 1)]


def test_a_wrapped_collective_counts_once_and_each_branch_counts():
    text = (
        "HloModule m\n\n%wrapped (p: f32[8]) -> f32[8] {\n"
        "  ROOT %a = f32[8]{0} all-to-all(%p), channel_id=1, replica_groups={}, dimensions={0}\n}\n"
        "%empty (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8]{0} parameter(0)\n}\n"
    ) + program(
        "%s = ((f32[8]{0}), f32[8]{0}, s32[]) async-start(%p), calls=%wrapped",
        "%d = f32[8]{0} async-done(%s), calls=%wrapped",
        "%c = f32[8]{0} conditional(%i, %d, %d), branch_computations={%wrapped, %empty}",
    )
    assert collectives(text, mesh_of(4)) == [Collective("all-to-all", 32, ("a",), 2)]


@pytest.mark.parametrize(
    ("attributes", "axes"),
    [
        ("channel_id=1, replica_groups={{0}}", ("a", "b")),  # the one replica: all its devices
        ("replica_groups={{0}}", ()),  # among replicas, of which there is one
        ("replica_groups={{0,2},{1,3}}, channel_id=1, use_global_device_ids=true", ("a",)),
    ],
)
def test_groups_of_replicas_are_not_of_devices(attributes, axes):
    text = program(f"ROOT %x = f32[8]{{0}} all-reduce(%p), {attributes}, to_apply=%add")
    assert [c.axes for c in collectives(text, mesh_of(2, 2))] == ([axes] if axes else [])


def axes_of(groups, mesh):
    """The axes of an exchange between these groups; none where none has two members."""
    text = program(f"ROOT %x = f32[8]{{0}} all-to-all(%p), channel_id=1, replica_groups={groups}")
    found = collectives(text, mesh)
    return found[0].axes if found else ()


def in_every_notation(shape, order, along):
    """The groups of devices that differ along axes `along` of a mesh, written in each way.

    The mesh is numbers from 0 in `shape`, transposed by `order`.
    """
    places = np.arange(np.prod(shape)).reshape(shape).transpose(order)
    others = [i for i in range(len(shape)) if i not in along]
    groups = places.transpose(*others, *along).reshape(
        -1, np.prod([places.shape[i] for i in along])
    )
    last = [order[i] for i in (*others, *along)]

    def listed(numbers):
        return ",".join(map(str, numbers))

    names = listed(f"'x{i}'={size}" for i, size in enumerate(places.shape))
    chosen = listed(f"'x{i}'" for i in along)
    yield "{" + listed("{" + listed(group) + "}" for group in groups) + "}"
    yield f"[{listed(groups.shape)}]<=[{listed(shape)}]T({listed(last)})"
    yield f"mesh[{names}], device_ids=([{listed(shape)}]T({listed(order)})) {{{chosen}}}"
    yield f"mesh[{names}], device_ids=({listed(places.reshape(-1))}) {{{chosen}}}"


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.data())
def test_the_axes_are_the_same_in_every_notation(data):
    mesh = mesh_of(*data.draw(st.permutations((2, 1, 4))))
    shape = data.draw(st.sampled_from([(8,), (2, 4), (4, 2), (2, 2, 2), (1, 8)]))
    order = data.draw(st.permutations(range(len(shape))))
    along = data.draw(st.lists(st.sampled_from(range(len(shape))), min_size=1, unique=True))
    written = list(in_every_notation(shape, order, along))

    groups = json.loads(written[0].replace("{", "[").replace("}", "]"))
    pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
    places = [np.array(np.unravel_index(devices, mesh.devices.shape)) for devices in pairs]
    expected = {AXES[i] for place in places for i in np.flatnonzero(place[:, 0] != place[:, 1])}
    for groups in written:
        assert set(axes_of(groups, mesh)) == expected, groups


def test_a_part_of_an_axis():
    # Of eight devices as (2, 2, 2): the second and the first of the parts.
    for part, axes in (("'x':(2)2", ("b",)), ("'x':(1)2", ("a",)), ("'x':(2)4", ("b", "c"))):
        assert axes_of(f"mesh['x'=8] {{{part}}}", mesh_of(2, 2, 2)) == axes


@pytest.mark.parametrize("text", ["", "module @jit_f {", program().replace("ENTRY ", "")])
def test_what_is_not_a_compiled_program_is_refused(text):
    with pytest.raises(ValueError, match="as_text"):
        collectives(text, mesh_of(2))


def test_an_unknown_notation_is_refused():
    with pytest.raises(ValueError, match="unknown notation: <0 1>"):
        axes_of("<0 1>", mesh_of(2))
