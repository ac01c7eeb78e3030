"""TimeSformer (arXiv 2102.05095): embedding, block and model, in Flax NNX.

Modules hold parameters and say the forward pass; which tokens attend to which is in `attention`.
Every quirk of the authors' release that its checkpoints need is named where it lives.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from timesformer_jax.distributed import sequence
from timesformer_jax.distributed.sharding import constrain, target_device
from timesformer_jax.errors import InputError
from timesformer_jax.models.attention import Grid, Step, Tokens, by_clip, by_frame
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.ops.gelu import gelu
from timesformer_jax.models.ops.layer_norm import LayerNorm
from timesformer_jax.models.ops.linear import Linear
from timesformer_jax.models.remat import BLOCK_INPUT, OUTPUT, checkpointed


def _linear(
    config: TimeSformerConfig,
    rule: str,
    inputs: int,
    outputs: int | tuple[int, ...],
    rngs: nnx.Rngs,
    *,
    further: bool = False,
    dtype: str | None = None,
) -> Linear:
    if config.init == "width_scaled":
        init = nnx.initializers.normal(inputs**-0.5)
    else:
        init = nnx.initializers.zeros if further else nnx.initializers.normal(0.02)
    dtype = jnp.dtype(dtype or config.dtype)
    return Linear(inputs, outputs, kernel_init=init, dtype=dtype, rule=rule, rngs=rngs)


def _head(config: TimeSformerConfig, rngs: nnx.Rngs) -> Linear:
    # The loss is computed from the logits in float32.
    return _linear(config, "head", config.hidden_size, config.num_classes, rngs, dtype="float32")


def drop_path(
    x: Tokens, rate: float | jax.Array, sequences: np.ndarray, key: jax.Array | None
) -> Tokens:
    """Stochastic depth: zero a sequence's residual with probability `rate`, scale the others up.

    Args:
      x: the residuals, (B, T, N, D) patches and, where it takes part, one token a sequence,
        (B, S, D).
      rate: probability of dropping, a number or (); of a number 0 nothing is computed.
      sequences: (T, N), the number of each patch's sequence; one draw for each.
      key: None outside training: nothing is dropped.
    """
    if key is None or (isinstance(rate, float) and rate == 0):
        return x
    draws = jax.random.bernoulli(key, 1 - rate, (len(x.patches), sequences.max() + 1))
    factor = (draws / (1 - rate)).astype(x.patches.dtype)
    cls = None if x.cls is None else x.cls * factor.reshape(*x.cls.shape[:-1], 1)
    return Tokens(cls, x.patches * factor[:, sequences, None])


class Attention(nnx.Module):
    """One residual attention: norm, qkv, the scheme's mixing, projection, drop path.

    `fc` is the further linear layer of every attention but the scheme's plain one. In the
    release's init it starts at zero. The qkv kernel is (D, 3, D) and its bias (3, D), so that a
    split of the last axis is one by heads, which tensor parallelism needs.
    """

    def __init__(self, config: TimeSformerConfig, step: Step, *, plain: bool, rngs: nnx.Rngs):
        width = config.hidden_size
        self.step, self.heads = step, config.num_heads
        self.norm = LayerNorm(width, rngs)
        self.qkv = _linear(config, "qkv", width, (3, width), rngs)
        self.proj = _linear(config, "proj", width, width, rngs)
        self.fc = None if plain else _linear(config, "fc", width, width, rngs, further=True)

    def __call__(
        self, x: Tokens, grid: Grid, key: jax.Array | None = None, rate: float | jax.Array = 0.0
    ) -> Tokens:
        """Returns the update of `x`; its cls is None where the token takes no part."""
        sequences = self.step.sequences(x.patches.shape[1], grid)
        if self.step.within == "position":
            x = x._replace(patches=sequence.to_positions(x.patches))
        y = Tokens(self._copies(x.cls, sequences.max() + 1), x.patches)
        y = jax.tree.map(self._by_heads, self.qkv(jax.tree.map(self.norm, y)))
        y = _named(OUTPUT, self.step.mix(y, grid))
        y = self.proj(y)
        # The release drops before temporal_fc, so a dropped row still gets that layer's bias.
        y = drop_path(y, rate, sequences, key)
        y = y if self.fc is None else self.fc(y)
        if y.cls is not None and y.cls.ndim > x.cls.ndim:
            y = y._replace(cls=constrain(y.cls, "token").mean(axis=1))
        if self.step.within == "position":
            y = y._replace(patches=sequence.to_frames(y.patches))
        return y

    def _copies(self, cls: jax.Array, sequences: int) -> jax.Array | None:
        """One token for every sequence. As in the release they are copied before the projections:
        the published costs count those products (0.1% of the whole)."""
        if not self.step.token:
            return None
        one_a_sequence = cls.ndim == 3  # space only
        copies = cls if one_a_sequence else jnp.repeat(cls[:, None], sequences, axis=1)
        return constrain(copies, "token")

    def _by_heads(self, qkv: jax.Array) -> jax.Array:
        return qkv.reshape(*qkv.shape[:-1], self.heads, -1)  # ... 3 (h d) -> ... 3 h d


class MLP(nnx.Module):
    """The residual MLP on every token; drop path draws once a clip (a frame, for space only)."""

    def __init__(self, config: TimeSformerConfig, *, rngs: nnx.Rngs):
        self.sequences = by_frame if config.scheme.token_per_frame else by_clip
        self.norm = LayerNorm(config.hidden_size, rngs)
        self.fc1 = _linear(config, "fc1", config.hidden_size, config.mlp_size, rngs)
        self.fc2 = _linear(config, "fc2", config.mlp_size, config.hidden_size, rngs)

    def __call__(
        self, x: Tokens, grid: Grid, key: jax.Array | None = None, rate: float | jax.Array = 0.0
    ) -> Tokens:
        y = self.fc1(jax.tree.map(self.norm, x))
        y = self.fc2(jax.tree.map(gelu, y))
        return drop_path(y, rate, self.sequences(x.patches.shape[1], grid), key)


class Block(nnx.Module):
    """One encoder block: the scheme's attentions, then the MLP, each a residual."""

    def __init__(self, config: TimeSformerConfig, *, rngs: nnx.Rngs):
        steps, plain = config.scheme.steps, config.scheme.steps[config.scheme.plain]
        self.order = tuple(step.name for step in steps)  # an nnx.Dict sorts its keys
        self.parallel = config.scheme.parallel
        self.attention = nnx.Dict(
            {step.name: Attention(config, step, plain=step is plain, rngs=rngs) for step in steps}
        )
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: Tokens, grid: Grid, key: jax.Array | None = None, rate: float | jax.Array = 0.0
    ) -> Tokens:
        block_input = x = _named(BLOCK_INPUT, x)
        for i, name in enumerate(self.order):
            read = block_input if self.parallel else x
            x = _add(x, self.attention[name](read, grid, _fold(key, i), rate))
        return _add(x, self.mlp(x, grid, _fold(key, len(self.order)), rate))


def _add(x: Tokens, update: Tokens) -> Tokens:
    cls = x.cls if update.cls is None else x.cls + update.cls
    return _placed(Tokens(cls, x.patches + update.patches))


def _placed(x: Tokens) -> Tokens:
    """The state where it lies between layers, on a mesh of several devices; in order, on a GPU."""
    patches = constrain(x.patches, "frames")
    if target_device().platform == "gpu":
        # XLA would lay frames and clips innermost, along which positions' gradients are summed, and
        # transpose in every layer.
        patches = with_layout_constraint(patches, Layout(tuple(range(patches.ndim))))
    return Tokens(constrain(x.cls, "token"), patches)


def _fold(key: jax.Array | None, data: int | jax.Array) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, data)


def _named(name: str, x: Tokens) -> Tokens:
    return jax.tree.map(lambda t: checkpoint_name(t, name), x)


def resize_space(table: jax.Array, old: Grid, new: Grid, how: str = "nearest") -> jax.Array:
    """Spatial positions (1 + N, D) of the grid `old` for the grid `new`, (1 + N', D).

    The classification token's row stays as it is.

    Args:
      how: "nearest", as the release, or "smooth", bicubic (antialiased where the grid shrinks).
    """
    if new == old:
        return table
    patches = table[1:].reshape(*old, -1)
    if how == "nearest":
        patches = _nearest(_nearest(patches, 0, new[0]), 1, new[1])
    else:
        patches = jax.image.resize(patches, (*new, patches.shape[-1]), "bicubic")
    return jnp.concatenate([table[:1], patches.reshape(math.prod(new), -1)])


def resize_time(table: jax.Array, new: int, how: str = "nearest") -> jax.Array:
    """Temporal positions (T, D) for another number of frames: "nearest", or "smooth", linear."""
    if how == "nearest" or new == len(table):
        return _nearest(table, 0, new)
    return jax.image.resize(table, (new, table.shape[1]), "linear", antialias=False)


def _nearest(table: jax.Array, axis: int, size: int) -> jax.Array:
    """Resizes one axis to `size` by nearest neighbour, index floor(i * old / new)."""
    old = table.shape[axis]
    # In float32 as PyTorch does it, which at a few sizes (26 to 22) is one off the exact rule.
    index = np.floor(np.arange(size, dtype=np.float32) * (np.float32(old) / np.float32(size)))
    return jnp.take(table, np.minimum(index.astype(np.int32), old - 1), axis=axis)


class Embedding(nnx.Module):
    """Frames to tokens (equation 1): P x P patches through a linear layer, plus positions.

    Parameters: patch.kernel (P * P * 3, D), rows ordered by (y, x, channel); cls (D,);
    space (1 + N, D), whose row 0 belongs to the classification token; time (T, D).
    """

    def __init__(self, config: TimeSformerConfig, rngs: nnx.Rngs):
        self.config = config
        width, inputs = config.hidden_size, 3 * config.patch_size**2

        def conv2d_default(key, shape, dtype=jnp.float32):
            # The release leaves its patch convolution at PyTorch's default, +-1 / sqrt(inputs).
            bound = inputs**-0.5
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        self.patch = Linear(
            inputs, width, kernel_init=conv2d_default, bias_init=conv2d_default,
            dtype=jnp.dtype(config.dtype), rule="patch", rngs=rngs,
        )  # fmt: skip
        released = config.init == "release"
        normal = nnx.initializers.normal(0.02 if released else width**-0.5)
        self.cls = nnx.Param(normal(rngs.params(), (width,)))
        has_space = config.position_embedding != "none"
        has_time = config.position_embedding == "space_time" and config.scheme.time_embedding
        positions = 1 + math.prod(config.grid)
        self.space = nnx.Param(normal(rngs.params(), (positions, width))) if has_space else None
        # The release's video model starts as the image model it is made from: every moment looks
        # the same.
        time = nnx.initializers.zeros if released else normal
        shape = config.num_frames, width
        self.time = nnx.Param(time(rngs.params(), shape)) if has_time else None

    def __call__(self, video: jax.Array) -> Tokens:
        """(B, T, H, W, 3) to cls (B, D), or (B, T, D) for space only, and patches (B, T, N, D)."""
        config = self.config
        b, t = video.shape[:2]
        p, grid, dtype = config.patch_size, _grid(config, video), jnp.dtype(config.dtype)

        x = video.reshape(b, t, grid[0], p, grid[1], p, 3)
        x = x.transpose(0, 1, 2, 4, 3, 5, 6)  # b t y p x q c -> b t y x p q c
        patches = self.patch(x.reshape(b, t, grid[0] * grid[1], p * p * 3))
        # Positions are added in float32, and so are their gradients, which are sums over clips.
        cls = self.cls[...]
        if self.space is not None:
            space = resize_space(self.space[...], config.grid, grid, config.position_resize)
            cls, patches = cls + space[0], patches + space[1:]
        if self.time is not None:
            time = resize_time(self.time[...], t, config.position_resize)
            patches = patches + time[:, None]
        one_a_frame = (t,) if config.scheme.token_per_frame else ()
        cls = jnp.broadcast_to(cls, (b, *one_a_frame, cls.shape[-1]))
        return _placed(Tokens(cls.astype(dtype), patches.astype(dtype)))


def _grid(config: TimeSformerConfig, video: jax.Array) -> Grid:
    """Patches down and across of (B, T, H, W, 3) video."""
    return video.shape[2] // config.patch_size, video.shape[3] // config.patch_size


class TimeSformer(nnx.Module):
    """The video transformer of the paper, from a normalised clip to class logits.

    Args:
      config: its shape and scheme.
      rngs: `nnx.Rngs(seed)`, used for the initial parameters only and not kept.
    """

    def __init__(self, config: TimeSformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config, rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.norm = LayerNorm(config.hidden_size, rngs)
        self.head = _head(config, rngs)

    def __call__(self, video: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Class logits of clips.

        Args:
          video: (B, T, H, W, 3) float, normalised RGB; H and W multiples of the patch size.
          key: randomness of drop path in training; None for inference.

        Returns:
          (B, num_classes) float32.

        Raises:
          InputError: if the video is not of that shape.
        """
        return self.head(self.features(video, key=key))

    def features(self, video: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """(B, T, H, W, 3) to (B, D): the classification token after the final norm."""
        self._check(video)
        x, grid = self.embedding(video), _grid(self.config, video)
        x = self._scanned(x, grid, key) if self.config.scan_layers else self._each(x, grid, key)
        cls = x.cls.mean(axis=1) if self.config.scheme.token_per_frame else x.cls
        return self.norm(cls)

    def _each(self, x: Tokens, grid: Grid, key: jax.Array | None) -> Tokens:
        """The blocks one after another."""
        for i, (block, rate) in enumerate(zip(self.blocks, self.config.drop_path_rates)):
            forward = functools.partial(block, grid=grid, rate=rate)
            x = checkpointed(self.config.remat, forward, scanned=False)(x, key=_fold(key, i))
        return x

    def _scanned(self, x: Tokens, grid: Grid, key: jax.Array | None) -> Tokens:
        """The blocks as one that is compiled once and run `depth` times; the same numbers.

        Parameters are stacked here and not in the state, which costs one more copy of them (base:
        0.46 GB) and lets everything outside see them layer by layer.
        """
        graph, _ = nnx.split(self.blocks[0])
        layers = jax.tree.map(lambda *p: jnp.stack(p), *map(nnx.state, self.blocks))
        rates = jnp.asarray(self.config.drop_path_rates, jnp.float32)

        def forward(x: Tokens, layer: tuple) -> Tokens:
            params, i, rate = layer
            return nnx.merge(graph, params)(x, grid, _fold(key, i), rate)

        forward = checkpointed(self.config.remat, forward, scanned=True)
        numbered = layers, jnp.arange(self.config.depth), rates
        return jax.lax.scan(lambda x, layer: (forward(x, layer), None), x, numbered)[0]

    def _check(self, video: jax.Array) -> None:
        p = self.config.patch_size
        shape = tuple(video.shape)
        if len(shape) != 5 or shape[-1] != 3:
            raise InputError(
                f"video has shape {shape}; it must be (batch, frames, height, width, 3)"
            )
        if shape[1] < 1 or shape[2] < p or shape[3] < p or shape[2] % p or shape[3] % p:
            raise InputError(
                f"a clip of {shape[1]} frames of {shape[2]} x {shape[3]} cannot be cut into "
                f"patches; height and width must be multiples of patch_size {p}"
            )


def parameters(model: TimeSformer) -> dict:
    """The model's parameters as plain nested dicts of arrays, keyed by layer.

    This is what is trained, saved and converted: `{"blocks": {"0": {"mlp": {...}}}, ...}`.
    """
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return traverse_util.unflatten_dict({_path(path): leaf.get_value() for path, leaf in flat})


def new_head(config: TimeSformerConfig, seed: int = 0) -> dict:
    """Fresh parameters for the head: kernel (D, num_classes) and bias (num_classes,)."""
    head = _head(config, nnx.Rngs(seed))
    return {"kernel": head.kernel[...], "bias": head.bias[...]}


def abstract(config: TimeSformerConfig) -> TimeSformer:
    """A model whose parameters are shapes and dtypes only; costs no memory."""
    return nnx.merge(*_structure(config), copy=True)


@functools.cache  # it takes a second for the base model, and every program that is traced asks
def _structure(config: TimeSformerConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: TimeSformer(config, rngs=nnx.Rngs(0))))


def with_parameters(config: TimeSformerConfig, params: dict) -> TimeSformer:
    """The model of `config` that holds `params`, as `parameters` gives them (tracers too).

    Raises:
      InputError: naming the parameter that is missing, left over, or of another shape.
    """
    graph, state = _structure(config)
    flat = traverse_util.flatten_dict(params)
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        name = "/".join(_path(path))
        if _path(path) not in flat:
            raise InputError(f"the parameters lack {name}, which a {config.attention} model needs")
        value = flat.pop(_path(path))
        if value.shape != variable.shape:
            raise InputError(
                f"parameter {name} has shape {value.shape}, the model needs {variable.shape}"
            )
        leaves.append((path, variable.replace(value)))
    if flat:
        raise InputError(
            f"a {config.attention} model has no parameter {'/'.join(next(iter(flat)))}"
        )
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def _path(path: tuple) -> tuple[str, ...]:
    return tuple(str(part) for part in path)
