"""Predictions as text, JSON Lines or CSV: one line a video, which says what it was made with."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

from timesformer_jax import storage
from timesformer_jax.errors import InputError
from timesformer_jax.inference.predictor import Prediction

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What predictions depend on beside the video. Every line has it.

    Attributes:
      checkpoint: as it was given.
      weights: `Predictor.fingerprint`.
      views, crops: as in `Predictor`.
      start, end: seconds, of every video; None: no bound.
      threshold: least probability of a class; None: no bound.
      classes: a CRC of their names, which --labels may change.
    """

    checkpoint: str
    weights: str
    views: int | str
    crops: int
    start: float | None
    end: float | None
    threshold: float | None = None
    classes: int = 0


def choose_format(as_json: bool, as_csv: bool, output: str | None) -> str:
    """ "json", "csv", or "text" for reading, which has no file.

    Raises:
      InputError: both are asked for, or the name of the output does not say which.
    """
    if as_json and as_csv:
        raise InputError("--json and --csv exclude each other; give one of them")
    if as_json or as_csv:
        return "json" if as_json else "csv"
    if output is None:
        return "text"
    if (extension := storage.extension(output)) not in FORMATS:
        raise InputError(f"--output={output}: give --json or --csv, or name it .jsonl or .csv")
    return FORMATS[extension]


@dataclasses.dataclass(frozen=True)
class Writer:
    """Makes the lines of one format, and reads what an earlier run wrote.

    Attributes:
      format: "text", "json" or "csv".
      settings: of this run.
      top: classes of a line; with a threshold the most.
    """

    format: str
    settings: Settings
    top: int

    @property
    def header(self) -> str | None:
        """The first line; None if the format has none."""
        if self.format != "csv":
            return None
        ranks = range(1, self.top + 1)
        columns = [name for i in ranks for name in (f"label_{i}", f"probability_{i}")]
        return _csv(["video", *columns, *_fields(self.settings)])

    @property
    def beginning(self) -> str:
        """Of every file of this format."""
        return '{"video": "' if self.header is None else f"{self.header}\n"

    def line(self, video: str, predictions: Sequence[Prediction]) -> str:
        """The line of a video; as text several lines."""
        if self.format == "text":
            return "\n".join([video, *(f"  {p:7.2%}  {label}" for label, p in predictions)])
        rounded = [(label, float(f"{p:.7g}")) for label, p in predictions]
        if self.format == "csv":
            empty = [("", "")] * (self.top - len(rounded))
            pairs = (x for pair in [*rounded, *empty] for x in pair)
            return _csv([video, *pairs, *_values(self.settings)])
        found = [{"label": label, "probability": p} for label, p in rounded]
        line = {"video": video, "predictions": found, **_fields(self.settings)}
        return json.dumps(line, ensure_ascii=False)

    def videos(self, path: str, lines: Sequence[str]) -> set[str]:
        """The videos of the lines of an earlier run.

        Raises:
          InputError: if it had other settings, or the lines are none of ours.
        """
        lines = lines if self.header is None else lines[1:]
        found = set()
        for number, line in enumerate(lines, start=1 if self.header is None else 2):
            try:
                video, settings, count = self._parsed(line)
            except (ValueError, KeyError, TypeError, csv.Error) as error:
                raise InputError(
                    f"{path} line {number} is no prediction; give another --output"
                ) from error
            if differing := [k for k, v in settings.items() if v != self._comparable[k]]:
                name = differing[0]
                raise InputError(
                    f"{path} has predictions with {name}={settings[name]}, not "
                    f"{self._comparable[name]}: give another --output, or remove it"
                )
            if count != self.top and (self.settings.threshold is None or count > self.top):
                raise InputError(
                    f"{path} has {count} classes a video, not {self.top}: give --top={count}, or "
                    "another --output"
                )
            found.add(video)
        return found

    @property
    def _comparable(self) -> dict[str, Any]:
        fields = _fields(self.settings)
        return (
            fields if self.format == "json" else dict(zip(fields, map(str, _values(self.settings))))
        )

    def _parsed(self, line: str) -> tuple[str, dict[str, Any], int]:
        """The video of a line, the settings, and the number of classes."""
        names = _fields(self.settings)
        if self.format == "json":
            fields = json.loads(line)
            return fields["video"], {k: fields[k] for k in names}, len(fields["predictions"])
        [row] = csv.reader([line], strict=True)
        if len(row) != 1 + 2 * self.top + len(names):
            raise ValueError(line)
        return row[0], dict(zip(names, row[-len(names) :])), self.top


def _fields(settings: Settings) -> dict[str, Any]:
    return dataclasses.asdict(settings)


def _values(settings: Settings) -> list[Any]:
    return ["" if value is None else value for value in _fields(settings).values()]


def _csv(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(values)
    return text.getvalue()
