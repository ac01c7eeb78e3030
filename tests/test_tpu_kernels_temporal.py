"""Temporal attention for TPUs, interpreted on the host against float64, and lowered for a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("cls", [False, True], ids=["patches", "cls"])
@pytest.mark.parametrize(
    "shape",
    [(1, 8, 20, 2, 64), (2, 1, 1, 1, 64), (1, 5, 11, 4, 32), (1, 16, 9, 1, 128), (1, 29, 3, 2, 64)],
    ids=str,
)
def test_values_and_gradients(shape, cls, dtype):
    check(shape, dtype, cls)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sequences_with_products_of_their_own(dtype):
    check((1, 33, 3, 2, 64), dtype, True)


@pytest.mark.parametrize(
    ("frames", "cls"), [(130, False), (128, True), (128, False)], ids=["blocks", "cls", "whole"]
)
def test_a_running_softmax_over_blocks_of_keys(frames, cls, monkeypatch):
    monkeypatch.setattr(tpu_temporal, "LARGEST", 0)
    check((1, frames, 3, 2, 64), "bfloat16", cls)
