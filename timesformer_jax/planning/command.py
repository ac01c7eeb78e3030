"""`timesformer plan`: prints what a recipe needs of hardware.

timesformer plan --config=configs/k400_l.py --topology=v5e:4x4
"""

from __future__ import annotations

import copy
import os
import sys
from json import dumps
from typing import TYPE_CHECKING

from absl import logging

from timesformer_jax import storage
from timesformer_jax.errors import InputError
from timesformer_jax.planning.plan import make_plan
from timesformer_jax.planning.report import as_json, as_text

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def plan(
    config: ConfigDict,
    topology: str,
    find_batch: bool = False,
    find_frames: bool = False,
    quick: bool = False,
    memory: float | None = None,
    work: str = "training",
    json: str | None = None,
    hlo: str | None = None,
) -> None:
    """Prints the plan of a recipe. The other arguments are those of `make_plan`.

    Args:
      json: file for all figures.
      hlo: file for the text of the compiled program.

    Raises:
      InputError: as `make_plan`, if a file cannot be written, or if there is no compiled program to
        write.
    """
    for flag, path in {"json": json, "hlo": hlo}.items():
        if path and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or ".")):
            raise InputError(f"--{flag}={path} cannot be written: give a file in a folder that is")
    result = make_plan(
        _as_trained(config), topology, work=work, find_batch=find_batch, find_frames=find_frames,
        quick=quick, memory=memory,
    )  # fmt: skip
    print(as_text(result))
    if json:
        _write("json", json, dumps(as_json(result), indent=2))
    if hlo and result.text is None:
        raise InputError(f"--hlo={hlo} is not written: no program was compiled that fits")
    if hlo and result.text:
        _write("hlo", hlo, result.text)


def _as_trained(config: ConfigDict) -> ConfigDict:
    """The config with the shape of its pretrained checkpoint.

    This is a file or folder here, or a published video model; nothing is downloaded.
    """
    from timesformer_jax.checkpoints import catalogue, convert  # the planner itself reads none
    from timesformer_jax.checkpoints.sources import locate
    from timesformer_jax.recipes import fit

    if not (name := config.pretrained):
        return config
    if storage.absolute(name).exists():
        source = convert.open_checkpoint(locate(name))
        found = source.path, source.config, source.clip, source.is_image_model
    elif (known := catalogue.by_name(name.partition("@")[0])) and known.clip and known.model:
        found = name, known.model, known.clip, False
    else:
        logging.info("%s is not here: the recipe's own shape is planned", name)
        return config
    changes = fit.to_checkpoint(config, *found)
    for change in changes:
        logging.info("%s", change.reason)
    config = copy.deepcopy(config)
    fit.apply(config, changes)
    return config


def _write(flag: str, path: str, text: str) -> None:
    try:
        with open(path, "w") as f:
            f.write(text)
    except OSError as e:
        raise InputError(f"--{flag}={path} cannot be written: {e.strerror}") from e
    print(f"written: {path}", file=sys.stderr)
