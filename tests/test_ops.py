"""Every operation of models/ops: its fast form against its plain reference, and against PyTorch."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from test_costs import equations
from test_model import assert_near, config_of, random_parameters, random_video

from timesformer_jax.models.embedding import patch_embedding
from timesformer_jax.models.ops.dot_product_attention import dot_product_attention
from timesformer_jax.models.ops.layer_norm import layer_norm
from timesformer_jax.models.ops.linear import gelu, linear
from timesformer_jax.models.ops.reference import use_references
from timesformer_jax.models.timesformer import with_parameters


def random(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


# An operation, and arguments of it: those computed in the dtype of the model, and float32 ones.
OPERATIONS = {
    "gelu": (gelu, (4 * random(7, 33),), ()),
    "layer_norm": (layer_norm, (random(3, 5, 32),), (random(32), random(1, 32)[0])),
    "linear": (
        lambda x, kernel, bias: linear(x, kernel, bias, "proj/kernel"),
        ((random(3, 5, 16), random(3, 16)),), (random(16, 24), random(24)),
    ),
    "linear to several axes": (
        lambda x, kernel, bias: linear(x, kernel, bias, "qkv/kernel"),
        (random(3, 5, 16),), (random(16, 3, 8), random(3, 8)),
    ),
    "patch embedding": (
        lambda video, kernel, bias: patch_embedding(video, kernel, bias, 4, "patch/kernel"),
        (random(2, 3, 8, 12, 3),), (random(48, 13), random(13)),
    ),
    **{
        f"attention of {length} tokens": (
            dot_product_attention, tuple(random(length, 2, 16 + i)[..., :16] for i in range(3)), (),
        )
        for length in (1, 8, 64, 65)
    },
}  # fmt: skip


@contextlib.contextmanager
def traced_for(platform):
    """Operations take the form that they have in a program for a device of another platform."""
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "platform"),
    [(name, "cpu") for name in OPERATIONS]
    + [(name, "tpu") for name in ("linear", "linear to several axes", "patch embedding")],
)
def test_values_and_gradients_are_those_of_the_reference(name, platform, dtype):
    operation, inputs, parameters = OPERATIONS[name]
    arguments = *jax.tree.map(lambda x: x.astype(dtype), inputs), *parameters

    def run(arguments, references):
        def both(arguments):
            out, vjp = jax.vjp(operation, *arguments)
            direction = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), out)
            return out, vjp(jax.tree.map(lambda d, x: d.astype(x.dtype), direction, out))

        with use_references(references), traced_for(platform):
            return jax.jit(both)(arguments)

    found, expected = run(arguments, False), run(arguments, True)
    # Of bfloat16 numbers both are rounded, in other places: the reference of the same numbers in
    # float32 is what both are near.
    exact = run(jax.tree.map(lambda x: x.astype(jnp.float32), arguments), True)
    tolerance = 3e-6 if dtype == "float32" else 0.02
    for a, b, c in zip(*map(jax.tree.leaves, (found, expected, exact)), strict=True):
        assert a.dtype == b.dtype
        assert_near(np.float32(a), np.float32(c), tolerance)
        assert_near(np.float32(b), np.float32(c), tolerance)


@pytest.mark.compiles
def test_references_have_forward_mode_derivatives():
    config = config_of("divided", depth=1)
    params, video = jax.tree.map(jnp.asarray, random_parameters(config)), random_video()

    def logits(video):
        return with_parameters(config, params)(video)

    direction = random_video(seed=3)
    with use_references(True):
        value, slope = jax.jit(lambda v, d: jax.jvp(logits, (v,), (d,)))(video, direction)
        g = np.random.default_rng(0).standard_normal(value.shape).astype(np.float32)

        @jax.jit
        def backward(video, g):
            out, vjp = jax.vjp(logits, video)
            return out, vjp(g)[0]

        expected, gradient = backward(video, g)
    assert_near(value, expected, 1e-5)
    # The same number from both modes: <g, J d> = <J^T g, d>.
    assert_near((g * slope).sum(), (gradient * direction).sum(), 1e-4)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(logits, (video,), (direction,))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_and_its_gradient_are_pytorchs_in_float64(dtype):
    x = jnp.linspace(-9, 9, 1001).astype(dtype)
    value, vjp = jax.vjp(gelu, x)
    (slope,) = vjp(jnp.full_like(x, 3))
    there = torch.tensor(np.float64(x), requires_grad=True)
    expected = F.gelu(there)
    expected.backward(torch.full_like(expected, 3))
    assert value.dtype == slope.dtype == x.dtype
    # float32 leaves 1 + erf no digits far below zero, where the value is next to nothing.
    bounds = {"rtol": 2e-6, "atol": 2e-6} if dtype == "float32" else {"rtol": 2**-8, "atol": 1e-6}
    np.testing.assert_allclose(np.float64(value), expected.detach(), **bounds)
    np.testing.assert_allclose(np.float64(slope), there.grad, **bounds)


def test_the_gradient_of_a_norm_is_given_its_statistics_opaque():
    x, scale = jnp.ones((3, 8)), jnp.ones(8)
    gradient = jax.make_jaxpr(jax.grad(lambda x: layer_norm(x, scale, scale).sum()))(x)
    names = [eqn.primitive.name for eqn in equations(gradient)]
    assert names.count("optimization_barrier") == 1
