"""Reads a checkpoint of any format as the model that the caller asks for."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import numpy as np
from absl import logging
from flax import traverse_util

from timesformer_jax.checkpoints import catalogue, files, schema, store
from timesformer_jax.checkpoints.catalogue import Pretrained
from timesformer_jax.checkpoints.checksums import check_finite
from timesformer_jax.checkpoints.convert.adapt import (
    RESIZES,
    adapt,
    frame_stride,
    lazy_new_head,
    parameter_shapes,
)
from timesformer_jax.checkpoints.convert.checkpoint import Checkpoint
from timesformer_jax.checkpoints.convert.formats import FORMATS, Format, hf
from timesformer_jax.checkpoints.files import LazyArray, WeightsFile
from timesformer_jax.checkpoints.sources import Located, locate
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.errors import InputError, did_you_mean
from timesformer_jax.models.timesformer import TimeSformerConfig

# Fields that the shapes of the arrays fix.
_FIXED = ("patch_size", "hidden_size", "depth", "mlp_ratio")


class SizeMismatch(InputError):
    """A checkpoint does not fit the requested model.

    Attributes:
      found: the fields that differ, with the checkpoint's values.
    """

    def __init__(self, found: dict[str, Any], requested: dict[str, Any]):
        differ = ", ".join(
            f"{name} is {value}, not {requested[name]}" for name, value in found.items()
        )
        super().__init__(f"its {differ}, which cannot be changed; ask for the checkpoint's own")
        self.found = found


def read(
    source: str | os.PathLike | Located,
    resize: str = "bicubic",
    *,
    revision: str | None = None,
    allow_nonfinite: bool = False,
    **overrides: Any,
) -> Checkpoint:
    """The checkpoint of a path or name, adapted to the overrides.

    Args:
      source: a file or directory of any format, or a name; see `sources.locate`.
      resize: "bicubic" or "official", see `adapt`.
      revision: of a name.
      allow_nonfinite: read parameters that are infinite or not a number.
      **overrides: fields of `TimeSformerConfig`.

    Raises:
      InputError: names the file, the array and what to do.
    """
    _check_options(resize, overrides)
    found = source if isinstance(source, Located) else locate(source, revision)
    checkpoint = open_checkpoint(found, overrides.get("num_heads"), allow_nonfinite)
    try:
        target = adapted(checkpoint, resize, **overrides)
        # Another head, size or length has another accuracy than the run tells.
        same = target.config == checkpoint.config
        return target if same else dataclasses.replace(target, step_folder=None)
    except InputError as e:
        e.args = (f"{found.source}: {e}",)
        raise


def open_checkpoint(
    found: Located, num_heads: int | None = None, allow_nonfinite: bool = False
) -> Checkpoint:
    """The checkpoint as it is. Arrays of files of other formats are not read yet.

    Args:
      found: of `sources.locate`.
      num_heads: for files that do not tell; by default heads of 64 channels.
      allow_nonfinite: read parameters that are infinite or not a number.

    Raises:
      InputError: as `read`.
    """
    if found.is_native:
        return _read_native(found.path, allow_nonfinite)
    return _read_external(found, num_heads, allow_nonfinite)


def adapted(source: Checkpoint, resize: str = "bicubic", **overrides: Any) -> Checkpoint:
    """The checkpoint adapted to the overrides; the arguments are those of `read`."""
    return adapt(source, _target(source, overrides), resize)


def _check_options(resize: str, overrides: dict[str, Any]) -> None:
    if resize not in RESIZES:
        raise InputError(f"resize must be one of {', '.join(RESIZES)}, not {resize!r}")
    known = [field.name for field in dataclasses.fields(TimeSformerConfig)]
    for name in overrides:
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are: {', '.join(known)}"
            raise InputError(f"no model field {name!r}{hint}")


def _target(source: Checkpoint, overrides: dict[str, Any]) -> TimeSformerConfig:
    names = (*_FIXED, "num_heads") if source.tells_heads else _FIXED
    fixed = {name: getattr(source.config, name) for name in names if name in overrides}
    if found := {name: value for name, value in fixed.items() if value != overrides[name]}:
        raise SizeMismatch(found, overrides)
    if source.is_image_model and "attention" not in overrides:
        overrides = {"attention": TimeSformerConfig.attention, **overrides}
        logging.warning(
            "%s: an image model; a %s one starts from it (attention=... chooses)",
            source.path, overrides["attention"],
        )  # fmt: skip
    return dataclasses.replace(source.config, **overrides)


def _read_native(path: str, allow_nonfinite: bool) -> Checkpoint:
    folder, metadata, params = store.load_step(path, allow_nonfinite=allow_nonfinite)
    flat = traverse_util.flatten_dict(params, sep="/")
    return Checkpoint(
        path=path,
        config=metadata.model,
        params={k: LazyArray(v.shape, functools.partial(np.asarray, v)) for k, v in flat.items()},
        clip=metadata.clip,
        labels=metadata.labels,
        license=metadata.license,
        license_note=metadata.license_note,
        multilabel=metadata.multilabel,
        training_config=metadata.config,
        step_folder=folder,
    )


def _read_external(found: Located, num_heads: int | None, allow_nonfinite: bool) -> Checkpoint:
    path = found.source
    file = files.read_file(found.path)
    try:
        format = _detect(file)
        file = file._replace(arrays=format.normalise(file.arrays))
        fields = format.config_fields(file)
        heads = fields.get("num_heads") or num_heads or _default_heads(path, fields["hidden_size"])
        is_image_model = "attention" not in fields
        config = TimeSformerConfig(**{"attention": "space"} | fields | {"num_heads": heads})
        params = _to_our_names(file.arrays, format, config, has_head="num_classes" in fields)
        if not allow_nonfinite:
            params = {name: _checked(path, name, array) for name, array in params.items()}
        labels = format.labels(file) if "num_classes" in fields else ()
        told = format.clip_fields(file)
        if labels and len(labels) != config.num_classes:
            raise InputError(
                f"it has {len(labels)} labels for a head of {config.num_classes} classes; correct "
                "them (id2label in config.json)"
            )
    except InputError as e:  # its text may quote names of the file
        raise InputError(f"{path}: {schema.printable(str(e))}") from None
    if "num_classes" not in fields:
        logging.warning("%s has no head: a new one of %d classes", path, config.num_classes)
        params |= lazy_new_head(config)
    known = found.known or (None if is_image_model else catalogue.authors_model(config))
    license, note = _license(file, known)
    return Checkpoint(
        path=path,
        config=config,
        params=params,
        clip=file.metadata.get("clip")
        or _clip(path, config, told, known, certain=bool(found.known)),
        labels=labels,
        license=license,
        license_note=note,
        multilabel=file.metadata.get("multilabel", False)
        or file.metadata.get("config", {}).get("problem_type") == hf.MULTILABEL,
        is_image_model=is_image_model,
        has_head="num_classes" in fields,
        tells_heads="num_heads" in fields,
    )


def _license(file: WeightsFile, known: Pretrained | None) -> tuple[str, str]:
    """The license of the weights, and how it is known; "" and "" if it is not."""
    if file.metadata.get("license") == "":  # our own file, of weights whose license is unknown
        return "", ""
    if license := file.metadata.get("license"):
        note = file.metadata.get("license_note") or "the file that was read says so"
        return schema.text(license, "license"), schema.text(note, "license_note")
    if known is None or not known.license:
        return "", ""
    return known.license, f"its names and shapes are those of {known.name} ({known.page})"


def _detect(file: WeightsFile) -> Format:
    for format in FORMATS:
        if format.detect(file.arrays):
            return format
    some = ", ".join(sorted(file.arrays)[:3])
    raise InputError(
        f"its names ({some}, ...) are of no known format: timm's or DeiT's, "
        f"{', '.join(format.name for format in FORMATS)}; rename them to timm's"
    )


def _default_heads(path: str, hidden_size: int) -> int:
    heads = max(hidden_size // 64, 1)
    if hidden_size % 64:
        logging.warning(
            "%s does not say how many heads it has: %d assumed for a width of %d; pass "
            "num_heads=... if that is wrong, or the outputs will be", path, heads, hidden_size,
        )  # fmt: skip
    return heads


def _to_our_names(
    arrays: dict[str, LazyArray], format: Format, config: TimeSformerConfig, has_head: bool
) -> dict[str, LazyArray]:
    """The arrays by our paths and in our layout.

    Raises:
      InputError: if an array is missing, left over or of another shape.
    """
    remaining, params = dict(arrays), {}
    shapes = parameter_shapes(config)
    for path, name in format.parameter_names(config).items():
        if not has_head and path.startswith("head/"):
            continue
        if name not in remaining:
            raise InputError(
                f"{name} is missing, which a {config.attention} model of {format.name} needs; the "
                "file is incomplete"
            )
        array = remaining.pop(name)
        # Only the shape is needed; an array broadcast from one zero takes no memory.
        expected = format.from_jax(path, np.broadcast_to(np.float32(0), shapes[path]), config).shape
        if tuple(array.shape) != expected:
            raise InputError(
                f"{name} has shape {tuple(array.shape)} where the file's other arrays ask for "
                f"{expected}; it cannot be resized"
            )
        params[path] = LazyArray(shapes[path], functools.partial(_load, format, path, array))
    if remaining:
        raise InputError(
            f"{next(iter(remaining))} has no place in a {config.attention} model "
            f"({len(remaining)} such arrays); remove them from the file if the model works "
            "without them"
        )
    return params


def _load(format: Format, path: str, array: LazyArray) -> np.ndarray:
    return format.to_jax(path, array.load())


def _checked(file: str, name: str, array: LazyArray) -> LazyArray:
    """The array; to load it raises an InputError if one of its numbers is not finite."""

    def load() -> np.ndarray:
        value = array.load()
        check_finite(file, name, value)
        return value

    return LazyArray(array.shape, load)


def _clip(
    path: str,
    config: TimeSformerConfig,
    told: dict[str, Any],
    known: Pretrained | None,
    certain: bool,
) -> ClipSpec:
    """The clips that a model expects.

    Args:
      path: of the checkpoint, for messages.
      config: of the model.
      told: fields of the clip that the file tells.
      known: the published model that this is; None for another.
      certain: whether it is known by its name, not only by its shape.
    """
    if known is None or known.clip is None:
        clip = ClipSpec(
            frames=config.num_frames,
            frame_stride=frame_stride(config.num_frames),
            crop=config.image_size,
            short_side=max(ClipSpec.short_side, config.image_size),
        )
        return dataclasses.replace(clip, **told)
    clip, theirs = dataclasses.replace(known.clip, **told), known.clip
    if (clip.mean, clip.std) != (theirs.mean, theirs.std):
        logging.warning(
            "%s: its preprocessor says mean %s and std %s; the authors trained with mean %s and "
            "std %s; %s are taken",
            path, clip.mean, clip.std, theirs.mean, theirs.std,
            "the authors'" if certain else "the file's",
        )  # fmt: skip
    return theirs if certain else clip
