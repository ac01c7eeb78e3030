"""Optimizers against PyTorch's, schedules against the recipe's words."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from timesformer_jax import recipes
from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformerConfig, abstract, parameters
from timesformer_jax.training.optimizer import learning_rate, make_optimizer


@pytest.mark.parametrize("clip_norm", [0.0, 8.0])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_ten_steps_are_pytorchs(name, clip_norm):
    config = recipes.recipe().optimizer
    config.name, config.clip_norm = name, clip_norm
    rng = np.random.default_rng(0)
    weights, targets = rng.normal(size=(2, 5)).astype(np.float32)
    ours = jnp.asarray(weights)
    theirs = torch.nn.Parameter(torch.tensor(weights))
    if name == "sgd":
        rival = torch.optim.SGD([theirs], 0.05, 0.9, weight_decay=1e-4, nesterov=True)
    else:
        rival = torch.optim.AdamW([theirs], 0.05, weight_decay=1e-4)
    optimizer = make_optimizer(config, optax.constant_schedule(0.05))
    state, norms = optimizer.init(ours), []
    for _ in range(10):
        rival.zero_grad()
        ((theirs - torch.tensor(targets)) ** 4).sum().backward()
        norms.append(torch.nn.utils.clip_grad_norm_([theirs], clip_norm or np.inf))
        rival.step()
        updates, state = optimizer.update(4 * (ours - targets) ** 3, state, ours)
        ours = optax.apply_updates(ours, updates)
    assert min(norms) < 8 < max(norms)  # both are met
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5)


def model_parameters():
    config = TimeSformerConfig(
        num_classes=3, image_size=8, patch_size=4, hidden_size=4, depth=3, num_heads=1
    )
    shapes = parameters(abstract(config))
    return jax.tree.map(lambda x: np.full(x.shape, 2, np.float32), shapes)


def test_rates_fall_from_the_head_down():
    """By the rule that BEiT and MAE give, written out for three blocks; weight decay with them."""
    config = recipes.recipe().optimizer
    config.update(name="adamw", weight_decay=0.1, layer_decay=0.5)
    params = model_parameters()
    optimizer = make_optimizer(config, optax.constant_schedule(0.01))
    updates, _ = optimizer.update(
        jax.tree.map(np.zeros_like, params), optimizer.init(params), params
    )
    factors = {"embedding": 1 / 16, "0": 1 / 8, "1": 1 / 4, "2": 1 / 2, "norm": 1, "head": 1}
    parts = {**updates.pop("blocks"), **updates}
    assert set(parts) == set(factors)
    for name, part in parts.items():
        for update in jax.tree.leaves(part):
            np.testing.assert_allclose(update, -0.01 * 0.1 * 2 * factors[name], rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_frozen_parameters_have_no_optimizer_state(name):
    config = recipes.recipe().optimizer
    config.update(name=name, trainable="head", layer_decay=0.5, clip_norm=1.0)
    params = model_parameters()
    optimizer = make_optimizer(config, optax.constant_schedule(0.01))
    state = optimizer.init(params)
    arrays = [x for x in jax.tree.leaves(state) if x.ndim]
    moments = {"sgd": 1, "adamw": 2}[name]
    assert sum(x.size for x in arrays) == moments * (4 * 3 + 3)
    head = {"head": params["head"]}
    updates, again = optimizer.update(head, state, params)
    assert set(updates) == {"head"}
    assert all(np.all(x < 0) for x in jax.tree.leaves(updates))
    assert jax.tree.structure(again) == jax.tree.structure(state)


def test_a_run_can_go_on_with_clipping_or_another_layer_decay():
    """The state has the same form, which a checkpoint is read by."""
    params, forms = model_parameters(), set()
    for changes in ({}, {"clip_norm": 1.0}, {"layer_decay": 0.9}):
        config = recipes.recipe().optimizer
        config.update(changes)
        state = make_optimizer(config, optax.constant_schedule(0.01)).init(params)
        forms.add(tuple(jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(state)))
    assert len(forms) == 1


def test_the_papers_steps():
    schedule = learning_rate(recipes.kinetics400().optimizer, 64, steps_per_epoch=100)
    rates = [float(schedule(step)) for step in (0, 1099, 1100, 1399, 1400, 1499)]
    np.testing.assert_allclose(rates, [5e-3, 5e-3, 5e-4, 5e-4, 5e-5, 5e-5], rtol=1e-6)


@pytest.mark.parametrize(
    ("epochs", "factors", "expected"),
    [
        ((2, 4), (0.5, 0.0), [1, 1, 0.5, 0.5, 0, 0]),
        ((1, 3, 4), (0.5, 0.0, 0.25), [1, 0.5, 0.5, 0, 0.25, 0.25]),
        ((1.6, 2.4), (0.1, 0.01), [1, 1, 0.01, 0.01, 0.01, 0.01]),  # both at step 2
        ((), (), [1] * 6),
    ],
)
def test_a_factor_is_of_the_first_rate(epochs, factors, expected):
    config = recipes.kinetics400().optimizer
    config.decay_epochs, config.decay_factors = epochs, factors
    schedule = jax.jit(learning_rate(config, 64, steps_per_epoch=1))
    np.testing.assert_allclose([schedule(i) for i in range(6)], 0.005 * np.array(expected))


@pytest.mark.parametrize("epochs", [(14.0, 11.0), (11.0,)])
def test_impossible_decays_give_a_one_line_error(epochs):
    config = recipes.kinetics400().optimizer
    config.decay_epochs = epochs
    with pytest.raises(InputError, match="must be equally many, and the epochs ascending, not"):
        learning_rate(config, 64, steps_per_epoch=100)


def test_the_rate_follows_the_batch():
    schedule = learning_rate(recipes.kinetics400().optimizer, 16, steps_per_epoch=100)
    assert float(schedule(0)) == pytest.approx(0.005 / 4)


def test_cosine_warms_up_and_ends_at_zero():
    schedule = learning_rate(recipes.demo().optimizer, 32, steps_per_epoch=100)
    assert float(schedule(0)) == 0
    assert float(schedule(50)) == pytest.approx(1e-3)
    assert float(schedule(100)) == pytest.approx(2e-3)
    assert float(schedule(350)) == pytest.approx(1e-3)
    assert float(schedule(600)) == pytest.approx(0, abs=1e-9)


def test_cosine_without_warmup_starts_at_the_peak_without_warnings(caplog):
    config = recipes.demo().optimizer
    config.warmup_epochs = 0.0
    schedule = learning_rate(config, 32, steps_per_epoch=100)
    rates = [float(schedule(step)) for step in (0, 150, 300, 600)]
    half = 1e-3 * (1 + np.cos(np.pi / 4))
    np.testing.assert_allclose(rates, [2e-3, half, 1e-3, 0], rtol=1e-6, atol=1e-9)
    assert not caplog.records


@pytest.mark.parametrize(("warmup", "steps"), [(1.0, 100), (0.6, 1)])
def test_a_warmup_as_long_as_the_run_gives_a_one_line_error(warmup, steps):
    config = recipes.demo()
    config.epochs, config.optimizer.warmup_epochs = 1, warmup
    with pytest.raises(InputError, match="warmup_epochs=0 for none"):
        learning_rate(config.optimizer, 32, steps_per_epoch=steps)


@pytest.mark.parametrize("layer_decay", [0.0, 1.1, -1.0, float("nan")])
def test_an_impossible_layer_decay_gives_a_one_line_error(layer_decay):
    config = recipes.recipe().optimizer
    config.layer_decay = layer_decay
    with pytest.raises(InputError, match="layer_decay must be a number above 0 and at most 1"):
        make_optimizer(config, optax.constant_schedule(0.01))


@pytest.mark.parametrize("field", ["name", "schedule", "trainable"])
def test_unknown_names_give_one_line_errors(field):
    config = recipes.recipe().optimizer
    config[field] = "adam"
    with pytest.raises(InputError, match=f"optimizer.{field} must be"):
        make_optimizer(config, learning_rate(config, 64, 10))
