"""A tiny model trained for a few steps on any mesh, its program kept to be looked at."""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np
import optax

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.distributed.mesh import make_mesh, put_batch
from timesformer_jax.models.timesformer import TimeSformerConfig, abstract, parameters
from timesformer_jax.planning.collectives import collectives
from timesformer_jax.training.step import abstract_state, init_state, make_train_step
from timesformer_jax.transforms.augmentation import OFF

CLIPS = 8
ONE = (1, 1, 1, 1)


class Run(NamedTuple):
    """What a training of some steps gave: the rest as numpy arrays."""

    params: dict
    gradient: dict  # of the first step
    metrics: list
    collectives: list
    flops: float  # of one device
    state: object  # the last one, where it lies


def tiny(attention, **fields):
    """17 tokens a frame and 6 classes: an odd number, and one that 8 devices cannot share."""
    return TimeSformerConfig(
        attention=attention,
        **{
            "num_classes": 6, "image_size": 16, "num_frames": 4, "patch_size": 4,
            "hidden_size": 24, "depth": 2, "num_heads": 2, "drop_path": 0.2,
            **fields,
        },
    )  # fmt: skip


def random_parameters(config):
    """None of them zero, as after training."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: (rng.standard_normal(x.shape) * 0.2).astype(np.float32),
        parameters(abstract(config)),
    )


def mesh_of(sizes):
    """The mesh of (data, fsdp, tensor, sequence) among the first devices there are."""
    return make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])


def optimizer():
    """SGD whose momentum after one step is the gradient."""
    schedule = optax.constant_schedule(0.02)
    trace = optax.trace(0.9, nesterov=True)
    return schedule, optax.chain(trace, optax.scale_by_learning_rate(schedule))


def batches(config, steps):
    rng = np.random.default_rng(0)
    side = config.image_size + 4
    for _ in range(steps):
        yield {
            "frames": rng.integers(0, 256, (CLIPS, config.num_frames, side, side, 3), np.uint8),
            "crop_boxes": np.tile(np.float32([1, 2, side - 3]), (CLIPS, 1)),
            "flip": rng.random(CLIPS) < 0.5,
            "label": rng.integers(0, config.num_classes, CLIPS, dtype=np.int32),
            "augment_seed": rng.integers(0, 2**32, CLIPS, dtype=np.uint32),
        }


@functools.cache
def trained(config, sizes, steps=5, augmentation=OFF):
    mesh = mesh_of(sizes)
    clip = ClipSpec(config.num_frames, crop=config.image_size, short_side=config.image_size + 4)
    schedule, sgd = optimizer()
    target = abstract_state(config, sgd, mesh)
    step = make_train_step(config, clip, sgd, schedule, target, mesh, 1, augmentation)
    state = init_state(random_parameters(config), sgd, target)
    found, gradient, compiled = [], None, None
    for batch in batches(config, steps):
        arrays = put_batch(mesh, batch)
        compiled = compiled or step.lower(target, arrays).compile()
        state, metrics = compiled(state, arrays)
        found.append(jax.device_get(metrics))
        gradient = gradient or jax.device_get(state.opt_state[0].trace)
    assert int(state.step) == steps
    return Run(
        jax.device_get(state.params),
        gradient,
        found,
        collectives(compiled, mesh),
        compiled.cost_analysis()["flops"],
        state,
    )


def assert_same_training(ours, theirs, rtol=2e-4, atol=2e-5):
    """Losses, metrics, the first gradient and the last parameters."""
    for step, (a, b) in enumerate(zip(ours.metrics, theirs.metrics, strict=True)):
        for name in b:
            np.testing.assert_allclose(a[name], b[name], rtol=rtol, err_msg=f"{name} {step}")
    for mine, other in ((ours.gradient, theirs.gradient), (ours.params, theirs.params)):
        jax.tree.map_with_path(
            lambda path, a, b: np.testing.assert_allclose(
                a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path)
            ),
            mine,
            other,
        )


def patch_bytes(config, devices, itemsize=4):
    """Of the patches (B, T, N, D) of a batch, on one of the devices that share them."""
    patches = CLIPS * config.num_frames * math.prod(config.grid)
    return patches * config.hidden_size * itemsize // devices
