"""Spatial attention for TPUs where there is no TPU: interpreted on the host, and lowered."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from test_costs import equations

from timesformer_jax.models.ops.kernels import tpu_heads, tpu_joint, tpu_spatial, tpu_temporal
from timesformer_jax.models.ops.kernels.tpu_blocks import Sequence

pytestmark = pytest.mark.compiles

# Of the largest value. bfloat16 keeps 8 bits: the weights and the result are each rounded once.
TOLERANCE = {"bfloat16": 2**-6, "float32": 2**-17}


# XLA would take most of the time to make the interpreted kernels fast on the host.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def random(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1.5, shape), dtype)


def reference(patches, cls, heads, frames, sequences, g, cls_g):
    """The attended values and the gradients of their product with g, sequence by sequence."""
    b, t, n, width = patches.shape
    d = width // 3 // heads
    number = np.tile(np.zeros(n, int) if sequences is None else np.asarray(sequences), frames)
    count = number.max() + 1

    def grouped(x):  # (B, T / frames, frames * N, ...)
        return np.asarray(x, np.float64).reshape(b, t // frames, frames * n, -1)

    def tokens(x):  # (B, T / frames, C, ...)
        return np.asarray(x, np.float64).reshape(b, t // frames, count, -1)

    x, g, numbers = grouped(patches), grouped(g), number
    if cls is not None:
        x, g = np.concatenate([x, tokens(cls)], 2), np.concatenate([g, tokens(cls_g)], 2)
        numbers = np.concatenate([number, np.arange(count)])
    outs, gradients = np.zeros_like(g), np.zeros_like(x)
    for i, j, s in np.ndindex(b, t // frames, count):
        at = np.flatnonzero(numbers == s)
        qkv, do = x[i, j, at].reshape(len(at), 3, heads, d), g[i, j, at].reshape(-1, heads, d)
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        logits = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(d)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        outs[i, j, at] = np.einsum("hqk,khd->qhd", weights, v).reshape(len(at), -1)
        d_weights = np.einsum("qhd,khd->hqk", do, v)
        d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) / np.sqrt(d)
        parts = (
            np.einsum("hqk,khd->qhd", d_logits, k),
            np.einsum("hqk,qhd->khd", d_logits, q),
            np.einsum("hqk,qhd->khd", weights, do),
        )
        gradients[i, j, at] = np.stack(parts, 1).reshape(len(at), -1)

    def split(x):
        patches, cls = x[:, :, : frames * n], x[:, :, frames * n :]
        return patches.reshape(b, t, n, -1), cls.reshape(b, -1, x.shape[-1])

    return split(outs), split(gradients)


def check(b, t, n, heads, d, dtype, with_cls=True, frames=1, sequences=None, interpret=True):
    count = t // frames * (1 if sequences is None else max(sequences) + 1)
    patches = random((b, t, n, 3 * heads * d), dtype)
    cls = random((b, count, 3 * heads * d), dtype, seed=1) if with_cls else None
    g = random((b, t, n, heads * d), dtype, seed=2)
    cls_g = random((b, count, heads * d), dtype, seed=3) if with_cls else None
    assert tpu_spatial.unsupported((b, t, n, 3, heads, d), dtype, frames) is None

    def attention(patches, cls):
        return tpu_spatial.attention(
            patches, cls, heads, frames=frames, sequences=sequences, interpret=interpret
        )

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(patches, cls, g, cls_g):
        out, vjp = jax.vjp(attention, patches, cls)
        return attention(patches, cls), out, vjp((g, cls_g))

    plain, out, gradients = run(patches, cls, g, cls_g)

    expected, of_inputs = reference(patches, cls, heads, frames, sequences, g, cls_g)
    for found, wanted in ((plain, expected), (out, expected), (gradients, of_inputs)):
        for x, y, like in zip(found, wanted, (patches, cls)):
            assert (x is None) == (like is None)
            if x is not None:
                assert x.dtype == like.dtype
                assert x.shape == y.shape
                assert close(x, y, np.abs(wanted[0]).max(), dtype)


def close(found, expected, scale, dtype):
    return np.abs(np.asarray(found, np.float64) - expected).max() < TOLERANCE[dtype] * scale


ROWS = tuple(i // 5 for i in range(30))
COLUMNS = tuple(i % 5 for i in range(30))


@pytest.mark.parametrize(
    ("n", "heads", "d", "options", "dtype"),
    [
        pytest.param(196, 2, 64, {}, "bfloat16", id="base"),
        pytest.param(37, 2, 64, {"with_cls": False}, "float32", id="no class token"),
        pytest.param(300, 1, 128, {}, "bfloat16", id="two chunks of queries"),
        pytest.param(300, 1, 128, {}, "float32", id="two chunks of queries in float32"),
        pytest.param(20, 4, 96, {}, "float32", id="heads across lanes of 128"),
        pytest.param(32, 4, 32, {"with_cls": False}, "bfloat16", id="whole tiles"),
        pytest.param(30, 2, 64, {"sequences": ROWS}, "float32", id="rows"),
        pytest.param(30, 2, 64, {"sequences": COLUMNS}, "bfloat16", id="columns"),
        pytest.param(
            30, 2, 64, {"sequences": COLUMNS, "with_cls": False}, "float32", id="columns alone"
        ),
    ],
)
def test_attention_and_its_gradient(n, heads, d, options, dtype):
    check(1, 2, n, heads, d, dtype, **options)


@hypothesis.settings(max_examples=5)
@hypothesis.given(
    b=st.integers(1, 2),
    t=st.integers(1, 3),
    n=st.integers(1, 40),
    heads=st.sampled_from([(1, 128), (2, 64), (4, 32), (8, 16)]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    with_cls=st.booleans(),
    count=st.integers(0, 4),
)
@hypothesis.example(1, 1, 1, (2, 64), "bfloat16", True, 0)
@hypothesis.example(1, 1, 1, (2, 64), "float32", False, 1)
def test_odd_sizes(b, t, n, heads, dtype, with_cls, count):
    count = min(count, n)
    sequences = tuple(i % count for i in range(n)) if count else None
    check(b, t, n, *heads, dtype, with_cls, sequences=sequences)


@pytest.mark.parametrize("frames", [1, 3])
def test_undefined_rows_after_the_last_patch_change_nothing(frames):
    """The simulator of a TPU's memory has NaN there, and where nothing was written."""
    memory = pltpu.InterpretParams(out_of_bounds_reads="uninitialized", uninitialized_memory="nan")
    check(1, 3, 21, 2, 64, "bfloat16", frames=frames, interpret=memory)


def test_slabs_in_several_steps(monkeypatch):
    monkeypatch.setattr(tpu_heads, "STEP_LOGITS", 1)
    check(2, 2, 21, 4, 64, "bfloat16", sequences=tuple(i // 7 for i in range(21)))


# One backward pass in bfloat16, two in float32: some cases meet the one, some the other.
BFLOAT16, FLOAT32 = ("bfloat16", 1), ("float32", 2)


@pytest.mark.parametrize(
    ("step_logits", "t", "frames", "n", "heads", "d", "with_cls", "dtype", "passes"),
    [
        pytest.param(1_500_000, 4, 2, 7, 2, 64, True, *BFLOAT16, id="one block"),
        pytest.param(20_000, 4, 4, 21, 4, 64, True, *FLOAT32, id="blocks of frames"),
        pytest.param(20_000, 5, 5, 13, 2, 64, True, *BFLOAT16, id="a last block of fewer frames"),
        pytest.param(20_000, 5, 5, 13, 2, 64, True, *FLOAT32, id="the same in two passes"),
        pytest.param(20_000, 5, 5, 16, 4, 32, False, *FLOAT32, id="no class token"),
        pytest.param(40_000, 2, 1, 150, 2, 64, True, *BFLOAT16, id="blocks of a frame"),
        pytest.param(20_000, 2, 2, 128, 1, 128, False, *BFLOAT16, id="blocks of several frames"),
    ],
)
def test_long_sequences(step_logits, t, frames, n, heads, d, with_cls, dtype, passes, monkeypatch):
    monkeypatch.setattr(tpu_heads, "STEP_LOGITS", step_logits)
    monkeypatch.setattr(tpu_joint, "RESIDENT", 0 if passes == 2 else tpu_joint.RESIDENT)
    check(1, t, n, heads, d, dtype, with_cls, frames)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 2, 4, 3, 2, 64), "float16", "float16"),
        ((1, 2, 4, 3, 2, 60), "bfloat16", "60 channels"),
        ((1, 2, 4, 3, 3, 32), "bfloat16", "128"),
        ((1, 2, 4, 3, 2, 8), "float32", "128"),
    ],
)
def test_what_is_not_supported(shape, dtype, reason):
    assert reason in tpu_spatial.unsupported(shape, dtype)


def test_frames_larger_than_the_memory_cannot_be_split_into_sequences():
    shape = (1, 2, 3136, 3, 12, 64)
    assert tpu_spatial.unsupported(shape, "bfloat16") is None
    assert "memory" in tpu_spatial.unsupported(shape, "bfloat16", sequences=56)


@hypothesis.given(
    f=st.integers(1, 32),
    n=st.integers(1, 2500),
    d=st.sampled_from([16, 32, 64, 80, 96, 120, 128]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    has_cls=st.booleans(),
)
@hypothesis.example(1, 30 * 30, 64, "bfloat16", True)
@hypothesis.example(8, 26 * 26, 64, "bfloat16", True)
@hypothesis.example(8, 14 * 14, 120, "bfloat16", True)
def test_a_frame_is_cut_only_where_whole_registers_of_its_rows_are_left(f, n, d, dtype, has_cls):
    """The compiler for TPUs refuses to copy other numbers of rows out of a block."""
    for block in Sequence(f, n, has_cls, 16, d, jnp.dtype(dtype)).blocks:
        assert block.rows == n or n % block.rows % 8 == block.rows % 8 == 0


@pytest.mark.parametrize("frames", [1, 8])
@pytest.mark.parametrize("side", [29, 30, 31, 33, 34, 35, 38, 42, 45])
def test_frames_that_cannot_be_cut_are_whole(side, frames):
    shape, dtype = (1, 8, side**2, 3, 12, 64), jnp.dtype("bfloat16")
    q, k = Sequence(frames, side**2, True, 12, 64, dtype).blocks
    assert (q.frames, q.rows) == (k.frames, k.rows) == (1, side**2)
    assert tpu_spatial.unsupported(shape, dtype, frames) is None


@pytest.mark.parametrize(("n", "h", "d"), [(900, 16, 120), (4489, 12, 64)])
def test_frames_that_can_neither_be_cut_nor_be_whole_are_refused(n, h, d):
    assert "multiples of 8" in tpu_spatial.unsupported((1, 1, n, 3, h, d), "bfloat16")
    assert tpu_spatial.unsupported((1, 1, n - n % 8, 3, h, d), "bfloat16") is None


def test_wrong_sequences_are_refused():
    patches, cls = random((1, 1, 4, 384), "float32"), random((1, 2, 384), "float32")
    attention = functools.partial(tpu_spatial.attention, heads=2, interpret=True)
    with pytest.raises(ValueError, match="3 numbers of sequences for 1 x 4"):
        attention(patches, cls, sequences=(0, 0, 1))
    with pytest.raises(ValueError, match="2 tokens for 1 x 3 sequences"):
        attention(patches, cls, sequences=(0, 0, 1, 2))


def lowered(function, *shapes):
    device = AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()


KERNELS = {
    "spatial": tpu_spatial.attention,
    "joint": functools.partial(tpu_spatial.attention, frames=2),
    "temporal": tpu_temporal.attention,
}


@pytest.mark.parametrize("attention", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("precision", [None, "bfloat16", "high", "highest", "TF32_TF32_F32"])
def test_products_have_a_precision_that_the_compiler_knows(precision, attention):
    """That is one pass for bfloat16, and one or all for float32."""

    def loss(patches):
        return attention(patches, None, 2)[0].astype(jnp.float32).sum()

    full = precision not in (None, "bfloat16")
    for dtype, expected in (
        (jnp.bfloat16, jax.lax.Precision.DEFAULT),
        (jnp.float32, jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT),
    ):
        with jax.default_matmul_precision(precision):
            program = jax.make_jaxpr(jax.grad(loss))(jnp.zeros((1, 2, 8, 384), dtype))
        products = [e for e in equations(program) if e.primitive.name == "dot_general"]
        assert products
        assert {e.params["precision"] for e in products} == {(expected, expected)}


@pytest.mark.parametrize(
    ("frames", "sequences"),
    [(1, None), (1, tuple(i % 14 for i in range(196))), (8, None)],
    ids=["frames", "columns", "joint"],
)
def test_it_lowers_for_tpu_without_changes_of_layout(frames, sequences):
    count = 8 // frames * (1 if sequences is None else 14)
    patches = jax.ShapeDtypeStruct((2, 8, 196, 2304), jnp.bfloat16)
    cls = jax.ShapeDtypeStruct((2, count, 2304), jnp.bfloat16)

    def loss(patches, cls):
        out, cls_out = tpu_spatial.attention(patches, cls, 12, frames=frames, sequences=sequences)
        return out.astype(jnp.float32).sum() + cls_out.astype(jnp.float32).sum()

    text = lowered(jax.grad(loss, argnums=(0, 1)), patches, cls)
    assert text.count("custom_call @tpu_custom_call") == 2
    for line in text.splitlines():
        if re.search("stablehlo.(transpose|pad|concatenate|slice)", line):
            assert "x196x" not in line
