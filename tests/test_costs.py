"""The analytic costs against the model itself, its traced program, and the published figures."""

import math

import jax
import jax.numpy as jnp
import pytest

import timesformer_jax as tsf
from timesformer_jax.models import costs
from timesformer_jax.models.ops.reference import use_references
from timesformer_jax.models.schemes import SCHEMES, SPATIAL, TIME, Scheme
from timesformer_jax.models.timesformer import abstract, parameters, with_parameters


def products(jaxpr) -> int:
    """Multiply-accumulates of the matrix products and convolutions of a traced program.

    Goes into every program inside it (jit, vmap, remat, custom gradients), and counts a scan's
    body once for each turn.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            over = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += math.prod(eqn.outvars[0].aval.shape) * over
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // outputs
        inside = [products(program) for program in programs(eqn.params)]
        one_runs = eqn.params.get("branches_platforms")  # that of the device
        inner = max(inside) if one_runs else sum(inside)
        known = one_runs or name not in ("while", "cond")
        assert known or not inner, f"how often {name} runs is not known"
        total += inner * (eqn.params["length"] if name == "scan" else 1)
    return total


def programs(params: dict):
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item


def equations(jaxpr):
    """Those of a traced program and of every program inside it."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for inner in programs(equation.params):
            yield from equations(inner)


def traced_macs(config, frames=None, height=None, width=None, batch=1) -> int:
    shape = (
        batch, frames or config.num_frames, height or config.image_size,
        width or config.image_size, 3,
    )  # fmt: skip
    video = jax.ShapeDtypeStruct(shape, jnp.float32)
    with use_references(True):  # which fuse no products
        return products(
            jax.make_jaxpr(lambda params, video: with_parameters(config, params)(video))(
                parameters(abstract(config)), video
            )
        )


def test_the_counter_counts_scans_vmaps_remat_convolutions_and_custom_gradients():
    a, b = jnp.ones((2, 3)), jnp.ones((3, 5))

    @jax.custom_vjp
    def custom(x, y):
        return x @ y

    custom.defvjp(lambda x, y: (x @ y, None), lambda _, g: (g, g))

    def scanned(x):
        return jax.lax.scan(lambda c, _: (c @ jnp.ones((3, 3)), None), x, length=7)[0]

    def convolved(x):
        return jax.lax.conv(x, jnp.ones((4, 3, 2, 2)), (2, 2), "VALID")

    for function, args, expected in [
        (jnp.dot, (a, b), 30),
        (jax.jit(jax.checkpoint(jnp.dot)), (a, b), 30),
        (custom, (a, b), 30),
        (jax.vmap(jnp.dot, in_axes=(0, None)), (jnp.ones((6, 2, 3)), b), 180),
        (scanned, (a,), 7 * 2 * 3 * 3),
        (convolved, (jnp.ones((1, 3, 8, 8)),), 4 * 4 * 4 * 3 * 2 * 2),
    ]:
        assert products(jax.make_jaxpr(function)(*args)) == expected


SMALL = {
    "num_classes": 7, "image_size": 28, "num_frames": 5, "patch_size": 4, "hidden_size": 12,
    "depth": 2, "num_heads": 3, "mlp_ratio": 3,
}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "clip", [(None, None, None), (1, 4, 4), (1, 12, 20), (3, 8, 4), (4, 24, 16)], ids=str
)
def test_macs_are_the_products_of_the_traced_program(scheme, clip):
    config = tsf.TimeSformerConfig(attention=scheme, **SMALL)
    assert costs.macs(config, *clip) == traced_macs(config, *clip)


def test_costs_of_blocks_that_differ_and_of_a_narrow_attention(monkeypatch):
    narrow = TIME._replace(has_temporal_fc=True, width=1 / 3, every=2)
    monkeypatch.setitem(SCHEMES, "uneven", Scheme((narrow, SPATIAL)))
    config = tsf.TimeSformerConfig(attention="uneven", **SMALL | {"depth": 3})
    assert costs.macs(config) == traced_macs(config)
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(parameters(abstract(config)))]
    assert costs.parameter_count(config) == sum(sizes)
    assert costs.comparisons(config) == pytest.approx((49 + 1) + 2 / 3 * (5 + 1))


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("timesformer_base", {}),
        ("timesformer_hr", {"depth": 1}),
        ("timesformer_l", {"depth": 1, "remat": "block"}),
        ("timesformer_p32", {"depth": 1, "attention": "local_global"}),
        ("timesformer_base", {"depth": 1, "attention": "local_global"}),
        ("timesformer_base", {"depth": 1, "attention": "axial"}),
        ("timesformer_base", {"depth": 1, "attention": "joint"}),
    ],
)
def test_macs_at_full_size_are_the_products_of_the_traced_program(preset, overrides):
    config = tsf.preset(preset, **overrides)
    assert 3 * costs.macs(config) == traced_macs(config, batch=3)


@pytest.mark.parametrize("position_embedding", ["none", "space", "space_time"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_parameter_count_is_the_models(scheme, position_embedding):
    config = tsf.TimeSformerConfig(attention=scheme, position_embedding=position_embedding, **SMALL)
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(parameters(abstract(config)))]
    assert costs.parameter_count(config) == sum(sizes)


@pytest.mark.parametrize(
    ("preset", "scheme", "classes", "parameters", "gmacs"),
    [
        ("timesformer_base", "divided", 400, 121_566_352, "195.83"),
        ("timesformer_hr", "divided", 400, 122_024_080, "1702.69"),
        ("timesformer_l", "divided", 400, 121_633_936, "2379.86"),
        ("timesformer_base", "joint", 400, 86_112_400, "179.56"),
        ("timesformer_base", "space", 400, 86_106_256, "140.50"),
        ("timesformer_base", "divided", 174, 121_392_558, None),
        ("timesformer_base", "local_global", 174, 121_392_558, None),
        ("timesformer_base", "axial", 174, 156_846_510, None),
        ("timesformer_base", "axial", 400, 157_020_304, None),
    ],
)
def test_published_figures(preset, scheme, classes, parameters, gmacs):
    config = tsf.preset(preset, attention=scheme, num_classes=classes)
    assert costs.parameter_count(config) == parameters
    if gmacs:
        assert f"{costs.macs(config) / 1e9:.2f}" == gmacs


def test_the_papers_tflops_are_macs_over_three_crops():
    for preset, tflops in {"base": "0.59", "hr": "5.11", "l": "7.14"}.items():
        assert f"{3 * costs.macs(tsf.preset(f'timesformer_{preset}')) / 1e12:.2f}" == tflops


@pytest.mark.parametrize(("f", "h", "w"), [(8, 14, 14), (16, 28, 28), (2, 4, 6), (96, 2, 8)])
def test_comparisons_a_patch(f, h, w):
    n = h * w
    expected = {
        "joint": n * f + 1,
        "divided": n + f + 2,
        "space_then_time": n + f + 2,
        "parallel": n + f + 2,
        "space": n + 1,
        "time": f + 1,
        "axial": f + w + h + 3,
        "local_global": (f * (h // 2) * (w // 2) + 1) + ((f // 2) * (h // 2) * (w // 2) + 1),
    }
    for scheme in SCHEMES:
        config = tsf.TimeSformerConfig(attention=scheme)
        assert costs.comparisons(config, f, 16 * h, 16 * w) == expected[scheme]


def test_comparisons_where_halves_differ_are_the_mean():
    # One row of three patches, one frame. Local: [0 1] and [2]; stride 2: [0 2] and [1].
    config = tsf.TimeSformerConfig(attention="local_global")
    assert costs.comparisons(config, 1, 16, 48) == pytest.approx((2 + 2 + 1) / 3 * 2 + 2)


@pytest.mark.parametrize("scheme", ["divided", "local_global", "axial", "time"])
def test_attention_products_grow_as_comparisons_do(scheme):
    def of_attention(frames):
        # What is left at two widths is linear in the width only in the attention products.
        config = tsf.TimeSformerConfig(attention=scheme, depth=1, patch_size=16)
        patches, layers = frames * 196, config.scheme.layers
        copies = [
            layer.joins_cls * (layer.partition(frames, (14, 14)).max() + 1) for layer in layers
        ]
        d = config.hidden_size
        linear = patches * 3 * 16 * 16 * d + (patches + 1) * 8 * d * d + d * 400
        linear += sum((patches + c) * 4 * d * d for c in copies)
        linear += sum((patches + c) * d * d for c in copies[:-1])
        return costs.macs(config, frames) - linear

    config = tsf.TimeSformerConfig(attention=scheme)
    for frames in (8, 32, 96):
        patches = frames * 196
        share = of_attention(frames) / (2 * 768 * patches * costs.comparisons(config, frames))
        assert 0.98 < share < 1.15  # the rest are the tokens' own comparisons


def test_a_clip_that_no_patches_fill_is_refused():
    with pytest.raises(tsf.InputError, match="225 x 224 pixels cannot be cut into patches of 16"):
        costs.macs(tsf.TimeSformerConfig(), height=225)
