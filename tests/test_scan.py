"""Layers scanned or unrolled, with each of the remats: the same numbers, other programs."""

import contextlib
import functools
import io
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_costs import products
from test_model import assert_near, config_of, random_parameters, random_video

from timesformer_jax.models.remat import REMATS
from timesformer_jax.models.timesformer import abstract, parameters, with_parameters

pytestmark = pytest.mark.compiles

BYTES = {"f32": 4, "bf16": 2, "i32": 4, "bool": 1}


def loss(params, video, config):
    logits = with_parameters(config, params)(video, key=jax.random.key(0))
    return (logits * jnp.arange(config.num_classes)).sum()


@functools.cache
def value_and_gradient(scheme, **fields):
    config = config_of(scheme, **{"drop_path": 0.5} | fields)
    run = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    return run(random_parameters(config), random_video(), config)


# "block" unrolled is in test_model.
@pytest.mark.parametrize(
    ("scheme", "scan_layers", "remat"),
    [
        ("divided", True, "none"),
        ("space", False, "outputs"),
        ("space", False, "offload"),
        ("space", True, "offload"),
    ],
)
def test_scans_and_remats_change_no_number(scheme, scan_layers, remat):
    value, gradient = value_and_gradient(scheme, scan_layers=scan_layers, remat=remat)
    expected, expected_gradient = value_and_gradient(scheme)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: assert_near(a, b, 1e-4), gradient, expected_gradient)


def test_drop_path_changes_the_loss_that_is_compared():
    config = config_of("space", drop_path=0.0)
    run = jax.jit(loss, static_argnums=2)
    without = run(random_parameters(config), random_video(), config)
    assert abs(value_and_gradient("space")[0] - without) > 1e-3


def test_parameters_are_by_layer_either_way():
    shapes = [parameters(abstract(config_of("divided", scan_layers=s))) for s in (False, True)]
    assert shapes[0] == shapes[1]
    assert set(shapes[0]["blocks"]) == {"0", "1"}


def program(**fields):
    """A traced gradient; its text and its multiply-accumulates."""
    config = config_of("divided", **fields)
    gradient = functools.partial(jax.grad(loss), config=config)
    return jax.jit(gradient).trace(parameters(abstract(config)), random_video())


def test_a_scanned_program_does_not_grow_with_depth():
    def dots(**fields):
        return program(**fields).lower().as_text().count("dot_general")

    assert dots(depth=4, scan_layers=True) == dots(depth=2, scan_layers=True)
    assert dots(depth=4) > 1.8 * dots(depth=2)


def kept(config) -> tuple[int, int]:
    """Bytes that the forward pass leaves for the backward pass, on the device and on the host.

    Parameters and what is stacked of them are not counted, nor are constants.
    """
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        jax.ad_checkpoint.print_saved_residuals(
            functools.partial(loss, config=config), parameters(abstract(config)), random_video()
        )
    total = {"": 0, "<host>": 0}
    for line in written.getvalue().splitlines():
        found = re.match(r"(\w+)(<host>|)\[([\d,]*)\] (.*)", line)
        if found and not re.search("argument|constant|output of stack", found[4]):
            sizes = [int(size) for size in found[3].split(",") if size]
            total[found[2]] += math.prod(sizes) * BYTES[found[1]]
    return total[""], total["<host>"]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_remats_keep_less_and_less_on_the_device(scan_layers):
    fields = {"depth": 2, "scan_layers": scan_layers, "dtype": "bfloat16"}
    configs = {remat: config_of("divided", remat=remat, **fields) for remat in REMATS}
    found = {remat: kept(config) for remat, config in configs.items()}
    on_device = [found[remat][0] for remat in ("none", "outputs", "block", "offload")]
    assert on_device == sorted(on_device, reverse=True)
    assert on_device[0] > 1.5 * on_device[1] > 3 * on_device[2]
    # Each block's input: patches (2, 5, 12, 8) and the token (2, 8), in bfloat16.
    inputs = 2 * (2 * 5 * 12 * 8 + 2 * 8) * 2
    assert found["offload"][1] == inputs
    assert on_device[2] - on_device[3] == inputs
    assert all(found[remat][1] == 0 for remat in ("none", "outputs", "block"))


def test_remats_compute_again_what_they_do_not_keep():
    macs = {remat: products(program(remat=remat, scan_layers=True).jaxpr) for remat in REMATS}
    assert macs["none"] < macs["outputs"] < macs["block"] == macs["offload"]
    # Of linear layers nothing is computed again with their outputs kept, attention weights only.
    assert macs["outputs"] - macs["none"] < 0.2 * (macs["block"] - macs["none"])
