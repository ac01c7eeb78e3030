"""Optimizers against PyTorch's, schedules against the recipe's words."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from timesformer_jax import recipes
from timesformer_jax.errors import InputError
from timesformer_jax.training.optimizer import learning_rate, make_optimizer


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_ten_steps_are_pytorchs(name):
    config = recipes.recipe().optimizer
    config.name = name
    rng = np.random.default_rng(0)
    weights, targets = rng.normal(size=(2, 5)).astype(np.float32)
    ours = jnp.asarray(weights)
    theirs = torch.nn.Parameter(torch.tensor(weights))
    if name == "sgd":
        rival = torch.optim.SGD([theirs], 0.05, 0.9, weight_decay=1e-4, nesterov=True)
    else:
        rival = torch.optim.AdamW([theirs], 0.05, weight_decay=1e-4)
    optimizer = make_optimizer(config, optax.constant_schedule(0.05))
    state = optimizer.init(ours)
    for _ in range(10):
        rival.zero_grad()
        ((theirs - torch.tensor(targets)) ** 4).sum().backward()
        rival.step()
        updates, state = optimizer.update(4 * (ours - targets) ** 3, state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5)


def test_the_papers_steps():
    schedule = learning_rate(recipes.kinetics400().optimizer, 64, steps_per_epoch=100)
    rates = [float(schedule(step)) for step in (0, 1099, 1100, 1399, 1400, 1499)]
    np.testing.assert_allclose(rates, [5e-3, 5e-3, 5e-4, 5e-4, 5e-5, 5e-5], rtol=1e-6)


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


def test_a_warmup_as_long_as_the_run_is_one_line():
    config = recipes.demo()
    config.epochs = 1
    with pytest.raises(InputError, match="warmup_epochs=0 for none"):
        learning_rate(config.optimizer, 32, steps_per_epoch=100)


@pytest.mark.parametrize("field", ["name", "schedule"])
def test_unknown_names_are_one_line(field):
    config = recipes.recipe().optimizer
    config[field] = "adam"
    with pytest.raises(InputError, match=f"optimizer.{field} must be"):
        make_optimizer(config, learning_rate(config, 64, 10))
