"""From any file to the parameters of the model that is asked for: read, then adapt.

A format is a module that says how a vision transformer is called and laid out elsewhere:
`recognises(names)`, `tidy(state)`, `fields(file)`, `names(config)`, `to_ours` and `to_theirs`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util

from timesformer_jax.checkpoints import store as checkpoints
from timesformer_jax.checkpoints.convert import files, hf, release, torchvision, vit_jax
from timesformer_jax.checkpoints.convert.files import File, Stored
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.errors import InputError, did_you_mean
from timesformer_jax.models.embedding import resize_space, resize_time
from timesformer_jax.models.timesformer import (
    TimeSformerConfig,
    abstract,
    new_head,
    parameters,
)

FORMATS = (hf, vit_jax, torchvision, release)
RESIZES = ("bicubic", "official")
NON_COMMERCIAL = "CC-BY-NC-4.0"
# What the arrays' shapes fix for good.
_FIXED = ("patch_size", "hidden_size", "depth", "mlp_ratio")


class SizeMismatch(InputError):
    """A model was asked for that the checkpoint's arrays cannot become; `found` are its sizes."""

    def __init__(self, found: dict[str, Any], asked: dict[str, Any]):
        differ = ", ".join(f"{name} is {size}, not {asked[name]}" for name, size in found.items())
        super().__init__(f"its {differ}, which cannot be resized; ask for the checkpoint's own")
        self.found = found


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model's parameters, not read yet, and what is known of them.

    Attributes:
      path: where they come from.
      config: the model.
      params: our parameter paths ("head/kernel") to arrays.
      clip: what the model expects of a clip.
      labels: class names, if known.
      license: of the weights, "" where none is known to be needed.
      training: the training config that our own checkpoints carry.
      image: whether it is an image model, which says nothing of time.
    """

    path: str
    config: TimeSformerConfig
    params: dict[str, Stored]
    clip: ClipSpec
    labels: tuple[str, ...] = ()
    license: str = ""
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    image: bool = False

    def load(self) -> dict:
        """The parameters, as `models.timesformer.parameters` gives them."""
        # Copied: an alias of a mapped file would change, or end, with the file.
        params = {name: jnp.array(stored.load()) for name, stored in self.params.items()}
        return traverse_util.unflatten_dict(params, sep="/")


def read(path: str | os.PathLike, resize: str = "bicubic", **overrides: Any) -> Checkpoint:
    """The checkpoint at `path` as the model that the overrides ask for.

    Args:
      path: a file or directory of any format.
      resize: "bicubic" or "official", see `adapted`.
      **overrides: fields of `TimeSformerConfig`.

    Raises:
      InputError: naming the file, the array and what to do.
    """
    path = os.fspath(path)
    _check_options(resize, overrides)
    if checkpoints.is_native(path) and not files.is_weights_directory(path):
        source = _read_ours(path)
    else:
        source = _read_foreign(path, overrides.get("num_heads"))
    try:
        return adapted(source, _target(source, overrides), resize)
    except InputError as e:
        e.args = (f"{path}: {e}",)
        raise


def _check_options(resize: str, overrides: dict[str, Any]) -> None:
    if resize not in RESIZES:
        raise InputError(f"resize must be one of {', '.join(RESIZES)}, not {resize!r}")
    known = [field.name for field in dataclasses.fields(TimeSformerConfig)]
    for name in overrides:
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are: {', '.join(known)}"
            raise InputError(f"no model field {name!r}{hint}")


def _target(source: Checkpoint, overrides: dict[str, Any]) -> TimeSformerConfig:
    fixed = {name: getattr(source.config, name) for name in _FIXED if name in overrides}
    if found := {name: value for name, value in fixed.items() if value != overrides[name]}:
        raise SizeMismatch(found, overrides)
    if source.image and "attention" not in overrides:
        overrides = {"attention": TimeSformerConfig.attention, **overrides}
        logging.warning(
            "%s: an image model; a %s one starts from it (attention=... chooses)",
            source.path, overrides["attention"],
        )  # fmt: skip
    return dataclasses.replace(source.config, **overrides)


def _read_ours(path: str) -> Checkpoint:
    metadata, params = checkpoints.load_parameters(path)
    flat = traverse_util.flatten_dict(params, sep="/")
    return Checkpoint(
        path=path,
        config=metadata.model,
        params={k: Stored(v.shape, functools.partial(np.asarray, v)) for k, v in flat.items()},
        clip=metadata.clip,
        labels=metadata.labels,
        license=metadata.license,
        training=metadata.config,
    )


def _read_foreign(path: str, num_heads: int | None) -> Checkpoint:
    file = files.read(path)
    try:
        form = _format(file)
        file = file._replace(state=form.tidy(file.state))
        found = form.fields(file)
        heads = num_heads or found.get("num_heads") or _usual_heads(path, found["hidden_size"])
        image = "attention" not in found
        config = TimeSformerConfig(**{"attention": "space"} | found | {"num_heads": heads})
        params = _renamed(file.state, form, config, headless="num_classes" not in found)
        labels = hf.labels(file) if form is hf else ()
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    if labels and len(labels) != config.num_classes:
        raise InputError(
            f"{path}: config.json has {len(labels)} labels and the head {config.num_classes} "
            "classes; correct its id2label"
        )
    if "num_classes" not in found:
        logging.warning("%s has no head: a new one of %d classes", path, config.num_classes)
        params |= _new_head(config)
    # Where the file does not say otherwise, a video model of these names is the authors' work.
    usual = "" if image else NON_COMMERCIAL
    return Checkpoint(
        path=path,
        config=config,
        params=params,
        clip=_assumed_clip(config, file.about.get("preprocessor", {})),
        labels=labels,
        license=file.about.get("license", usual),
        image=image,
    )


def _format(file: File) -> ModuleType:
    for form in FORMATS:
        if form.recognises(file.state):
            return form
    some = ", ".join(sorted(file.state)[:3])
    raise InputError(
        f"its names ({some}, ...) are none of those we know: timm's or DeiT's, "
        f"{', '.join(form.NAME for form in FORMATS)}; rename them to timm's"
    )


def _usual_heads(path: str, width: int) -> int:
    heads = max(width // 64, 1)
    if width % 64:
        logging.warning(
            "%s does not say how many heads it has: %d assumed for a width of %d; pass "
            "num_heads=... if that is wrong, or the outputs will be", path, heads, width,
        )  # fmt: skip
    return heads


def _renamed(
    state: dict[str, Stored], form: ModuleType, config: TimeSformerConfig, headless: bool
) -> dict[str, Stored]:
    """Their arrays under our names; each has its place, and every place its array."""
    left, params = dict(state), {}
    shapes = _shapes(config)
    for ours, theirs in form.names(config).items():
        if headless and ours.startswith("head/"):
            continue
        if theirs not in left:
            raise InputError(
                f"{theirs} is missing, which a {config.attention} model of {form.NAME} needs; the "
                "file is incomplete"
            )
        stored = left.pop(theirs)
        # Of zeros that take no memory: only the shape is wanted.
        like = np.broadcast_to(np.float32(0), shapes[ours])
        expected = form.to_theirs(ours, like, config).shape
        if tuple(stored.shape) != expected:
            raise InputError(
                f"{theirs} has shape {tuple(stored.shape)} where the file's other arrays ask for "
                f"{expected}; it cannot be resized"
            )
        params[ours] = Stored(shapes[ours], functools.partial(_load, form, ours, stored))
    if left:
        raise InputError(
            f"{next(iter(left))} has no place in a {config.attention} model ({len(left)} such "
            "arrays); remove them from the file if they can be done without"
        )
    return params


def _load(form: ModuleType, ours: str, stored: Stored) -> np.ndarray:
    return form.to_ours(ours, stored.load())


@functools.lru_cache(maxsize=8)
def _shapes(config: TimeSformerConfig) -> dict[str, tuple[int, ...]]:
    flat = traverse_util.flatten_dict(parameters(abstract(config)), sep="/")
    return {path: tuple(value.shape) for path, value in flat.items()}


def _assumed_clip(config: TimeSformerConfig, preprocessor: dict[str, Any]) -> ClipSpec:
    """Foreign files say nothing of sampling: the release's recipe for as many frames."""
    known = {
        ours: preprocessor[theirs]
        for ours, theirs in {"mean": "image_mean", "std": "image_std"}.items()
        if theirs in preprocessor
    }
    return ClipSpec(
        frames=config.num_frames,
        frame_stride=_frame_stride(config.num_frames),
        crop=config.image_size,
        short_side=max(ClipSpec.short_side, config.image_size),
        **known,
    )


def _frame_stride(frames: int) -> int:
    return {8: 32, 16: 16, 96: 4}.get(frames, max(256 // frames, 1))


def adapted(source: Checkpoint, target: TimeSformerConfig, resize: str = "bicubic") -> Checkpoint:
    """The checkpoint as a model of another scheme, size, length or number of classes.

    Args:
      source: what there is.
      target: what shall be. Its attention may differ if the source is an image model or
        space-only: every attention of a block then starts as a copy of the spatial one, and every
        further linear layer at zero, so that the video model starts as the image model.
      resize: of the embeddings, "bicubic" (in two dimensions; linear in time), or "official", the
        release's nearest neighbours over the flattened patches, which scrambles space and is there
        for parity only.

    Raises:
      InputError: if the source cannot become the target.
    """
    config, params = source.config, dict(source.params)
    shapes = _shapes(target)
    if target.attention != config.attention:
        params = _image_to_video(params, config, target, shapes)
    labels = source.labels
    if target.num_classes != config.num_classes:
        logging.warning(
            "%s: its head of %d classes is replaced by a new one of %d",
            source.path, config.num_classes, target.num_classes,
        )  # fmt: skip
        params |= _new_head(target)
        labels = ()
    for name, before, after in (
        ("space", config.grid, target.grid),
        ("time", (config.num_frames,), (target.num_frames,)),
    ):
        path = f"embedding/{name}"
        if path in params and path not in shapes:
            logging.warning("%s: %s embedding dropped", source.path, name)
            del params[path]
        elif path in params and before != after:
            logging.warning(
                "%s: %s embedding resized (%s), %s to %s", source.path, name, resize, before, after
            )
            load = functools.partial(_resized, params[path].load, before, after, resize)
            params[path] = Stored(shapes[path], load)
        elif path in shapes and path not in params:
            params[path] = _zeros(shapes[path])  # which adds nothing, until it is trained
    clip = source.clip
    if target.num_frames != config.num_frames:
        clip = dataclasses.replace(
            clip, frames=target.num_frames, frame_stride=_frame_stride(target.num_frames)
        )
    if target.image_size != config.image_size:
        short_side = max(clip.short_side, target.image_size)
        clip = dataclasses.replace(clip, crop=target.image_size, short_side=short_side)
    return dataclasses.replace(source, config=target, params=params, clip=clip, labels=labels)


def _image_to_video(
    params: dict[str, Stored],
    config: TimeSformerConfig,
    target: TimeSformerConfig,
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, Stored]:
    if config.attention != "space":
        raise InputError(
            f"a {config.attention} model cannot become a {target.attention} one, only an image "
            "model or a space-only one can; leave attention out"
        )
    out = {path: value for path, value in params.items() if "/attention/" not in path}
    for path, shape in shapes.items():
        block, attention, step_and_part = path.partition("/attention/")
        if attention:
            part = step_and_part.partition("/")[2]
            copied = params.get(f"{block}/attention/spatial/{part}")
            out[path] = copied or _zeros(shape)
    return out


def _zeros(shape: tuple[int, ...]) -> Stored:
    return Stored(shape, functools.partial(np.zeros, shape, np.float32))


def _new_head(config: TimeSformerConfig) -> dict[str, Stored]:
    head = {f"head/{k}": np.asarray(v) for k, v in new_head(config).items()}
    return {path: Stored(value.shape, lambda value=value: value) for path, value in head.items()}


def _resized(load, before: tuple[int, ...], after: tuple[int, ...], resize: str) -> np.ndarray:
    """An embedding on another grid (rows, columns), or of another length (frames,)."""
    table, how = jnp.asarray(load()), "nearest" if resize == "official" else "bicubic"
    if len(before) == 1:
        return np.asarray(resize_time(table, after[0], how))
    if resize == "official":
        # The patches are resized as if they were a sequence: 196 to 784 takes patch i // 4.
        patches = resize_time(table[1:], math.prod(after), how)
        return np.asarray(jnp.concatenate([table[:1], patches]))
    return np.asarray(resize_space(table, before, after, how))
