"""What every external format has: names of the parameters, and conversion of their layout."""

from __future__ import annotations

import abc
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from timesformer_jax.checkpoints import schema
from timesformer_jax.checkpoints.files import LazyArray, WeightsFile
from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformerConfig

Modules = Mapping[str, str]  # our path of a module, "mlp/fc1", to the format's name


class Naming(NamedTuple):
    """Maps our names to a format's names.

    A path is our name of a parameter ("blocks/0/mlp/fc1/kernel") or module ("blocks/0/mlp/fc1").

    Attributes:
      embeddings: paths of the classification token and the position embeddings to names.
      modules: paths of the modules outside the blocks to names.
      block: name of a block, with {} for its index.
      mlp: paths within a block of the MLP's modules to names within the block.
      attentions: for each scheme that the format has, each attention layer ("temporal"), and the
        paths within the layer to names within the block.
    """

    embeddings: Modules
    modules: Modules
    block: str
    mlp: Modules
    attentions: Mapping[str, Mapping[str, Modules]]


class Format(abc.ABC):
    """How a library names and stores the parameters of a vision transformer.

    Attributes:
      name: of the format, for messages.
      naming: of the parameters.
    """

    name: str
    naming: Naming

    @abc.abstractmethod
    def detect(self, names: Collection[str]) -> bool:
        """Whether arrays of these names are in this format."""

    @abc.abstractmethod
    def normalise(self, arrays: dict[str, LazyArray]) -> dict[str, LazyArray]:
        """The arrays under the names of `parameter_names`, without those that a ViT lacks."""

    @abc.abstractmethod
    def config_fields(self, file: WeightsFile) -> dict[str, Any]:
        """The fields of `TimeSformerConfig` that a file tells.

        Without "attention", the model is an image model. Without "num_classes", it has no head.

        Args:
          file: with normalised arrays.

        Raises:
          InputError: if the arrays make no TimeSformer.
        """

    @abc.abstractmethod
    def to_jax(self, path: str, value: np.ndarray) -> np.ndarray:
        """A parameter in our layout; a view of `value` if possible."""

    @abc.abstractmethod
    def from_jax(self, path: str, value: np.ndarray, config: TimeSformerConfig) -> np.ndarray:
        """The inverse of `to_jax`."""

    @abc.abstractmethod
    def module_parameters(self, path: str, name: str) -> dict[str, str]:
        """The weight and the bias of a module: paths to names."""

    def clip_fields(self, file: WeightsFile) -> dict[str, Any]:
        """The fields of `ClipSpec` that a file tells: mean and std, in some files the stride."""
        found: dict[str, Any] = {}
        # transformers' file, or timm's config.json of a repository on the Hub.
        told = file.metadata.get("preprocessor") or {}
        timm = file.metadata.get("config", {}).get("pretrained_cfg") or {}
        timm = schema.json_object(timm, "pretrained_cfg in config.json")
        for field in ("mean", "std"):
            if (value := told.get(f"image_{field}", timm.get(field))) is not None:
                found[field] = schema.three_numbers(value, f"image_{field}")
        return found

    def labels(self, file: WeightsFile) -> tuple[str, ...]:
        """The class names; () if the file does not tell them."""
        return ()

    def parameter_names(self, config: TimeSformerConfig) -> dict[str, str]:
        """The paths of all parameters to their names in this format.

        Raises:
          InputError: if the format has no such attention scheme.
        """
        if config.attention not in self.naming.attentions:
            raise InputError(
                f"{self.name} has no {config.attention} attention, only "
                f"{', '.join(self.naming.attentions)}"
            )
        names = dict(self.naming.embeddings)
        if not config.scheme.time_embedding:
            names.pop("embedding/time", None)
        modules = dict(self.naming.modules)
        for i in range(config.depth):
            block = self.naming.block.format(i)
            for layer, parts in self.naming.attentions[config.attention].items():
                for part, name in parts.items():
                    modules[f"blocks/{i}/attention/{layer}/{part}"] = block + name
            for part, name in self.naming.mlp.items():
                modules[f"blocks/{i}/{part}"] = block + name
        for path, name in modules.items():
            names |= self.module_parameters(path, name)
        return names

    def depth(self, names: Collection[str]) -> int:
        """The number of blocks that the names of the arrays count."""
        pattern = re.escape(self.naming.block).replace(re.escape("{}"), r"([0-9]{1,9})")
        blocks = {int(m[1]) for name in names if (m := re.match(pattern, name))}
        depth = 1 + max(blocks, default=-1)
        if missing := set(range(min(depth, len(names)))) - blocks:
            raise InputError(
                f"{self.naming.block.format(min(missing))}* is missing, though there is a block "
                f"{depth - 1}; the file is incomplete"
            )
        schema.check_depth(depth)
        return depth


def weight_name(path: str) -> str:
    """Our name of a module's weight."""
    return "scale" if path.split("/")[-1] == "norm" else "kernel"


def shape_of(arrays: Mapping[str, LazyArray], name: str, rank: int) -> tuple[int, ...]:
    """The shape of an array that a model needs.

    Raises:
      InputError: if it is missing, empty, or does not have `rank` axes.
    """
    if name not in arrays:
        raise InputError(f"{name} is missing; this is no whole TimeSformer or ViT")
    shape = tuple(arrays[name].shape)
    if len(shape) != rank:
        raise InputError(f"{name} has shape {shape}; {rank} axes were expected")
    if 0 in shape:
        raise InputError(f"{name} has shape {shape} and holds no numbers")
    return shape


def image_size(patch: tuple[int, int, int], patch_name: str, rows: int, rows_name: str) -> int:
    """The image size that a position embedding is for, in pixels.

    Args:
      patch: (height, width, channels) of a patch.
      patch_name: of the patch convolution's weight.
      rows: of the position embedding, the classification token's among them.
      rows_name: of the position embedding.

    Raises:
      InputError: if patches or images are not square, or not RGB.
    """
    if patch[0] != patch[1] or patch[2] != 3:
        raise InputError(
            f"{patch_name} takes patches of {patch[0]} x {patch[1]} in {patch[2]} channels; "
            "square patches of RGB frames were expected"
        )
    side = math.isqrt(max(rows - 1, 0))
    if side < 1 or side * side != rows - 1:
        raise InputError(f"{rows_name} has {rows} rows; one and a square were expected")
    return side * patch[0]


def with_joined_qkv(
    arrays: dict[str, LazyArray],
    separator: str,
    join: Callable[[list[LazyArray]], LazyArray],
    format_name: str,
) -> dict[str, LazyArray]:
    """The arrays with query, key and value as one, whose name has "qkv" in their place.

    Args:
      arrays: by name.
      separator: of the parts of a name.
      join: the three arrays to one.
      format_name: for messages.

    Raises:
      InputError: if one of the three is missing.
    """
    query, key, value, joined = (
        f"{separator}{part}{separator}" for part in ("query", "key", "value", "qkv")
    )
    out = {k: v for k, v in arrays.items() if not any(p in k for p in (query, key, value))}
    for name in arrays:
        if query in name:
            parts = [name, name.replace(query, key), name.replace(query, value)]
            for part in parts:
                if part not in arrays:
                    raise InputError(f"{part} is missing; {format_name} needs it beside {name}")
            out[name.replace(query, joined)] = join([arrays[part] for part in parts])
    return out


def without_pre_logits(
    arrays: dict[str, LazyArray], pre_logits: str, head: str
) -> dict[str, LazyArray]:
    """Drops a hidden layer before the head, and the head, which is useless without that layer.

    Args:
      pre_logits, head: prefixes of the names of their arrays.
    """
    if not any(name.startswith(pre_logits) for name in arrays):
        return arrays
    logging.warning("%s* and the head behind it dropped: a TimeSformer has none", pre_logits)
    return {k: v for k, v in arrays.items() if not k.startswith((pre_logits, head))}
