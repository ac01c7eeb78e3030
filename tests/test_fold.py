"""The folded model gives what the model gives, by fewer products."""

import jax
import numpy as np
import pytest
from test_attention import QUICK
from test_model import assert_near, config_of, random_parameters, random_video

from timesformer_jax.models.attention import SCHEMES
from timesformer_jax.models.fold import folded
from timesformer_jax.models.timesformer import parameters, with_parameters


def run(model, video, key=None):
    forward = jax.jit(lambda v, k: (model(v, key=k), model.features(v)), compiler_options=QUICK)
    return forward(video, key)


@pytest.mark.parametrize(
    ("scheme", "scan_layers"), [*((scheme, False) for scheme in SCHEMES), ("divided", True)]
)
def test_the_folded_model_gives_the_same_logits_and_features(scheme, scan_layers):
    config = config_of(scheme, scan_layers=scan_layers, drop_path=0.5)
    params, video = random_parameters(config), random_video()
    model = with_parameters(config, params)
    inference = folded(model)
    # In training it would be another model: a key drops nothing of this one.
    found = run(inference, video, jax.random.key(0))
    for a, b in zip(run(model, video), found):
        assert_near(b, a, 1e-5)
    # What was folded is as it was.
    jax.tree.map(np.testing.assert_array_equal, parameters(model), random_parameters(config))


@pytest.mark.parametrize(("scheme", "further"), [("divided", 1), ("axial", 2)])
def test_every_further_layer_saves_its_products(scheme, further):
    config = config_of(scheme, depth=1)
    model, video = with_parameters(config, random_parameters(config)), random_video()

    def flops(model):
        return jax.jit(model).lower(video).compile().cost_analysis()["flops"]

    tokens = video.size // (3 * config.patch_size**2)
    product = 2 * tokens * config.hidden_size**2
    # A bias goes with each product, and in axial attention a product for each sequence's token.
    assert further * product < flops(model) - flops(folded(model)) < 1.5 * further * product
