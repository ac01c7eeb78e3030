"""The paper's ablations and the presets as arguments of a config: `--config=k400_base:frames=16`.

An argument changes all fields that belong together. To change one field alone, set it:
`--config.model.drop_path=0.2`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

from ml_collections import ConfigDict

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.errors import InputError, did_you_mean
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.presets import preset
from timesformer_jax.recipes import fit
from timesformer_jax.recipes.recipes import RELEASED, image_vit

# For each backbone, the preset that has it and its size in the file names of image ViTs.
BACKBONES = {
    "vit_s": ("timesformer_vit_s", "small"),
    "vit_b": ("timesformer_base", "base"),
    "vit_l": ("timesformer_vit_l", "large"),
}
INITS = {"imagenet21k": "in21k", "imagenet1k": "in1k", "scratch": ""}

# The fields that an argument sets: a checkpoint or the data no longer change them.
_DECIDES = {
    "attention": ("model.attention",),
    "position_embedding": ("model.position_embedding",),
    "frames": ("clip.frames", "clip.frame_stride"),
    "frame_stride": ("clip.frame_stride",),
    "crop": ("clip.crop", "data.short_side_range"),
    "patch_size": ("model.patch_size",),
    "backbone": ("model.hidden_size", "model.depth", "model.num_heads"),
    "init": (),
    "train_fraction": (),
    "model": (
        *(name for name in fit.OF_VIDEO_MODEL if name.startswith("model.")),
        "clip.frames", "clip.crop", "data.short_side_range",
    ),
}  # fmt: skip


def with_arguments(config: ConfigDict, arguments: str = "") -> ConfigDict:
    """Applies the arguments of a config: `with_arguments(demo(), "attention=joint,frames=16")`.

    Args:
      config: changed in place.
      arguments: the text after the colon of --config: arguments of `ablate` as name=value,
        separated by commas.

    Returns:
      The config; the arguments are added to its name.

    Raises:
      InputError: for an unknown, repeated or invalid argument.
    """
    if not arguments:
        return config
    # Arguments are those of the form `x: kind | None`.
    kinds = {name: kind for name, kind in get_type_hints(ablate).items() if get_args(kind)}
    given = {}
    for argument in arguments.split(","):
        name, equals, value = argument.partition("=")
        if name not in kinds:
            raise InputError(
                f"no argument {name!r} of a config, there are: {', '.join(kinds)}"
                f"{did_you_mean(name, kinds)}"
            )
        if not equals or name in given:
            raise InputError(f"give {name} once, as {name}=VALUE, not in {arguments!r}")
        kind = get_args(kinds[name])[0]
        try:
            given[name] = kind(value)
        except ValueError:
            raise InputError(f"{name} must be a number ({kind.__name__}), not {value!r}") from None
    config = ablate(config, **given)
    fit.decide(config, [name for argument in given for name in _DECIDES[argument]])
    config.name = f"{config.name}:{arguments}"
    return config


def ablate(
    config: ConfigDict,
    *,
    model: str | None = None,
    attention: str | None = None,
    position_embedding: str | None = None,
    frames: int | None = None,
    frame_stride: int | None = None,
    crop: int | None = None,
    patch_size: int | None = None,
    backbone: str | None = None,
    init: str | None = None,
    train_fraction: float | None = None,
) -> ConfigDict:
    """Changes a recipe to another preset, and in the ways that the paper compares.

    Args:
      config: changed in place.
      model: a preset: its sizes, its clips' frames and size, and config.pretrained with them. The
        time that a clip spans, the attention scheme and the classes are still the recipe's.
      attention: the attention scheme (table 1).
      position_embedding: "none", "space" or "space_time" (table 4).
      frames: frames of a clip that spans the same time as the recipe's: twice the frames, half the
        frame_stride (figure 5).
      frame_stride: distance between the frames, if the clip should span another time.
      crop: side of a clip, in pixels (figure 5). The range of the short side is in proportion to
        the crop: the release's range for 448 above 224, else its range for 224.
      patch_size: side of a patch, in pixels.
      backbone: "vit_s", "vit_b" or "vit_l".
      init: "imagenet21k", "imagenet1k" or "scratch"; by default the first, but "scratch" for
        a recipe without config.pretrained. The image ViT has the model's sizes.
      train_fraction: fraction of the training videos of each class (figure 4).

    Raises:
      InputError: if a value is invalid, or no image ViT of the sizes is published.
    """
    if model is not None:
        _set_model(config, model, frames)
    elif frames is not None:
        _set_frames(config, frames)
    if attention is not None:
        config.model.attention = attention
    if position_embedding is not None:
        config.model.position_embedding = position_embedding
    if frame_stride is not None:
        config.clip.frame_stride = frame_stride
    if crop is not None:
        _set_crop(config, crop)
    if train_fraction is not None:
        config.data.train_fraction = train_fraction
    _set_backbone(config, patch_size, backbone, init)
    # Their constructors check the values.
    ClipSpec(**config.clip)
    TimeSformerConfig(**config.model.to_dict() | {"num_classes": config.model.num_classes or 1})
    return config


def _set_model(config: ConfigDict, name: str, frames: int | None) -> None:
    """Sets the fields of a preset, and the checkpoint that such a model starts from."""
    fields = dataclasses.asdict(preset(name))
    own = fields.pop("num_frames")
    is_automatic = "clip.frame_stride" in fit.automatic(config)
    _set_frames(config, own if frames is None else frames)
    if is_automatic:  # the checkpoint and the data know more than this recipe
        fit.make_automatic(config, ["clip.frame_stride"])
    _set_crop(config, fields.pop("image_size"))
    for kept in ("num_classes", "attention", "dtype", "remat", "scan_layers"):
        del fields[kept]
    config.model.update(fields)
    if config.pretrained in RELEASED.values():
        config.pretrained = RELEASED.get(name, "")
    elif config.pretrained:
        config.pretrained = _image_vit_of(config.model)


def _image_vit_of(model: ConfigDict, images: str = "in21k") -> str:
    """The image ViT with the sizes of a model; "" if none is published."""
    for vit, size in BACKBONES.values():
        theirs = preset(vit)
        if (model.hidden_size, model.depth) == (theirs.hidden_size, theirs.depth):
            return image_vit(size, model.patch_size, images)
    return ""


def _set_frames(config: ConfigDict, frames: int) -> None:
    clip = ClipSpec(**config.clip).with_frames(frames)
    config.clip.frames, config.clip.frame_stride = clip.frames, clip.frame_stride


def _set_crop(config: ConfigDict, crop: int) -> None:
    config.clip.crop = crop
    low, high = (224, 256) if crop > 224 else (256, 320)
    config.data.short_side_range = (round(low * crop / 224), round(high * crop / 224))


def _set_backbone(
    config: ConfigDict, patch_size: int | None, backbone: str | None, init: str | None
) -> None:
    """Sets the sizes of the model, and the image ViT of these sizes as config.pretrained."""
    if patch_size is backbone is init is None:
        return
    if patch_size is not None:
        config.model.patch_size = patch_size
    if backbone is not None:
        vit = preset(_known("backbone", backbone, BACKBONES)[0])
        config.model.update(
            {name: getattr(vit, name) for name in ("hidden_size", "depth", "num_heads")}
        )
    if init is None and not config.pretrained:
        return
    images = _known("init", init or "imagenet21k", INITS)
    config.pretrained = images and _image_vit_of(config.model, images)
    if images and not config.pretrained:
        model = config.model
        raise InputError(
            f"no ViT of {model.hidden_size} channels, {model.depth} blocks and patches of "
            f"{model.patch_size} is published for ImageNet-{images.removeprefix('in')}: give "
            "init=scratch, and --config.pretrained=PATH for weights of your own"
        )


def _known(argument: str, value: str, known: dict[str, Any]) -> Any:
    """known[value], or an InputError that names the argument."""
    if value not in known:
        raise InputError(
            f"{argument} must be one of {', '.join(known)}, not {value!r}"
            f"{did_you_mean(value, known)}"
        )
    return known[value]
