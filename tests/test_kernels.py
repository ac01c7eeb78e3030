"""Device kernels where there is no device: interpreted on the host, and lowered for CUDA."""

import contextlib
import dataclasses
import functools
import json
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from meshes import mesh_of

from timesformer_jax.benchmark import autotune
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.ops.kernels import cudnn, hopper, select
from timesformer_jax.models.ops.kernels.select import Kernel
from timesformer_jax.models.schemes import SCHEMES
from timesformer_jax.models.timesformer import TimeSformer, abstract
from timesformer_jax.planning.collectives import collectives

pytestmark = pytest.mark.compiles

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
BASE = (64, 8, 196, 3, 12, 64)
# Of the largest value. bfloat16 keeps 8 bits: the weights and the result are each rounded once.
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-10}


def random(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1.5, shape), dtype)


def reference(qkv, g):
    """Temporal attention and the gradient of sum(g * attention), sequence by sequence."""
    qkv, g = np.asarray(qkv, np.float64), np.asarray(g, np.float64)
    b, t, n, _, h, d = qkv.shape
    g = g.reshape(b, t, n, h, d)
    out, gradient = np.empty_like(g), np.empty_like(qkv)
    for i, j, k in np.ndindex(b, n, h):
        q, key, v, do = *(qkv[i, :, j, part, k] for part in range(3)), g[i, :, j, k]
        logits = q @ key.T / np.sqrt(d)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        out[i, :, j, k] = weights @ v
        d_weights = do @ v.T
        d_logits = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True)) / np.sqrt(d)
        for part, value in enumerate((d_logits @ key, d_logits.T @ q, weights.T @ do)):
            gradient[i, :, j, part, k] = value
    return out.reshape(b, t, n, -1), gradient


def close(found, expected, dtype):
    error = np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()
    return error < TOLERANCE[dtype]  # False for NaN, which memory holds before it is written


# Tiles of several positions, and a last tile with fewer; tiles of 96 rows, whose products overlap,
# and of 128, whose products do not; several heads per block.
CASES = [
    ((2, 8, 11, 3, 2, 64), "bfloat16", 2),
    ((1, 16, 3, 3, 1, 32), "float16", 1),
    ((1, 24, 5, 3, 1, 64), "bfloat16", 1),
    ((1, 64, 1, 3, 2, 32), "bfloat16", 2),
    ((1, 128, 1, 3, 1, 32), "bfloat16", 1),
    ((1, 8, 3, 3, 3, 32), "bfloat16", 3),
]


@pytest.mark.parametrize(("shape", "dtype", "heads_per_block"), CASES, ids=str)
def test_temporal_attention_and_its_gradient(shape, dtype, heads_per_block):
    qkv = random(shape, dtype)
    g = random((*shape[:3], shape[4] * shape[5]), dtype, seed=1)
    interpret = InterpretGPUParams(detect_races=True)
    attention = functools.partial(
        hopper.attention, heads_per_block=heads_per_block, interpret=interpret
    )

    out, vjp = jax.vjp(jax.jit(attention), qkv)
    (gradient,) = vjp(g)

    assert out.dtype == gradient.dtype == qkv.dtype
    expected, of_inputs = reference(qkv, g)
    assert close(out, expected, dtype)
    assert close(gradient, of_inputs, dtype)
    assert not get_races().races_found


def lowered(function, *shapes):
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def loss(attention):
    return lambda qkv: attention(qkv).astype(jnp.float32).sum()


@pytest.mark.parametrize("frames", [8, 96])
def test_the_kernel_lowers_for_cuda_and_reads_the_projection_where_it_lies(frames):
    qkv = jax.ShapeDtypeStruct((2, frames, 49, 3, 2, 64), jnp.bfloat16)
    forward = lowered(hopper.attention, qkv)
    assert forward.count("custom_call @mosaic_gpu") == 1
    assert "stablehlo.transpose" not in forward
    backward = lowered(jax.grad(loss(jax.checkpoint(hopper.attention))), qkv)
    assert backward.count("custom_call @mosaic_gpu") == 1  # the forward pass is not needed again
    assert "stablehlo.transpose" not in backward


@pytest.mark.parametrize(
    ("shape", "dtype", "why"),
    [
        (BASE, "float32", "float32"),
        ((1, 7, 4, 3, 2, 64), "bfloat16", "7 frames"),
        ((1, 4, 4, 3, 2, 64), "bfloat16", "4 frames"),
        ((1, 200, 4, 3, 2, 64), "bfloat16", "200 frames"),
        ((1, 8, 4, 3, 2, 80), "bfloat16", "80 channels"),
        ((1, 128, 4, 3, 2, 128), "bfloat16", "shared memory"),
        ((1, 8, 4, 3, 3, 64), "bfloat16", "3 heads"),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_take_is_told(shape, dtype, why):
    assert why in hopper.unsupported(shape, dtype, heads_per_block=1 + (why == "3 heads"))


@hypothesis.given(t=st.integers(1, 256), d=st.sampled_from([32, 64, 128]))
def test_a_tile_is_whole_sequences_that_tensor_cores_take(t, d):
    taken = hopper.unsupported((1, t, 5, 3, 2, d), "bfloat16") is None
    rows = hopper.tile_rows(t)
    if taken:
        assert rows % t == 0
        assert 64 <= rows <= 128
        assert rows * d * 7 * 2 < 227 * 1024
    assert taken or d == 128 or t % 8 or t not in (8, 16, 24, 32, 48, 64, 96, 128)


@pytest.fixture
def cudnn_installed(monkeypatch):
    """A cuDNN to trace for."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91501)
    monkeypatch.setattr(cudnn, "cudnn_version", lambda: (9, 15, 1))


@pytest.mark.parametrize("length", [2, 197, 198])
@pytest.mark.usefixtures("cudnn_installed")
def test_every_length_that_cudnn_is_said_to_take_can_be_trained(length):
    qkv = jax.ShapeDtypeStruct((2, 3, length, 3, 2, 64), jnp.bfloat16)
    assert cudnn.unsupported(qkv.shape, qkv.dtype) is None
    assert jax.eval_shape(cudnn.attention, qkv).shape == (2, 3, length, 128)
    assert "__cudnn$fmha" in lowered(cudnn.attention, qkv)
    assert "__cudnn$fmhaSoftmaxBackward" in lowered(jax.grad(loss(cudnn.attention)), qkv)


@pytest.mark.parametrize("length", [6, 7])
@pytest.mark.parametrize("kind", ["temporal", "spatial"])
def test_what_cudnn_is_given_is_the_attention(monkeypatch, kind, length):
    """JAX's own implementation of the same call stands in for the device's."""
    plain = jax.nn.dot_product_attention

    def on_the_host(*args, implementation, **options):
        assert implementation == "cudnn"
        return plain(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_the_host)
    shape = (2, length, 5, 3, 2, 8) if kind == "temporal" else (2, 5, length, 3, 2, 8)
    qkv, g = random(shape, "float32"), random((*shape[:3], 16), "float32", seed=1)
    out, vjp = jax.vjp(select.KERNELS[kind]["cudnn"].attention, qkv)
    swap = (lambda x: x) if kind == "temporal" else (lambda x: np.swapaxes(x, 1, 2))
    expected, gradient = (swap(x) for x in reference(swap(qkv), swap(g)))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(vjp(g)[0], gradient, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "dtype", "version", "why"),
    [
        ((8, 197, 3, 12, 64), "bfloat16", (9, 15, 0), "9.15.0 is older than 9.15.1"),
        ((8, 197, 3, 12, 64), "float32", (9, 15, 1), "float32"),
        ((8, 1, 3, 12, 64), "bfloat16", (9, 15, 1), "one token"),
        ((8, 197, 3, 12, 36), "bfloat16", (9, 15, 1), "36 channels"),
        ((8, 197, 3, 12, 256), "bfloat16", (9, 15, 1), "256 channels"),
    ],
    ids=str,
)
def test_what_cudnn_does_not_take_is_told(shape, dtype, version, why):
    assert why in cudnn.unsupported(shape, dtype, version)


def test_without_cudnn_nothing_is_promised(monkeypatch):
    monkeypatch.setattr(cudnn, "cudnn_version", lambda: None)
    assert "not installed" in cudnn.unsupported((8, 197, 3, 12, 64), "bfloat16")


@contextlib.contextmanager
def program_for(device_kind, axes=(1, 1, 1, 1)):
    device = AbstractDevice(device_kind=device_kind, num_cores=None, platform="gpu")
    names = ("data", "fsdp", "tensor", "sequence")
    mesh = AbstractMesh(axes, names, (AxisType.Auto,) * 4, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def table(tmp_path, *rows):
    path = tmp_path / "measured.json"
    about = {
        "kind": "temporal", "device": H100, "dtype": "bfloat16",
        "length": 8, "heads": 12, "channels": 64,
    }  # fmt: skip
    path.write_text(json.dumps([about | row for row in rows]))
    return path


def timed(implementation, gradient, **fields):
    seconds = {"forward": 1.0, "gradient": gradient}
    return {"implementation": implementation, "seconds": seconds, **fields}


def test_the_shipped_table_gives_xla_where_it_has_no_row():
    with program_for("NVIDIA A100-SXM4-80GB"):
        assert select.select_implementation("temporal", BASE, "bfloat16") == "xla"
    assert select.select_implementation("spatial", (8, 8, 197, 3, 12, 64), "float32") == "xla"


def test_the_fastest_is_selected_for_the_case_that_was_measured(tmp_path):
    selected = functools.partial(
        select.select_implementation,
        "temporal",
        table=table(tmp_path, timed("xla", 3.0), timed("pallas", 2.0), timed("pallas_2", 2.5)),
    )
    with program_for(H100):
        assert selected(BASE, "bfloat16") == "pallas"
        assert selected((1, 8, 784, 3, 12, 64), "bfloat16") == "pallas"  # more positions
        assert selected((64, 16, 196, 3, 12, 64), "bfloat16") == "xla"
        assert selected(BASE, "float32") == "xla"
        assert selected((64, 8, 196, 3, 16, 64), "bfloat16") == "xla"
    with program_for(H200):
        assert selected(BASE, "bfloat16") == "xla"
    with program_for(H100, axes=(1, 1, 2, 1)):
        assert selected(BASE, "bfloat16") == "xla"  # a device has 6 heads
        assert selected((64, 8, 196, 3, 24, 64), "bfloat16") == "pallas"
    assert selected(BASE, "bfloat16") == "xla"  # this machine


def test_what_failed_or_can_run_no_more_is_not_chosen(monkeypatch, tmp_path):
    monkeypatch.setattr(cudnn, "cudnn_version", lambda: None)
    failed = {"implementation": "pallas", "error": "differs"}
    with program_for(H100):
        rows = table(tmp_path, timed("xla", 3.0), failed, timed("cudnn", 1.0))
        assert select.select_implementation("temporal", BASE, "bfloat16", table=rows) == "xla"


def test_a_device_without_timings_is_warned_of_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(cudnn, "cudnn_version", lambda: None)
    heads = 20  # which no other test has
    rows = table(tmp_path, timed("xla", 1.0, length=16, heads=heads))
    selected = functools.partial(
        select.select_implementation, "temporal", dtype="bfloat16", table=rows
    )
    shape = (64, 8, 196, 3, heads, 64)
    selected(shape)  # on this machine
    with program_for(H100):
        selected((1, 7, 4, 3, heads, 64))  # which no kernel supports
        selected((1, 16, 4, 3, heads, 64))
        assert not caplog.records
        for _ in range(12):
            assert selected(shape) == "xla"
    [record] = caplog.records
    assert f"no temporal attention of 8 tokens in bfloat16 was measured on {H100}" in record.message
    assert "timesformer benchmark attention --autotune" in record.message


def plain(qkv):
    b, t, n, _, h, d = qkv.shape
    q, k, v = (jnp.swapaxes(qkv[..., i, :, :], 1, 2).reshape(b * n, t, h, d) for i in range(3))
    return jnp.swapaxes(jax.nn.dot_product_attention(q, k, v).reshape(b, n, t, h * d), 1, 2)


def within(qkv):
    """`plain` of sequences: (B, S, length, 3, h, d) to (B, S, length, h * d)."""
    b, s, length, *heads = qkv.shape
    return plain(qkv.reshape(b * s, length, 1, *heads)).reshape(b, s, length, -1)


SMALL = TimeSformerConfig(
    num_classes=5, image_size=32, num_frames=8, hidden_size=64, depth=2, num_heads=2,
    init="width_scaled", drop_path=0.0,
)  # fmt: skip


def always(implementation):
    """Selects one implementation for every attention that it supports."""

    def selected(kind, shape, dtype):
        known = implementation in select.KERNELS[kind]
        fits = known and select.unsupported(kind, shape, dtype, implementation) is None
        return implementation if fits else "xla"

    return selected


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_gives_a_kernel_the_same_attention(scheme, monkeypatch):
    model = TimeSformer(dataclasses.replace(SMALL, attention=scheme), rngs=nnx.Rngs(0))
    video = random((2, 4, 32, 32, 3), "float32")
    expected, used = model(video), []

    def counted(attention):
        def run(qkv):
            used.append(qkv.shape)
            return attention(qkv)

        return Kernel(run, lambda shape, dtype: None)

    monkeypatch.setitem(select.KERNELS["temporal"], "other", counted(plain))
    monkeypatch.setitem(select.KERNELS["spatial"], "other", counted(within))
    monkeypatch.setattr(select, "HOPPER", re.compile("cpu"))
    monkeypatch.setattr(select, "select_implementation", always("other"))
    np.testing.assert_allclose(model(video), expected, atol=2e-5)
    assert used


@pytest.mark.usefixtures("cudnn_installed")
@pytest.mark.parametrize("implementation", ["pallas", "pallas_2", "cudnn"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_traced_with_every_implementation(scheme, implementation, monkeypatch):
    monkeypatch.setattr(select, "select_implementation", always(implementation))
    used = set()
    for kind, kernels in select.KERNELS.items():
        if implementation in kernels:
            kernel = kernels[implementation]

            def run(qkv, kernel=kernel, kind=kind):
                used.add(kind)
                return kernel.attention(qkv)

            monkeypatch.setitem(kernels, implementation, kernel._replace(attention=run))
    config = dataclasses.replace(SMALL, attention=scheme, dtype="bfloat16")
    graph, state = nnx.split(abstract(config))
    video = jax.ShapeDtypeStruct((2, 8, 32, 32, 3), "float32")

    def loss(state, video):
        return nnx.merge(graph, state)(video).sum()

    with program_for(H100):
        jax.jit(jax.grad(loss)).trace(state, video)
    # The class token makes 9 tokens of 8 frames, which "time" alone has in temporal attention.
    temporal = scheme in ("divided", "space_then_time", "parallel", "axial")
    assert bool(used) == (temporal or implementation == "cudnn")


def test_on_a_gpu_patches_lie_in_the_order_of_their_axes():
    graph, state = nnx.split(abstract(SMALL))
    video = jax.ShapeDtypeStruct((2, 8, 32, 32, 3), "float32")

    def loss(state, video):
        return nnx.merge(graph, state)(video).sum()

    def constraints():
        return str(jax.jit(jax.grad(loss)).trace(state, video).jaxpr).count("layout_constraint")

    with program_for(H100):
        # After the embedding and each of two layers' three updates but the last, which nothing
        # reads; and of their gradients.
        assert constraints() == 2 * (1 + 2 * 3 - 1)
    assert constraints() == 0  # on this machine


def test_a_device_runs_the_kernel_on_its_own_part(monkeypatch):
    seen = []

    def kernel(qkv):
        seen.append(qkv.shape)
        return plain(qkv)

    monkeypatch.setitem(select.KERNELS["temporal"], "pallas", Kernel(kernel, None))
    qkv = random((4, 3, 6, 3, 2, 8), "float32")
    apply = functools.partial(select.run_kernel, "temporal", name="pallas")
    expected = apply(qkv)
    mesh = mesh_of((2, 1, 2, 2))
    lies = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "sequence", None, "tensor"))
    with jax.set_mesh(mesh):
        compiled = jax.jit(apply).lower(jax.device_put(qkv, lies)).compile()
        np.testing.assert_allclose(compiled(jax.device_put(qkv, lies)), expected, atol=1e-6)
    assert seen == [(4, 3, 6, 3, 2, 8), (2, 3, 3, 3, 1, 8)]
    assert not collectives(compiled.as_text(), mesh)


def test_what_is_measured_runs_and_agrees(monkeypatch, tmp_path):
    def broken(qkv):
        raise RuntimeError("no kernel image\nand more")

    kernels = {
        "pallas": Kernel(plain, lambda shape, dtype: None),
        "pallas_2": Kernel(lambda qkv: plain(qkv) * 1.05, lambda shape, dtype: None),
        "pallas_3": Kernel(broken, lambda shape, dtype: None),
        "cudnn": Kernel(plain, lambda shape, dtype: "not here"),
    }
    monkeypatch.setitem(select.KERNELS, "temporal", kernels)
    monkeypatch.setattr(select, "HOPPER", re.compile("cpu"))
    clock = iter(float(i) for i in range(1, 5))
    shape = (1, 3, 2, 3, 2, 8)

    rows = autotune.measure(
        "temporal", shape, "float32", plain, lambda f, x: f(x).size and next(clock)
    )

    by_name = {row["implementation"]: row for row in rows}
    assert by_name["xla"]["seconds"] == {"forward": 1.0, "gradient": 2.0}
    assert by_name["pallas"]["seconds"] == {"forward": 3.0, "gradient": 4.0}
    assert "values differ from xla's by 0.05" in by_name["pallas_2"]["error"]
    assert by_name["pallas_3"]["error"] == "RuntimeError: no kernel image"
    assert by_name["cudnn"]["error"] == "not here"
    path = table(tmp_path, timed("xla", 1.0))
    for _ in range(2):
        path.write_text(json.dumps(autotune.merge(rows, path)))
    assert len(json.loads(path.read_text())) == 1 + len(rows)
    selected = select.select_implementation("temporal", (9, *shape[1:]), "float32", table=path)
    assert selected == "xla"


def test_on_this_machine_only_xla_is_timed():
    rows = autotune.measure("spatial", (1, 2, 5, 3, 2, 8), "float32", plain, lambda f, x: 1.0)
    assert [("seconds" in row, row["implementation"]) for row in rows] == [
        (True, "xla"),
        (False, "cudnn"),
    ]
    assert "use 'xla'" in rows[1]["error"]
