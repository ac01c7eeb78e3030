"""Temporal attention for TPUs, interpreted on the host against float64, and lowered for a TPU."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from timesformer_jax.models.ops.kernels import tpu_temporal

pytestmark = pytest.mark.compiles

# Of the largest value. bfloat16 keeps 8 bits: the weights and the result are each rounded once.
TOLERANCE = {"bfloat16": 2**-7, "float32": 2**-18}


# The kernels' loops are unrolled: XLA would take most of the time to make them fast on the host.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def random(shape, dtype, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1.5, shape), dtype)


def reference(qkv, g, heads):
    """Attention along axis 1 of (B, T, N, 3 h d), and the gradient of sum(g * attention)."""
    b, t, n, width = qkv.shape
    d = width // 3 // heads
    q, k, v = np.asarray(qkv, np.float64).reshape(b, t, n, 3, heads, d).transpose(3, 0, 2, 4, 1, 5)
    do = np.asarray(g, np.float64).reshape(b, t, n, heads, d).transpose(0, 2, 3, 1, 4)
    logits = q @ k.swapaxes(-1, -2) / np.sqrt(d)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    weights_bar = do @ v.swapaxes(-1, -2)
    along = (weights * weights_bar).sum(-1, keepdims=True)
    logits_bar = weights * (weights_bar - along) / np.sqrt(d)
    bars = (logits_bar @ k, logits_bar.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ do)
    out = (weights @ v).transpose(0, 3, 1, 2, 4).reshape(b, t, n, -1)
    return out, np.stack(bars).transpose(1, 4, 2, 0, 3, 5).reshape(b, t, n, -1)


def close(found, expected, dtype):
    error = np.abs(np.asarray(found, np.float64) - expected).max()
    return error < TOLERANCE[dtype] * max(np.abs(expected).max(), 1e-3)  # False for NaN


def check(shape, dtype, cls, interpret=True):
    """Values and gradients of (B, T, N, h, d), of the interpreted kernels against float64."""
    b, t, n, h, d = shape
    qkv, g = random((b, t, n, 3 * h * d), dtype, 0), random((b, t, n, h * d), dtype, 1)
    token, g_token = random((b, n, 3 * h * d), dtype, 2), random((b, n, h * d), dtype, 3)
    assert tpu_temporal.unsupported((b, t, n, 3, h, d), dtype, cls) is None
    attend = functools.partial(tpu_temporal.attention, heads=h, interpret=interpret)

    def both(qkv, token, g, g_token):
        (out, out_token), vjp = jax.vjp(attend, qkv, token)
        return (out, out_token), vjp((g, g_token))

    arguments = (qkv, token, g, g_token) if cls else (qkv, None, g, None)
    found, gradients = jax.jit(both, compiler_options=QUICKLY)(*arguments)
    assert cls or found[1] is None

    def together(pair):
        pair = [np.asarray(x, np.float64) for x in pair if x is not None]
        return np.concatenate([pair[0], pair[1][:, None]], 1) if cls else pair[0]

    expected, of_inputs = reference(together((qkv, token)), together((g, g_token)), h)
    assert {x.dtype for x in (*found, *gradients) if x is not None} == {jnp.dtype(dtype)}
    assert close(together(found), expected, dtype)
    assert close(together(gradients), of_inputs, dtype)


@pytest.fixture(autouse=True)
def _short_programs(monkeypatch):
    """Loops where the kernels overlap positions: the programs are interpreted, and compiled."""
    monkeypatch.setattr(tpu_temporal, "SINGLE", 1)
    monkeypatch.setattr(tpu_temporal, "RUNNING", 1)


# Groups of 16, 8 and 128 positions; heads of half a lane row, a quarter and a whole one.
SHARING = [
    (2, 8, 20, 2, 64), (2, 1, 1, 1, 64), (1, 5, 11, 4, 32), (1, 16, 9, 1, 128), (1, 18, 3, 3, 32),
]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "cls", "dtype"),
    # Every pair of a shape, a dtype, and with or without the class token.
    [
        (shape, (i + j) % 2 == 0, dtype)
        for i, shape in enumerate(SHARING)
        for j, dtype in enumerate(("bfloat16", "float32"))
    ],
    ids=str,
)
def test_sequences_that_share_a_product(shape, cls, dtype):
    check(shape, dtype, cls)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("shape", "cls"), [((1, 33, 3, 2, 64), True), ((1, 48, 17, 1, 96), False)], ids=str
)
def test_sequences_with_products_of_their_own(shape, cls, dtype):
    check(shape, dtype, cls)


def test_positions_overlap(monkeypatch):
    monkeypatch.setattr(tpu_temporal, "SINGLE", 32)
    check((1, 32, 3, 1, 128), "float32", True)


@pytest.mark.parametrize(
    ("frames", "cls", "dtype"),
    # A last block of two frames, of the class token, and of nothing else but frames.
    [(258, False, "bfloat16"), (128, True, "bfloat16"), (128, False, "bfloat16"),
     (113, True, "float32")],
)  # fmt: skip
def test_a_running_softmax_over_blocks_of_keys(frames, cls, dtype, monkeypatch):
    monkeypatch.setattr(tpu_temporal, "LARGEST", 0)
    heads = 2 if dtype == "float32" else 1
    check((1, frames, 3, heads, 128 // heads), dtype, cls)


@pytest.mark.parametrize("frames", [3, 33])
def test_undefined_rows_after_the_last_position_change_nothing(frames):
    """The simulator of a TPU's memory has NaN there, and where nothing was written."""
    memory = pltpu.InterpretParams(out_of_bounds_reads="uninitialized", uninitialized_memory="nan")
    check((1, frames, 5, 1, 32), "bfloat16", frames == 3, memory)


@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(
    st.integers(1, 2), st.integers(1, 19), st.integers(1, 40), st.integers(1, 3),
    st.sampled_from([8, 16, 24, 32, 64, 96, 128]), st.sampled_from(["bfloat16", "float32"]),
    st.booleans(),
)  # fmt: skip
def test_any_shape(b, t, n, h, d, dtype, cls):
    check((b, t, n, h, d), dtype, cls)


def test_large_logits_and_sequences_of_very_different_size():
    """Positions of a group have nothing in common, not even the largest logit."""
    qkv = random((1, 8, 16, 3 * 64), "float32", 0)
    qkv = qkv.at[:, :, ::2].mul(40).at[:, :, 1::2].mul(0.01)
    out, _ = tpu_temporal.attention(qkv, None, heads=1, interpret=True)
    expected, _ = reference(qkv, np.zeros((1, 8, 16, 64)), 1)
    assert np.allclose(out, expected, rtol=1e-4, atol=1e-5)


# A chip that is not there.
V5E = AbstractMesh(
    (1,), ("x",), (AxisType.Auto,),
    abstract_device=AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu"),
)  # fmt: skip


@pytest.mark.parametrize("frames", [8, 96, 1000])
def test_the_kernels_lower_for_a_tpu_and_read_the_projection_without_a_copy(frames):
    def both(qkv, token, g):
        out, vjp = jax.vjp(functools.partial(tpu_temporal.attention, heads=12), qkv, token)
        return out, vjp(g)

    shapes = ((1, frames, 196, 2304), (1, 196, 2304))
    results = ((1, frames, 196, 768), (1, 196, 768))
    *qkv, g, g_token = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in (*shapes, *results))
    with jax.sharding.use_abstract_mesh(V5E):
        traced = jax.jit(both).trace(*qkv, (g, g_token))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 2
    for copy in ("transpose", "concatenate", "slice", "pad"):
        assert f"stablehlo.{copy}" not in text


def test_what_is_not_supported_has_a_reason():
    assert "float16" in tpu_temporal.unsupported((1, 8, 4, 3, 2, 64), "float16")
    assert "12 channels" in tpu_temporal.unsupported((1, 8, 4, 3, 2, 12), "bfloat16")
    assert "256 channels" in tpu_temporal.unsupported((1, 8, 4, 3, 2, 256), "bfloat16")
    assert "multiples of 128" in tpu_temporal.unsupported((1, 9000, 4, 3, 3, 32), "bfloat16")
    assert "up to 384" in tpu_temporal.unsupported((1, 9000, 4, 3, 16, 72), "bfloat16")
    assert tpu_temporal.unsupported((1, 9000, 4, 3, 4, 32), "bfloat16", cls=True) is None
