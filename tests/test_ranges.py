"""Every number of the command line and of the recipes has a range, and is held to it."""

import ast
import dataclasses
import math

import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from timesformer_jax import ranges
from timesformer_jax.checkpoints.metadata import flatten_config
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.errors import InputError
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.ranges import RANGES, Range
from timesformer_jax.recipes import recipe

IMPOSSIBLE = (math.nan, math.inf, -math.inf, 1e308, 1e300, -1e300, 10**20, -(10**20), "1", None)


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def test_every_number_of_a_recipe_has_a_range_that_holds_it():
    fields = flatten_config(recipe().to_dict())
    for name, value in fields.items():
        if name.startswith("defaults."):  # the values of other fields
            assert value == fields[name.removeprefix("defaults.")]
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        if all(map(is_number, numbers)):
            allowed = ranges.range_of(name)
            assert allowed is not None, name
            assert all(number in allowed for number in numbers), name


def test_every_number_of_the_command_line_has_a_range():
    """`integer` and `number` take it from the table; a default must lie in it."""
    files = (REPOSITORY / "timesformer_jax" / "cli" / "commands").glob("*.py")
    found = 0
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("integer", "number"):
            name, default = (ast.literal_eval(argument) for argument in node.args[:2])
            assert default is None or default in RANGES[name], name
            found += 1
    assert found > 30


@pytest.mark.parametrize("name", RANGES)
def test_no_range_holds_an_impossible_value(name):
    for value in IMPOSSIBLE:
        with pytest.raises(InputError) as raised:
            ranges.check(name, value)
        assert str(raised.value).startswith(f"{name} must be ")
        assert len(str(raised.value)) < 200


@given(st.floats(allow_nan=True), st.sampled_from(sorted(RANGES)))
def test_a_number_is_in_a_range_as_its_words_say(value, name):
    allowed = RANGES[name]
    inside = allowed.low <= value <= allowed.high
    inside &= not (allowed.above and value == allowed.low)
    inside &= not (allowed.below and value == allowed.high)
    inside |= allowed.also is not None and value == allowed.also
    assert (value in allowed) == (inside and not allowed.whole)


def test_ranges_in_words():
    assert str(Range(1, 1_000_000, whole=True)) == "a whole number from 1 to 1,000,000"
    assert str(Range(0, 1, above=True)) == "a number above 0 and at most 1"
    assert str(Range(0, 1, below=True)) == "a number from 0 to below 1"
    assert str(Range(0.001, 1000, also=0)) == "a number from 0.001 to 1,000, or 0"
    assert str(Range(0, 1, above=True, below=True)) == "a number above 0 and below 1"


@pytest.mark.parametrize("kind", [TimeSformerConfig, ClipSpec])
def test_fields_of_model_and_clip_must_lie_in_their_ranges(kind):
    for field in dataclasses.fields(kind):
        if is_number(field.default):
            for value in (v for v in IMPOSSIBLE if isinstance(v, type(field.default))):
                with pytest.raises(InputError, match=field.name):
                    kind(**{field.name: value})


@pytest.mark.parametrize(
    "change",
    ["seed=-1", "optimizer.momentum=nan", "optimizer.reference_batch_size=0",
     "optimizer.reference_batch_size=-64", "model.mlp_ratio=1e300",
     "batch_size=7777777777777777777",
     "eval.views=7777777", "data.fps=-1", "clip.frame_stride=0", "optimizer.weight_decay=inf",
     "optimizer.decay_epochs=1.0,nan", "model.drop_path=1", "mesh.tensor=0", "epochs=0",
     "eval.crops=2", "name=../../x", "name=a/b"],
)  # fmt: skip
def test_a_field_outside_is_refused_before_work_begins(change, refusal, tmp_path):
    name, _, _ = change.partition("=")
    said = refusal(
        "train", f"--config={REPOSITORY / 'configs' / 'k400_base.py'}",
        f"--workdir={tmp_path / 'run'}", f"--config.{change}",
    )  # fmt: skip
    assert name in said
    assert " must be " in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        "prepare --videos=a --output=b --fps=nan", "prepare --videos=a --output=b --fps=1e300",
        "prepare --videos=a --output=b --store_stride=99999999999999999999",
        "prepare --videos=a --output=b --segment_seconds=1e-300",
        "prepare --videos=a --output=b --workers=99999", "check a --decode_fraction=nan",
        "evaluate --checkpoint=a --batch_size=7777777", "evaluate --checkpoint=a --fps=-inf",
        "predict a.mp4 --checkpoint=b --top=0", "predict a.mp4 --checkpoint=b --start=-1",
        "predict a.mp4 --checkpoint=b --end=1e308", "predict a.mp4 --checkpoint=b --views=1e3",
        "convert a b --num_heads=0", "benchmark attention --minutes=nan",
    ],
)  # fmt: skip
def test_a_flag_outside_is_refused_with_its_range(words, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refusal(*words.split())
    assert words.split()[-1] in said
    assert "it must be a " in said
    assert list(tmp_path.iterdir()) == []
