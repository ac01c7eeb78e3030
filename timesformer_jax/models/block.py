"""A block of the encoder (equations 5 to 9): its attentions, then the MLP, each a residual.

Which tokens attend to which is in `schemes.py`, attention itself in `attention.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from timesformer_jax.distributed import sequence
from timesformer_jax.distributed.pieces import in_pieces, is_long
from timesformer_jax.distributed.sharding import constrain, target_device
from timesformer_jax.models import padding
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.ops.layer_norm import LayerNorm
from timesformer_jax.models.ops.linear import Linear, fused, gelu
from timesformer_jax.models.ops.reference import use_references
from timesformer_jax.models.remat import BLOCK_INPUT, OUTPUT
from timesformer_jax.models.schemes import AttentionLayer, by_clip, by_frame
from timesformer_jax.models.tokens import Grid, MaybeKey, Rate, Tokens, drop_path, fold_in, tape


class Attention(nnx.Module):
    """One residual attention of a block: norm, qkv, attention, projection, drop path.

    The qkv kernel is (D, 3, D) and its bias (3, D): tensor parallelism splits their last axis, so
    that each device has whole heads.
    """

    def __init__(self, config: TimeSformerConfig, layer: AttentionLayer, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.layer, (self.heads, attended) = layer, config.heads_and_width(layer)
        self.norm = LayerNorm(width, rngs)
        self.qkv = new_linear(config, "qkv", width, (3, attended), rngs)
        self.proj = new_linear(config, "proj", attended, width, rngs)
        zero = config.init == "release"
        self.temporal_fc = (
            new_linear(config, "temporal_fc", width, width, rngs, zero=zero)
            if layer.has_temporal_fc
            else None
        )

    def __call__(self, x: Tokens, grid: Grid, key: MaybeKey = None, rate: Rate = 0.0) -> Tokens:
        """The residual update of `x`; its cls is None where the token takes no part."""
        cls = x.cls
        assert cls is not None  # the residual stream always has the token
        sequences = self.layer.partition(x.patches.shape[1], grid)
        count, n = int(sequences.max()) + 1, x.patches.shape[2]
        if self.layer.within == "position":
            x = x._replace(patches=sequence.to_positions(x.patches))
            # Positions that were added; they are dropped again, with whatever path they take.
            sequences = np.pad(sequences, ((0, 0), (0, x.patches.shape[2] - n)))
        y = Tokens(self._copies(cls, count), x.patches)
        y = jax.tree.map(self._split_heads, self.qkv(jax.tree.map(self.norm, y)))
        attended = self.layer.attend(y._replace(valid=x.valid), grid)
        if tape.value is not None:
            attended = tape.value.note(y, attended)
        y = _named(OUTPUT, attended)
        y = self._project(y, functools.partial(drop_path, rate=rate, sequences=sequences, key=key))
        if y.cls is not None and y.cls.ndim > cls.ndim:
            copies = constrain(y.cls, self._token_rule)
            copies = copies if copies.shape[1] == count else copies[:, :count]
            there = None if x.valid is None else padding.present(x.valid, sequences)[..., None]
            y = y._replace(cls=copies.mean(axis=1, where=there))
        if self.layer.within == "position":
            y = y._replace(patches=sequence.to_frames(y.patches, n))
        return y

    def _copies(self, cls: Float[Array, "b *s d"], sequences: int) -> Float[Array, "b _ d"] | None:
        """One token for every sequence. As in the release they are copied before the projections:
        the published costs count those products (0.1% of the whole)."""
        if not self.layer.joins_cls:
            return None
        one_a_sequence = cls.ndim == 3  # space only
        if self.layer.within == "position":
            sequences = sequence.positions(sequences)
        copies = cls if one_a_sequence else jnp.repeat(cls[:, None], sequences, axis=1)
        return constrain(copies, self._token_rule)

    @property
    def _token_rule(self) -> str:
        """The sharding of the tokens of its sequences: they lie where their sequences lie."""
        return "clip_token" if self.layer.within == "clip" else "token"

    def _split_heads(self, qkv: Float[Array, "*b 3 hd"]) -> Float[Array, "*b 3 h d"]:
        return qkv.reshape(*qkv.shape[:-1], self.heads, -1)

    @jax.named_scope("linear")
    def _project(self, y: Tokens, drop: Callable[[Tokens], Tokens]) -> Tokens:
        """`proj`, drop path and, where there is one, `temporal_fc`.

        The release drops before temporal_fc, so that a dropped row still gets the bias of that
        layer. A drop mask m multiplies whole rows, which commutes with the product:
        m (x W + b) W' + b' = m (x (W W') + b W') + b'. So one product serves for two. It costs D^3
        in place of D^2 a token: fewer tokens than D are multiplied one layer after the other.
        """
        if self.temporal_fc is None:
            return drop(self.proj(y))
        tokens = sum(leaf.size // leaf.shape[-1] for leaf in jax.tree.leaves(y))
        if use_references.value or tokens <= y.patches.shape[-1]:
            return self.temporal_fc(drop(self.proj(y)))
        y = drop(self.proj.apply(y, *fused(self.proj, self.temporal_fc)))
        bias = self.temporal_fc.bias[...]
        # In float32, so that the gradient of the bias is summed in float32 too.
        return jax.tree.map(lambda t: (t + bias).astype(t.dtype), y)


class MLP(nnx.Module):
    """The residual MLP on every token; drop path draws once a clip (a frame, for space only)."""

    def __init__(self, config: TimeSformerConfig, *, rngs: nnx.Rngs):
        self.partition = by_frame if config.scheme.token_per_frame else by_clip
        self.norm = LayerNorm(config.hidden_size, rngs)
        self.fc1 = new_linear(config, "fc1", config.hidden_size, config.mlp_size, rngs)
        self.fc2 = new_linear(config, "fc2", config.mlp_size, config.hidden_size, rngs)

    @jax.named_scope("mlp")
    def __call__(self, x: Tokens, grid: Grid, key: MaybeKey = None, rate: Rate = 0.0) -> Tokens:
        """The residual update of `x`."""
        _, frames, tokens, _ = x.patches.shape
        if is_long(frames, tokens):
            y = Tokens(self._layers(x.cls), in_pieces(self._layers, x.patches, tokens))
        else:
            y = self._layers(x._replace(valid=None))
        return drop_path(y, rate, self.partition(x.patches.shape[1], grid), key)

    def _layers(self, x: Any) -> Any:
        """A tree of tokens (..., D); they share one copy of the kernels."""
        y = self.fc1(jax.tree.map(self.norm, x))
        return self.fc2(jax.tree.map(gelu, y))


class Block(nnx.Module):
    """One encoder block: its attentions of the scheme, then the MLP, each a residual."""

    def __init__(self, config: TimeSformerConfig, number: int, *, rngs: nnx.Rngs):
        layers = config.scheme.layers_of(number)
        self.order = tuple(layer.name for layer in layers)  # an nnx.Dict sorts its keys
        self.parallel = config.scheme.parallel
        self.attention = nnx.Dict(
            {layer.name: Attention(config, layer, rngs=rngs) for layer in layers}
        )
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: Tokens, grid: Grid, key: MaybeKey = None, rate: Rate = 0.0) -> Tokens:
        """The tokens after the block."""
        block_input = x = _named(BLOCK_INPUT, x)
        for i, name in enumerate(self.order):
            read = block_input if self.parallel else x
            with jax.named_scope(name):
                update = self.attention[name](read, grid, fold_in(key, i), rate)
            x = _add(x, update)
        return _add(x, self.mlp(x, grid, fold_in(key, len(self.order)), rate))


@jax.named_scope("residual")
def _add(x: Tokens, update: Tokens) -> Tokens:
    """x + update, whose cls may be None."""
    assert x.cls is not None  # the residual stream always has the token
    cls = x.cls if update.cls is None else x.cls + update.cls
    return residual_stream(x._replace(cls=cls, patches=x.patches + update.patches))


def residual_stream(x: Tokens) -> Tokens:
    """Constrains the sharding of the residual stream; pins a row-major layout on GPUs."""
    patches = constrain(x.patches, "frames")
    if target_device().platform == "gpu":
        # XLA would put clips and frames innermost, along which the gradients of the positions are
        # summed, and transpose in every layer.
        patches = with_layout_constraint(patches, Layout(tuple(range(patches.ndim))))
    assert x.cls is not None
    return x._replace(cls=constrain(x.cls, "token"), patches=patches)


def new_linear(
    config: TimeSformerConfig,
    rule: str,
    inputs: int,
    outputs: int | tuple[int, ...],
    rngs: nnx.Rngs,
    *,
    zero: bool = False,
    dtype: str | None = None,
) -> Linear:
    """A linear layer with fresh parameters, of the config's init and dtype.

    Args:
      rule: the path of its kernel in the sharding rules (`distributed.sharding`).
      zero: whether the kernel is zero.
      dtype: of its products, if not the config's.
    """
    scale = inputs**-0.5 if config.init == "width_scaled" else 0.02
    init = nnx.initializers.zeros if zero else nnx.initializers.normal(scale)
    dtype = jnp.dtype(dtype or config.dtype)
    return Linear(inputs, outputs, kernel_init=init, dtype=dtype, rule=rule, rngs=rngs)


def _named(name: str, x: Tokens) -> Tokens:
    named = jax.tree.map(lambda t: checkpoint_name(t, name), x._replace(valid=None))
    return named._replace(valid=x.valid)
