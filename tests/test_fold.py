"""The folded model gives what the model gives, by fewer products."""

import math

import jax
import numpy as np
import pytest
from test_costs import products
from test_model import assert_near, config_of, random_parameters, random_video

from timesformer_jax.models.attention import SCHEMES
from timesformer_jax.models.ops.fold import folded
from timesformer_jax.models.timesformer import parameters, with_parameters


def run(model, video, key=None):
    forward = jax.jit(lambda v, k: (model(v, key=k), model.features(v)))
    return forward(video, key)


@pytest.mark.parametrize(
    ("scheme", "scan_layers"), [*((scheme, False) for scheme in SCHEMES), ("divided", True)]
)
def test_the_folded_model_gives_the_same_logits_and_features(scheme, scan_layers):
    config = config_of(scheme, scan_layers=scan_layers, drop_path=0.5)
    params, video = random_parameters(config), random_video()
    model = with_parameters(config, params)
    for key in (None, jax.random.key(0)):
        for a, b in zip(run(model, video, key), run(folded(model), video, key)):
            assert_near(b, a, 1e-5)
    # What was folded is as it was.
    jax.tree.map(np.testing.assert_array_equal, parameters(model), random_parameters(config))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gradient_of_every_parameter_is_the_models(scheme):
    config, video = config_of(scheme, drop_path=0.5), random_video()

    def gradient(fold):
        def loss(params):
            return fold(with_parameters(config, params))(video, key=jax.random.key(0)).sum()

        return jax.jit(jax.grad(loss))(random_parameters(config))

    jax.tree.map(
        lambda a, b: assert_near(b, a, 1e-5), gradient(lambda model: model), gradient(folded)
    )


@pytest.mark.parametrize(("scheme", "further"), [("divided", 1), ("axial", 2)])
def test_every_further_layer_saves_its_products(scheme, further):
    config = config_of(scheme, depth=1)
    model, video = with_parameters(config, random_parameters(config)), random_video()

    def macs(model):
        return products(jax.make_jaxpr(model)(video))

    tokens = video.size // (3 * config.patch_size**2)
    # In axial attention each row's token goes through a further layer too.
    rows = math.prod(video.shape[:3]) // config.patch_size * (scheme == "axial")
    saved = macs(model) - macs(folded(model))
    assert saved == (further * tokens + rows) * config.hidden_size**2
