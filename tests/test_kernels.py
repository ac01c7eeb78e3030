"""Device kernels where there is no device: interpreted on the host, and lowered for CUDA."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from timesformer_jax.models.ops.kernels import cudnn, hopper
from timesformer_jax.models.ops.kernels.registry import KERNELS
from timesformer_jax.models.tokens import Tokens

pytestmark = pytest.mark.compiles

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
def test_the_kernel_lowers_for_cuda_and_reads_the_projection_without_a_copy(frames):
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
    kernel = functools.partial(KERNELS[kind]["cudnn"].attention, grid=(1, 5))
    out, vjp = jax.vjp(lambda qkv: kernel(Tokens(None, qkv)).patches, qkv)
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
