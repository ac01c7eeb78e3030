"""Loads a config: a recipe by its name, a Python file, or the recipe.json of a run."""

from __future__ import annotations

import contextlib
import glob
import inspect
import json
import os
import pathlib
import runpy
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict

import timesformer_jax
from timesformer_jax.errors import InputError, did_you_mean
from timesformer_jax.recipes.recipes import recipe


def names() -> list[str]:
    """The recipes that have a name: the files of `folder`."""
    return sorted(path.stem for path in folder().glob("[!_]*.py"))


def folder() -> pathlib.Path:
    """The folder of the recipes: inside an installed package, beside a package in its project.

    The project's configs/ is the one source; setup.py maps it into the wheel.
    """
    package = pathlib.Path(timesformer_jax.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def load(source: str) -> ConfigDict:
    """Loads a config: calls `get_config` of a Python file, or reads the recipe.json of a run.

    Args:
      source: a recipe's name ("finetune"), or the path of a file; either may be followed by
        ":ARGUMENTS", which are passed to `get_config` as one string. "configs/NAME.py" is the
        recipe NAME also where there is no such folder.

    Raises:
      InputError: if there is no such file, or it raises an error. The message has the error's line.
    """
    path, _, arguments = source.partition(":")
    file = _find(path)
    try:
        if file.endswith(".json"):
            if arguments:
                raise InputError(f"a run's config takes no arguments; leave out :{arguments}")
            return _from_json(file)
        with _neighbours(os.path.dirname(os.path.abspath(file))):
            get_config = runpy.run_path(file).get("get_config")
            if not callable(get_config):
                raise InputError("it defines no get_config; docs/finetune.md has an example")
            if arguments and not inspect.signature(get_config).parameters:
                raise InputError(f"it takes no arguments; leave out :{arguments}")
            config = get_config(*([arguments] if arguments else []))
    except InputError as e:
        raise InputError(f"{path}: {e}") from e
    except (Exception, SystemExit) as e:  # a user's file can raise anything
        raise InputError(f"{path}{_line(e, file)}: {type(e).__name__}: {e}") from e
    if not isinstance(config, ConfigDict):
        raise InputError(f"{path}: get_config must return a ConfigDict, not {config!r}")
    return config


def _find(path: str) -> str:
    """The file that `path` names."""
    if os.path.isfile(path):
        return path
    given = pathlib.PurePath(path)
    is_name = given.name == path and not given.suffix
    if is_name or given.parts[:-1] == ("configs",):
        known = folder() / f"{given.stem}.py"
        if given.stem in names():
            return os.fspath(known)
    files = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "*.py"))
    known_names = names() if is_name else [f"configs/{name}.py" for name in names()]
    hint = did_you_mean(path, [*files, *known_names])
    listed = hint or (f"; there are: {', '.join(names())}" if is_name else "")
    what = "recipe" if is_name else "config file"
    raise InputError(f"there is no {what} {path}{listed}")


@contextlib.contextmanager
def _neighbours(directory: str) -> Iterator[None]:
    """Lets a config import the modules beside it, wherever the program was started.

    They are forgotten afterwards: another config's neighbour may have the same name.
    """
    before = set(sys.modules)
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        sys.path.remove(directory)
        for name in set(sys.modules) - before:
            if os.path.dirname(getattr(sys.modules[name], "__file__", None) or "") == directory:
                del sys.modules[name]


def _line(error: BaseException, path: str) -> str:
    """The line of the file in which an error was raised, for a message; "" if unknown."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f", line {error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    return f", line {lines[-1]}" if lines else ""


def _from_json(path: str) -> ConfigDict:
    """The config of a run, from the recipe.json in its workdir.

    Its values are all set: the data and the checkpoint of that run have changed them already.
    """
    try:
        with open(path) as f:
            fields = json.load(f)
        if not isinstance(fields, dict):
            raise ValueError("no JSON object")
    except ValueError as e:
        raise InputError(f"it is no recipe.json of a run ({e})") from None
    config = recipe()
    config.defaults = ConfigDict()
    given = traverse_util.flatten_dict(fields, sep=".")
    # These follow from other fields, and would cut the reference to them.
    for follows, leads in (
        ("model.num_frames", "clip.frames"),
        ("model.image_size", "clip.crop"),
        ("optimizer.epochs", "epochs"),
        ("eval.batch_size", "batch_size"),
    ):
        if leads in given and given.get(follows) == given[leads]:
            del given[follows]
    known = traverse_util.flatten_dict(config.to_dict(), sep=".")
    for name, value in given.items():
        if name not in known:
            raise InputError(f"no config field {name}{did_you_mean(name, known)}")
        group, _, last = name.rpartition(".")
        _set(config[group] if group else config, last, value, f"{path}: {name}")
    return config


def _set(group: ConfigDict, name: str, value: Any, what: str) -> None:
    before = group[name]
    try:
        group[name] = tuple(value) if isinstance(before, tuple) else value
    except TypeError:
        raise InputError(f"{what} must be like {before!r}, not {value!r}") from None
