"""TimeSformer (arXiv 2102.05095) in Flax NNX: the model, and its parameters as plain dicts.

Modules hold parameters and say the forward pass. The patch embedding is in `embedding.py`, a block
in `block.py`, which tokens attend to which in `schemes.py`, attention itself in `attention.py`;
`ops/` has the operations in a fast form. Named scopes tell the parts of the compiled program apart,
for profiles and for `timesformer plan`. Every quirk of the authors' release that its checkpoints
need is named where it is reproduced.
"""

from __future__ import annotations

import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array, Float, Int

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.errors import InputError
from timesformer_jax.models import padding
from timesformer_jax.models.block import Block, new_linear, residual_stream
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.embedding import Embedding, Video, patch_grid
from timesformer_jax.models.ops.layer_norm import LayerNorm
from timesformer_jax.models.ops.linear import Linear
from timesformer_jax.models.remat import checkpointed
from timesformer_jax.models.tokens import Grid, MaybeKey, Tokens, fold_in

# So many frames of each clip are valid; None: all of all clips.
ValidFrames = Int[Array | np.ndarray, " b"] | None


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
        x = residual_stream(self.embedding(video))
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
            x = checkpointed(self.config.remat, forward, scanned=False)(x, key=fold_in(key, i))
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
            return nnx.merge(graph, params)(x, grid, fold_in(key, i), rate)

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


def _head(config: TimeSformerConfig, rngs: nnx.Rngs) -> Linear:
    # The loss is computed from the logits in float32.
    return new_linear(config, "head", config.hidden_size, config.num_classes, rngs, dtype="float32")


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
