"""The configs: the published recipes, full-size models, and names that are refused."""

import pathlib
import runpy

import jax
import numpy as np
import pytest

from timesformer_jax import recipes
from timesformer_jax.augmentation import Augmentation
from timesformer_jax.models.timesformer import TimeSformerConfig, abstract, parameters
from timesformer_jax.preprocessing import ClipSpec

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def config_of(path):
    return runpy.run_path(str(path))["get_config"]()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds_its_model_for_its_clips(path):
    config = config_of(path)
    fields = dict(config.model) | {"num_classes": config.model.num_classes or 7}
    model = abstract(TimeSformerConfig(**fields))
    clip = ClipSpec(**config.clip)
    video = jax.ShapeDtypeStruct((2, clip.frames, clip.crop, clip.crop, 3), np.float32)
    logits = jax.eval_shape(lambda m, v: m(v), model, video)
    assert logits.shape == (2, fields["num_classes"])
    assert config.model.num_frames == clip.frames
    assert config.model.image_size == clip.crop <= config.data.jitter[0]
    doc = path.read_text().split('"""')[1]
    assert f"timesformer train --config=configs/{path.name} --workdir=runs/" in doc


@pytest.mark.parametrize(
    ("name", "frames", "rate", "crop", "jitter", "attention", "count"),
    [
        ("k400_base", 8, 32, 224, (256, 320), "divided", 121_566_352),
        ("k400_hr", 16, 16, 448, (448, 512), "divided", 122_024_080),
        ("k400_l", 96, 4, 224, (256, 320), "divided", 121_633_936),
        ("k400_joint", 8, 32, 224, (256, 320), "joint", 86_112_400),
        ("k400_space", 8, 32, 224, (256, 320), "space", 86_106_256),
    ],
)
def test_the_released_recipes(name, frames, rate, crop, jitter, attention, count):
    config = config_of(CONFIGS[0].parent / f"{name}.py")
    assert (config.clip.frames, config.clip.rate, config.clip.crop) == (frames, rate, crop)
    assert config.data.jitter == jitter
    assert config.model.attention == attention
    assert (config.epochs, config.batch_size, config.data.flip) == (15, 64, True)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.momentum) == ("sgd", 0.005, 0.9)
    assert optimizer.weight_decay == 1e-4
    assert not Augmentation(**config.augment).on
    assert (config.eval.views, config.eval.crops, config.eval.every_epochs) == (1, 3, 5)
    assert config.clip.mean == (0.45, 0.45, 0.45)
    assert config.clip.std == (0.225, 0.225, 0.225)
    params = parameters(abstract(TimeSformerConfig(**config.model)))
    assert sum(p.size for p in jax.tree.leaves(params)) == count


def test_a_clips_size_is_said_once():
    config = recipes.kinetics400()
    config.clip.frames, config.clip.crop = 16, 448
    assert (config.model.num_frames, config.model.image_size) == (16, 448)
    config.batch_size = 8
    assert config.eval.batch_size == 8


def test_names_that_are_not_there_are_refused():
    config = recipes.demo()
    config.lock()
    with pytest.raises(AttributeError, match="batch_size"):
        config.batchsize = 3
