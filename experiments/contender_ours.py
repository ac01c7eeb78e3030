"""This project as a contender of race_pytorch.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from contenders import CHECKED_STEPS, LEARNING_RATE, SETS, Contender, Task, clips
from flax import nnx

from timesformer_jax import host_memory
from timesformer_jax.benchmark.model import RECIPE
from timesformer_jax.checkpoints.convert import from_pretrained
from timesformer_jax.models.timesformer import parameters, with_parameters
from timesformer_jax.models.tuning import choose_kernels
from timesformer_jax.training.optimizer import make_optimizer


class Ours(Contender):
    def __init__(self, task: Task, options: None):
        self.task = task
        host_memory.keep_freed()  # as the command line does
        self._dtype = "float32" if task.device == "cpu" else "bfloat16"
        self._model = from_pretrained(task.folder, dtype=self._dtype, drop_path=0.0)
        self._compiled: dict[int, jax.stages.Compiled] = {}  # by batch: the best is begun twice

    def about(self) -> dict[str, str]:
        return {"jax": jax.__version__, "device": jax.devices()[0].device_kind}

    def _wait(self, started: Any) -> None:
        jax.block_until_ready(started)

    def _begin(self, batch: int) -> list[float]:
        sets = [jax.device_put(each) for each in clips(self.task, batch)]
        begin = self._inference if self.task.kind == "inference" else self._training
        return begin(sets)

    def _inference(self, sets: list) -> list[float]:
        graph, state = nnx.split(self._model)
        forward = jax.jit(lambda state, video: nnx.merge(graph, state)(video))
        forward = self._compile(forward, state, sets[0][0])
        self._run = lambda i: forward(state, sets[i % SETS][0])
        return np.ravel(self._run(0)[:1]).tolist()

    def _training(self, sets: list) -> list[float]:
        optimizer = make_optimizer(RECIPE, optax.constant_schedule(LEARNING_RATE))

        def step(state: tuple, video: jax.Array, labels: jax.Array) -> tuple:
            def loss_of(params: dict) -> jax.Array:
                logits = with_parameters(self._model.config, params)(video)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            params, opt_state = state
            loss, grads = jax.value_and_grad(loss_of)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        params = jax.tree.map(jnp.copy, parameters(self._model))  # a step is given their memory
        state = params, optimizer.init(params)
        compiled = self._compile(jax.jit(step, donate_argnums=0), state, *sets[0])

        def run(i: int) -> jax.Array:
            nonlocal state
            state, loss = compiled(state, *sets[i % SETS])
            return loss

        self._run = run
        return [float(run(0)) for _ in range(CHECKED_STEPS)]

    def _compile(self, function: Callable, state: Any, video: jax.Array, *labels: jax.Array) -> Any:
        batch = len(video)
        if batch not in self._compiled:
            _, frames, side, *_ = video.shape
            choose_kernels(self._model.config, batch, frames, side, gradients=bool(labels))
            self._compiled[batch] = function.lower(state, video, *labels).compile()
        return self._compiled[batch]

    def _product(self, side: int) -> tuple[Callable[[int], Any], float]:
        factors = [jax.random.normal(jax.random.key(i), (side, side), self._dtype) for i in (0, 1)]
        product = jax.jit(jnp.matmul)
        return lambda i: product(factors[i % 2], factors[1 - i % 2]), 2 * side**3
