"""The log of the command line: absl's, on the standard error, beside progress bars."""

from __future__ import annotations

import os
import sys
from logging import ERROR, WARNING, Handler, LogRecord

from absl import flags, logging
from tqdm import tqdm


def set_up(program: str) -> None:
    """Logs messages from INFO up, without those that libraries write about themselves."""
    flags.FLAGS([program])  # absl logs only after its flags are parsed; none of them is given
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold("info")
    logging.get_absl_handler().addFilter(_is_relevant)
    _pause_progress_bars(logging.get_absl_handler().python_handler)


def _is_relevant(record: LogRecord) -> bool:
    """Drops what libraries log about files, inferred options and deprecations of their own."""
    if "tensorflow_datasets" in record.pathname:
        return record.levelno >= WARNING and "deprecated" not in str(record.msg)
    if "orbax" in record.pathname:
        return record.levelno >= ERROR
    return record.levelno >= WARNING or f"{os.sep}jax{os.sep}" not in record.pathname


def _pause_progress_bars(handler: Handler) -> None:
    """Clears progress bars before the handler writes a line, and draws them again below it."""
    emit = handler.emit

    def emit_alone(record: LogRecord) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            emit(record)

    handler.emit = emit_alone  # type: ignore[method-assign]  # of this one handler
