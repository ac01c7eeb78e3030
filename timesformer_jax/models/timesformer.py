"""TimeSformer (arXiv 2102.05095): attention, MLP, block and model, in Flax NNX.

Modules hold parameters and say the forward pass. Which tokens attend to which is in `schemes.py`,
attention itself in `attention.py`, the patch embedding in `embedding.py`; `ops/` has the operations
in a fast form. Named scopes tell the parts of the compiled program apart, for profiles and for
`timesformer plan`. Every quirk of the authors' release that its checkpoints need is named where it
is reproduced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.distributed import sequence
from timesformer_jax.distributed.pieces import in_pieces, is_long
from timesformer_jax.distributed.sharding import constrain, target_device
from timesformer_jax.errors import InputError
from timesformer_jax.models import padding
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.embedding import Embedding, Video, patch_grid
from timesformer_jax.models.ops.layer_norm import LayerNorm
from timesformer_jax.models.ops.linear import Linear, fused, gelu
from timesformer_jax.models.ops.reference import use_references
from timesformer_jax.models.remat import BLOCK_INPUT, OUTPUT, checkpointed
from timesformer_jax.models.schemes import AttentionLayer, by_clip, by_frame
from timesformer_jax.models.tokens import Grid, MaybeKey, Rate, Tokens, drop_path, tape

# So many frames of each clip are valid; None: all of all clips.
ValidFrames = Int[Array | np.ndarray, " b"] | None


class Attention(nnx.Module):
    """One residual attention of a block: norm, qkv, attention, projection, drop path.

    The qkv kernel is (D, 3, D) and its bias (3, D): tensor parallelism splits their last axis, so
    that each device has whole heads.
    """

    def __init__(self, config: TimeSformerConfig, layer: AttentionLayer, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.layer, (self.heads, attended) = layer, config.heads_and_width(layer)
        self.norm = LayerNorm(width, rngs)
        self.qkv = _linear(config, "qkv", width, (3, attended), rngs)
        self.proj = _linear(config, "proj", attended, width, rngs)
        zero = config.init == "release"
        self.temporal_fc = (
            _linear(config, "temporal_fc", width, width, rngs, zero=zero)
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
        self.fc1 = _linear(config, "fc1", config.hidden_size, config.mlp_size, rngs)
        self.fc2 = _linear(config, "fc2", config.mlp_size, config.hidden_size, rngs)

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
                update = self.attention[name](read, grid, _fold_in(key, i), rate)
            x = _add(x, update)
        return _add(x, self.mlp(x, grid, _fold_in(key, len(self.order)), rate))


@jax.named_scope("residual")
def _add(x: Tokens, update: Tokens) -> Tokens:
    """x + update, whose cls may be None."""
    assert x.cls is not None  # the residual stream always has the token
    cls = x.cls if update.cls is None else x.cls + update.cls
    return _residual_stream(x._replace(cls=cls, patches=x.patches + update.patches))


def _residual_stream(x: Tokens) -> Tokens:
    """Constrains the sharding of the residual stream; pins a row-major layout on GPUs."""
    patches = constrain(x.patches, "frames")
    if target_device().platform == "gpu":
        # XLA would put clips and frames innermost, along which the gradients of the positions are
        # summed, and transpose in every layer.
        patches = with_layout_constraint(patches, Layout(tuple(range(patches.ndim))))
    assert x.cls is not None
    return x._replace(cls=constrain(x.cls, "token"), patches=patches)


def _linear(
    config: TimeSformerConfig,
    rule: str,
    inputs: int,
    outputs: int | tuple[int, ...],
    rngs: nnx.Rngs,
    *,
    zero: bool = False,
    dtype: str | None = None,
) -> Linear:
    scale = inputs**-0.5 if config.init == "width_scaled" else 0.02
    init = nnx.initializers.zeros if zero else nnx.initializers.normal(scale)
    dtype = jnp.dtype(dtype or config.dtype)
    return Linear(inputs, outputs, kernel_init=init, dtype=dtype, rule=rule, rngs=rngs)


def _head(config: TimeSformerConfig, rngs: nnx.Rngs) -> Linear:
    # The loss is computed from the logits in float32.
    return _linear(config, "head", config.hidden_size, config.num_classes, rngs, dtype="float32")


def _fold_in(key: MaybeKey, data: int | jax.Array) -> MaybeKey:
    return None if key is None else jax.random.fold_in(key, data)


def _named(name: str, x: Tokens) -> Tokens:
    named = jax.tree.map(lambda t: checkpoint_name(t, name), x._replace(valid=None))
    return named._replace(valid=x.valid)


class TimeSformer(nnx.Module):
    """The video transformer of the paper, from a normalised clip to class logits.

    Args:
      config: its shape and scheme.
      rngs: `nnx.Rngs(seed)`, used for the initial parameters only and not kept.

    Attributes:
      config: its shape and scheme.
      labels: class names in the order of the logits, of a model from `from_pretrained`; () if
        unknown.
      clip: the clips that it was trained on, of a model from `from_pretrained`; None if unknown.
    """

    labels: tuple[str, ...] = ()
    clip: ClipSpec | None = None

    def __init__(self, config: TimeSformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config, rngs)
        self.blocks = nnx.List([Block(config, i, rngs=rngs) for i in range(config.depth)])
        self.norm = LayerNorm(config.hidden_size, rngs)
        self.head = _head(config, rngs)

    @no_type_check  # `_check` says in one line what is wrong
    def __call__(
        self, video: Video, *, key: MaybeKey = None, valid_frames: ValidFrames = None
    ) -> Float[Array, "b c"]:
        """Class logits of clips.

        Args:
          video: (B, T, H, W, 3) float, normalised RGB; H and W multiples of the patch size.
          key: randomness of drop path in training; None for inference.
          valid_frames: (B,) ints from 1 to T. Only so many frames of each clip count, from the
            first one: no token attends to the others, and no average includes them. A clip has the
            logits that its valid frames have alone, with the first rows of the time embedding for T
            frames. None: all frames count.

        Returns:
          (B, num_classes) float32.

        Raises:
          InputError: if the video or valid_frames is not of that shape, or the scheme has no form
            for clips of different lengths (`padding.check_partition`).
        """
        return self.head(self.features(video, key=key, valid_frames=valid_frames))

    @no_type_check
    def features(
        self, video: Video, *, key: MaybeKey = None, valid_frames: ValidFrames = None
    ) -> Float[Array, "b d"]:
        """(B, T, H, W, 3) to (B, D): the classification token after the final norm."""
        return self.norm(self._encoded(video, key, valid_frames).cls)

    @no_type_check
    def tokens(self, video: Video, valid_frames: ValidFrames = None) -> Tokens:
        """(B, T, H, W, 3) to all tokens after the final norm: cls (B, D), patches (B, T, N, D).

        `cls` is what `features` gives. Classification was trained on it alone.
        """
        x = self._encoded(video, None, valid_frames)
        return jax.tree.map(self.norm, x._replace(valid=None))._replace(valid=x.valid)

    @no_type_check
    def _encoded(self, video: Video, key: MaybeKey, valid_frames: ValidFrames) -> Tokens:
        """The tokens after the last block, with one classification token, (B, D)."""
        x, grid = self.embedded(video, valid_frames), patch_grid(self.config, video)
        run = self._scanned if self.config.scan_layers else self._unrolled
        return self.with_one_token(run(x, grid, key))

    @no_type_check
    def embedded(self, video: Video, valid_frames: ValidFrames = None) -> Tokens:
        """(B, T, H, W, 3) to the tokens before the first block, which carry the mask of frames."""
        self._check(video)
        x = _residual_stream(self.embedding(video))
        if valid_frames is None:
            return x
        for layer in self.config.scheme.layers:
            padding.check_partition(layer.name, layer.partition)
        return x._replace(valid=padding.mask(valid_frames, video.shape))

    def with_one_token(self, x: Tokens) -> Tokens:
        """Of the tokens of all frames, in a space-only model, the mean."""
        assert x.cls is not None  # the residual stream always has the token
        if not self.config.scheme.token_per_frame:
            return x
        there = None if x.valid is None else x.valid[..., None]
        return x._replace(cls=x.cls.mean(axis=1, where=there))

    def _unrolled(self, x: Tokens, grid: Grid, key: MaybeKey) -> Tokens:
        """The blocks one after another."""
        for i, (block, rate) in enumerate(zip(self.blocks, self.config.drop_path_rates)):
            forward = functools.partial(block, grid=grid, rate=rate)
            x = checkpointed(self.config.remat, forward, scanned=False)(x, key=_fold_in(key, i))
        return x

    def _scanned(self, x: Tokens, grid: Grid, key: MaybeKey) -> Tokens:
        """The blocks as one that is compiled once and runs `depth` times; the numbers are the same.

        Parameters are stacked here and not in the state. That costs one more copy of them (base:
        0.46 GB), and everything outside sees them layer by layer.
        """
        graph, _ = nnx.split(self.blocks[0])
        layers = jax.tree.map(lambda *p: jnp.stack(p), *map(nnx.state, self.blocks))
        rates = jnp.asarray(self.config.drop_path_rates, jnp.float32)

        def forward(x: Tokens, layer: tuple) -> Tokens:
            params, i, rate = layer
            return nnx.merge(graph, params)(x, grid, _fold_in(key, i), rate)

        forward = checkpointed(self.config.remat, forward, scanned=True)
        numbered = layers, jnp.arange(self.config.depth), rates
        return jax.lax.scan(lambda x, layer: (forward(x, layer), None), x, numbered)[0]

    @no_type_check
    def _check(self, video: Video) -> None:
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


@no_type_check
def class_probabilities(
    logits: Float[Array, "b c"], multilabel: bool = False
) -> Float[Array, "b c"]:
    """Probabilities of the classes; evaluation and prediction use it.

    Args:
      logits: (B, classes).
      multilabel: whether a video has any number of the classes, and not one.
    """
    return jax.nn.sigmoid(logits) if multilabel else jax.nn.softmax(logits)


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
