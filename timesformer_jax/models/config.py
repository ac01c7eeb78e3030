"""What a TimeSformer is: its sizes and scheme, checked when they are written down."""

from __future__ import annotations

import dataclasses

from timesformer_jax import ranges
from timesformer_jax.errors import InputError, did_you_mean
from timesformer_jax.models.remat import REMATS
from timesformer_jax.models.schemes import SCHEMES, AttentionLayer, Scheme, import_asked_for
from timesformer_jax.models.tokens import Grid

POSITION_EMBEDDINGS = ("none", "space", "space_time")
POSITION_RESIZES = ("nearest", "bicubic")
INITS = ("release", "width_scaled")


@dataclasses.dataclass(frozen=True)
class TimeSformerConfig:
    """What a TimeSformer is. The defaults are the paper's TimeSformer on K400 (8 x 224).

    Attributes:
      num_classes: classes of the head.
      image_size: height and width, in pixels, that the spatial position embedding is made for.
      num_frames: frames that the temporal position embedding is made for. Clips of another size
        or length are accepted: the embeddings are resized to them.
      patch_size: side of a patch, in pixels.
      hidden_size: channels of a token.
      depth: blocks.
      num_heads: attention heads; each has hidden_size / num_heads channels.
      mlp_ratio: hidden width of the MLP over hidden_size.
      attention: a scheme of `schemes.SCHEMES`: "divided", "space", "joint", "local_global",
        "axial", "time", "space_then_time", "parallel", or one that was registered.
      position_embedding: "none", "space" or "space_time" (table 4).
      position_resize: how the position embeddings are resized to clips of another size or length:
        "nearest", as in the release and its checkpoints, or "bicubic" in space and linear in time.
        Nearest neighbours give some patches the same position, so "bicubic" is the better choice
        where no checkpoint asks for "nearest".
      drop_path: stochastic depth rate of the last block; it rises linearly from 0 at the first.
      init: "release", as the authors do: standard deviation 0.02 for every weight and embedding,
        but zero for the time embedding and `temporal_fc`, so that a video model starts as the image
        model that it is made from. "width_scaled", for small models from scratch: standard
        deviation 1 / sqrt(inputs) for every linear layer and 1 / sqrt(hidden_size) for every
        embedding; only biases start at zero.
      dtype: dtype of the computation, "float32" or "bfloat16". Parameters and their gradients,
        norms, softmax, features and logits are always float32.
      remat: which activations are saved for the backward pass; it computes the others again.
        "none" saves all; "outputs" saves those of linear layers and attentions, but not of norms,
        GELU and softmax; "block" saves the input of each block; "offload" does too, in the memory
        of the host.
      scan_layers: compile one block and run it `depth` times, instead of compiling every block.
        Numbers and checkpoints are the same; compilation takes less time.
    """

    num_classes: int = 400
    image_size: int = 224
    num_frames: int = 8
    patch_size: int = 16
    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    attention: str = "divided"
    position_embedding: str = "space_time"
    position_resize: str = "nearest"
    drop_path: float = 0.1
    init: str = "release"
    dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = False

    def __post_init__(self):
        import_asked_for(self.attention)
        for field, known in {
            "attention": SCHEMES,
            "position_embedding": POSITION_EMBEDDINGS,
            "position_resize": POSITION_RESIZES,
            "init": INITS,
            "remat": REMATS,
            "dtype": ("float32", "bfloat16"),
        }.items():
            if (value := getattr(self, field)) not in known:
                raise InputError(
                    f"{field} must be one of {', '.join(known)}, not {value!r}"
                    f"{did_you_mean(str(value), known)}"
                )
        for field in (
            "num_classes", "image_size", "num_frames", "patch_size", "hidden_size", "depth",
            "num_heads", "mlp_ratio", "drop_path",
        ):  # fmt: skip
            ranges.check(field, getattr(self, field))
        if self.mlp_size < 1:
            raise InputError(
                f"mlp_ratio {self.mlp_ratio} of hidden_size {self.hidden_size} is no hidden unit"
            )
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
            )
        if self.image_size % self.patch_size:
            raise InputError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}"
            )
        for layer in self.scheme.layers:
            self._check_layer(layer)

    def _check_layer(self, layer: AttentionLayer) -> None:
        heads = self.num_heads * layer.width
        if heads < 1 or heads % 1:
            raise InputError(
                f"the {layer.name} attention of {self.attention!r} has {layer.width:g} times "
                f"num_heads {self.num_heads}, which is no whole number of heads"
            )
        if self.scan_layers and layer.every > 1:
            raise InputError(
                f"the blocks of {self.attention!r} differ ({layer.name} is in one of "
                f"{layer.every}); set scan_layers=False, which compiles each"
            )

    @property
    def scheme(self) -> Scheme:
        return SCHEMES[self.attention]

    @property
    def grid(self) -> Grid:
        """Patches down and across that the position embedding is made for."""
        side = self.image_size // self.patch_size
        return side, side

    def heads_and_width(self, layer: AttentionLayer) -> tuple[int, int]:
        """Heads of an attention, and channels of its queries, keys and values."""
        heads = round(self.num_heads * layer.width)
        return heads, heads * self.hidden_size // self.num_heads

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Of each block."""
        last = max(self.depth - 1, 1)
        return tuple(self.drop_path * i / last for i in range(self.depth))

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)
