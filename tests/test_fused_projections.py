"""A projection fused with temporal_fc gives what the two layers give, by fewer products."""

import math

import jax
import numpy as np
import pytest
from test_costs import products
from test_model import assert_near, config_of, random_parameters, random_video

from timesformer_jax.models.ops.reference import use_references
from timesformer_jax.models.schemes import SCHEMES
from timesformer_jax.models.timesformer import with_parameters

pytestmark = pytest.mark.compiles


def run(config, key, references):
    """Logits and features of a model with random parameters."""

    def forward(params, video):
        model = with_parameters(config, params)
        return model(video, key=key), model.features(video)

    with use_references(references):
        return jax.jit(forward)(random_parameters(config), random_video())


@pytest.mark.parametrize(
    ("scheme", "scan_layers"), [*((scheme, False) for scheme in SCHEMES), ("divided", True)]
)
def test_the_model_gives_the_same_logits_and_features_as_its_references(scheme, scan_layers):
    config = config_of(scheme, scan_layers=scan_layers, drop_path=0.5)
    for key in (None, jax.random.key(0)):
        for a, b in zip(run(config, key, False), run(config, key, True)):
            assert_near(a, b, 1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gradient_of_every_parameter_is_that_of_the_references(scheme):
    config, video = config_of(scheme, drop_path=0.5), random_video()

    def gradient(references):
        def loss(params):
            return with_parameters(config, params)(video, key=jax.random.key(0)).sum()

        with use_references(references):
            return jax.jit(jax.grad(loss))(random_parameters(config))

    jax.tree.map(lambda a, b: assert_near(a, b, 1e-5), gradient(False), gradient(True))


@pytest.mark.parametrize(("scheme", "temporal_fcs"), [("divided", 1), ("axial", 2)])
def test_every_temporal_fc_saves_its_products(scheme, temporal_fcs):
    config = config_of(scheme, depth=1)
    model, video = with_parameters(config, random_parameters(config)), random_video()

    def macs(references):
        with use_references(references):
            return products(jax.make_jaxpr(model)(video))

    tokens = video.size // (3 * config.patch_size**2)
    # In axial attention each row's token goes through a temporal_fc too.
    rows = math.prod(video.shape[:3]) // config.patch_size * (scheme == "axial")
    d = config.hidden_size
    fusing = temporal_fcs * (d**3 + d**2)  # the kernel and the bias
    assert macs(True) - macs(False) == (temporal_fcs * tokens + rows) * d**2 - fusing


def test_fewer_tokens_than_channels_are_multiplied_one_layer_after_the_other():
    config = config_of("divided", depth=1, hidden_size=64)
    model, video = with_parameters(config, random_parameters(config)), random_video(2, (1, 1), 1)

    def macs(references):
        with use_references(references):
            return products(jax.make_jaxpr(model)(video))

    assert macs(False) == macs(True)
    with use_references(True):
        expected = jax.jit(lambda video: model(video))(video)
    found = jax.jit(lambda video: model(video))(video)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
