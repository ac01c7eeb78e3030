"""transformers' TimesformerForVideoClassification as a contender of race_pytorch.py."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from contenders import CHECKED_STEPS, LEARNING_RATE, SETS, Contender, Options, Task, clips
from safetensors.torch import load_file
from transformers import TimesformerConfig, TimesformerForVideoClassification
from transformers.models.timesformer.modeling_timesformer import TimesformerSelfAttention

from timesformer_jax.checkpoints.convert.formats.hf import config_json
from timesformer_jax.models.config import TimeSformerConfig


class Transformers(Contender):
    def __init__(self, task: Task, options: Options):
        torch.set_num_threads(task.threads)
        if task.device == "cuda":
            torch.cuda.set_per_process_memory_fraction(task.share)
            if options.bfloat16:
                torch.set_float32_matmul_precision("high")
        self.task, self._options = task, options
        self._rounded = options.rounded and task.kind == "inference"
        self._model = TimesformerForVideoClassification.from_pretrained(task.folder)
        self._model = self._model.to(task.device).train(task.kind == "training")
        if self._rounded:
            self._model = self._model.bfloat16()
        if options.sdpa:
            for module in self._model.modules():
                if isinstance(module, TimesformerSelfAttention):
                    module.__class__ = FusedAttention
        self._call = torch.compile(self._model, dynamic=False) if options.compiled else self._model

    def about(self) -> dict[str, str]:
        device = torch.cuda.get_device_name() if self.task.device == "cuda" else "cpu"
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return versions | {"device": device}

    def _wait(self, started: Any) -> None:
        if self.task.device == "cuda":
            torch.cuda.synchronize()

    def _rest(self) -> None:
        if self.task.device == "cuda":
            torch.cuda.empty_cache()

    def _begin(self, batch: int) -> list[float]:
        dtype = torch.bfloat16 if self._rounded else torch.float32
        sets = [self._put(*each, dtype) for each in clips(self.task, batch)]
        begin = self._inference if self.task.kind == "inference" else self._training
        return begin(sets)

    def _put(self, video: np.ndarray, labels: np.ndarray, dtype: torch.dtype) -> tuple:
        """Clips as transformers' model takes them: channels before height and width."""
        video = torch.from_numpy(np.ascontiguousarray(video.transpose(0, 1, 4, 2, 3)))
        return video.to(self.task.device, dtype), torch.from_numpy(labels).to(self.task.device)

    def _precision(self) -> contextlib.AbstractContextManager:
        if self._options.bfloat16 and not self._rounded:
            return torch.autocast(self.task.device, torch.bfloat16)
        return contextlib.nullcontext()

    def _inference(self, sets: list) -> list[float]:
        @torch.inference_mode()
        def run(i: int) -> torch.Tensor:
            with self._precision():
                return self._call(pixel_values=sets[i % SETS][0]).logits

        self._run = run
        return run(0)[:1].float().flatten().tolist()

    def _training(self, sets: list) -> list[float]:
        # The weights were trained by another batch size since they were read.
        self._model.load_state_dict(load_file(os.path.join(self.task.folder, "model.safetensors")))
        optimizer = torch.optim.SGD(
            self._model.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True,
            weight_decay=1e-4, fused=self._options.fused,
        )  # fmt: skip

        def run(i: int) -> torch.Tensor:
            video, labels = sets[i % SETS]
            with self._precision():
                logits = self._call(pixel_values=video).logits
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss.detach()

        self._run = run
        return [float(run(0)) for _ in range(CHECKED_STEPS)]

    def _product(self, side: int) -> tuple[Callable[[int], Any], float]:
        dtype = torch.float32 if self.task.device == "cpu" else torch.bfloat16
        factors = [torch.randn(side, side, device=self.task.device, dtype=dtype) for _ in range(2)]
        return lambda i: factors[i % 2] @ factors[1 - i % 2], 2 * side**3


class FusedAttention(TimesformerSelfAttention):
    """Attention by torch's scaled_dot_product_attention; nothing else changes."""

    def forward(self, hidden_states: torch.Tensor, output_attentions: bool = False) -> tuple:
        size, length, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(size, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return (out.transpose(1, 2).reshape(size, length, width),)


def write_weights(model: dict[str, Any], folder: str) -> None:
    """Writes a transformers directory in which every parameter is random.

    Args:
      model: fields of TimeSformerConfig.
    """
    torch.manual_seed(0)
    described = config_json(TimeSformerConfig(**model), ())
    theirs = TimesformerForVideoClassification(TimesformerConfig.from_dict(described))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
