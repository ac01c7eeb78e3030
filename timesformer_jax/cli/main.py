"""`timesformer <command>`: one table of commands. Errors that a person can cause are one line."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from logging import ERROR, WARNING, Handler, LogRecord
from typing import Any, NamedTuple, NoReturn

from absl import flags, logging
from tqdm import tqdm

from timesformer_jax.errors import InputError

Define = Callable[[flags.FlagValues], Any]

_REMARK = re.compile(rb"WARNING: All log messages before absl::InitializeLog|I0000 ")


def _flag(kind: Callable, name: str, default: Any, text: str, **more: Any) -> Define:
    return lambda values: kind(name, default, text, flag_values=values, **more)


def _string(name: str, default: str | None, text: str) -> Define:
    return _flag(flags.DEFINE_string, name, default, text)


def _integer(name: str, default: int | None, text: str, least: int = 0) -> Define:
    return _flag(flags.DEFINE_integer, name, default, text, lower_bound=least)


def _list(name: str, text: str) -> Define:
    return _flag(flags.DEFINE_list, name, None, text)


def _number(name: str, default: float | None, text: str) -> Define:
    return _flag(flags.DEFINE_float, name, default, text, lower_bound=0.0)


def _fraction(name: str, default: float, text: str) -> Define:
    return _flag(flags.DEFINE_float, name, default, text, lower_bound=0.0, upper_bound=1.0)


CONFIG = _string(
    "config",
    None,
    "a recipe, configs/k400_base.py or configs/k400_base.py:ARGUMENT=VALUE,...;"
    " --config.FIELD=VALUE changes a field of it",
)


class Command(NamedTuple):
    """A command: what it does, the function that does it, and the flags that are its arguments.

    `function` is "module:name"; it gets the flags by name. `words` names the arguments that are no
    flags: one each, or as many as there are for one that ends in "...".
    """

    summary: str
    function: str
    flags: Sequence[Define]
    required: Sequence[str] = ()
    words: Sequence[str] = ()


CHECKPOINT = _string("checkpoint", None, "a run's --workdir, WORKDIR/best, or one step of it")
VIEWS = (
    _integer("views", 1, "clips along each video, their probabilities averaged", least=1),
    _integer("crops", 3, "3 squares of each clip (left, centre, right), or 1", least=1),
)
MEASURING = (
    _string("dtype", None, "float32 or bfloat16; by default bfloat16, on a CPU float32"),
    _number("seconds", 60.0, "skips what is predicted to run longer"),
    _number("minutes", 5.0, "after which nothing more begins"),
    _number("memory", None, "GiB; what the device has"),
    _string("json", None, "file for all figures"),
)
PROCESSES = (
    _string("coordinator", None, "host:port of process 0; by default what the cluster tells"),
    _integer("num_processes", None, "processes of this run, likewise", least=1),
    _integer("process_id", None, "which of them this is, from 0, likewise"),
    _number("startup_seconds", None, "to wait for all processes; by default 300"),
    _number("heartbeat_seconds", None, "of silence after which a process is lost; by default 60"),
)

COMMANDS = {
    "prepare": Command(
        "videos to TFRecord shards that training reads",
        "timesformer_jax.data.prepare.prepare:prepare",
        (
            _string("videos", None, "folder of videos: a folder a class, or as --annotations says"),
            _string("output", None, "folder to write the data set to"),
            _string(
                "annotations",
                None,
                "csv with columns path,label[,start,end,split]; or the"
                " folder of the files that the publisher of --dataset gives",
            ),
            _string(
                "dataset",
                None,
                "kinetics400, kinetics600, something_v2, diving48, howto100m,"
                " ucf101 or hmdb51; by default your own",
            ),
            _string("labels", None, "file of class names, one a line; by default those found"),
            _string("name", None, "name of the data set, for its files"),
            _integer("short_side", 256, "pixels that the short side is scaled to", least=1),
            _integer("quality", 90, "JPEG quality of the stored frames", least=1),
            _number(
                "fps", None, "frames a second to resample to; by default as the video has them"
            ),
            _integer(
                "store_stride",
                None,
                "store every n-th frame only; by default 4 for Kinetics and HowTo100M, else 1",
                least=1,
            ),
            _number(
                "segment_seconds",
                None,
                "cut clips into equal records of about so many seconds; by"
                " default 8.53 for HowTo100M, else whole",
            ),
            _integer("clips_per_shard", 32, "clips a file, at most", least=1),
            _integer("workers", 0, "processes; 0 for one a core"),
            _fraction("validation_fraction", 0.1, "share held out where no split is given"),
            _integer("max_failures", None, "end when more clips than this cannot be decoded"),
            _string("runner", "local", "local, or beam for Apache Beam"),
            _string("beam_options", "", "of Beam, '--runner=DataflowRunner --project=p ...'"),
        ),
        required=("videos", "output"),
    ),
    "check": Command(
        "finds what is wrong with prepared directories, or with videos before that",
        "timesformer_jax.data.check.check:check",
        (
            _string("videos", None, "folder of videos to check, in place of prepared directories"),
            _string("annotations", None, "of the videos, as prepare takes them"),
            _string("dataset", None, "of the videos, as prepare takes it"),
            _string("labels", None, "of the videos, as prepare takes them"),
            _fraction("decode_fraction", 0.05, "of the clips, whose frames are decoded too"),
            _integer("workers", 0, "threads, or for videos processes; 0 for one a core"),
            _string("output", None, "csv file for the videos that cannot be used, and why"),
        ),
        words=("directories...",),
    ),
    "train": Command(
        "trains a recipe, or goes on with it, and evaluates",
        "timesformer_jax.training.loop:train_and_report",
        (CONFIG, _string("workdir", None, "folder for checkpoints, logs and results"), *PROCESSES),
        required=("config", "workdir"),
    ),
    "evaluate": Command(
        "accuracy of a checkpoint over a prepared split",
        "timesformer_jax.evaluation.multi_view:evaluate_checkpoint",
        (
            CHECKPOINT,
            _string("data", None, "folder of records, or tfds:NAME; by default its training data"),
            _string("split", None, "by default the one its config evaluates on"),
            _flag(flags.DEFINE_float, "fps", None, "frame rate of records that do not say theirs"),
            *VIEWS,
            _integer("batch_size", None, "videos at a time; by default the config's", least=1),
            _string("output", None, "JSON file for the results"),
            *PROCESSES,
        ),
        required=("checkpoint",),
    ),
    "predict": Command(
        "the most probable classes of video files",
        "timesformer_jax.inference.predict:predict",
        (
            CHECKPOINT,
            *VIEWS,
            _number("start", None, "look at the part of each video from here, in seconds"),
            _number("end", None, "up to here"),
            _integer("top", 5, "classes to print", least=1),
        ),
        required=("checkpoint",),
        words=("videos...",),
    ),
    "plan": Command(
        "what a recipe needs of hardware that need not be there: memory, time, largest batch",
        "timesformer_jax.planning.command:plan",
        (
            CONFIG,
            _string("topology", None, "v5e:4x4, v5p:2x2x4, v6e:4x4, h100:8, cpu:8"),
            _flag(flags.DEFINE_bool, "find_batch", False, "search the largest batch that fits"),
            _flag(flags.DEFINE_bool, "quick", False, "TPU: compile sooner, optimising less"),
            _number("memory", None, "GiB a chip; its own"),
            _string("json", None, "file for all figures"),
        ),
        required=("config", "topology"),
    ),
    "convert": Command(
        "convert a checkpoint to our format, Hugging Face's or the release's",
        "timesformer_jax.checkpoints.convert:convert",
        (
            _string("to", "native", "native, hf (a transformers directory) or release (.pyth)"),
            _string("resize", "bicubic", "of position embeddings: bicubic, or official"),
            _string("labels", None, "file of class names, one a line, in the order of the logits"),
            _string("attention", None, "scheme, where an image ViT becomes a video model"),
            _integer("num_heads", None, "heads, where the file does not tell", least=1),
            _integer("num_classes", None, "start a new head of so many classes", least=1),
            _integer("num_frames", None, "resize the time embedding", least=1),
            _integer("image_size", None, "resize the position embedding", least=1),
        ),
        words=("src", "dst"),
    ),
    "benchmark input": Command(
        "clips a second that the data gives, and where the time goes",
        "timesformer_jax.benchmark.input:benchmark_input",
        (
            _string("data", None, "folder of records, or tfds:NAME; by default the config's"),
            _string("synthetic", None, "folder for videos to make, prepare and measure on"),
            _string("split", "train", "of the data"),
            CONFIG,
            _integer("frames", None, "frames of a clip; 8 where there is no --config", least=1),
            _integer("frame_stride", None, "distance between them at 30 fps; 32", least=1),
            _integer("crop", None, "side of a clip in pixels; 224", least=1),
            _flag(
                flags.DEFINE_list,
                "short_side_range",
                None,
                "range of the scaled short side; 256,320",
            ),
            _integer("batch_size", None, "clips; 16", least=1),
            _integer("batches", 200, "to measure", least=1),
            _flag(flags.DEFINE_bool, "reference", False, "compare with simplejpeg and OpenCV"),
            _string("json", None, "file for the figures"),
        ),
    ),
    "benchmark attention": Command(
        "time and memory of every attention scheme by length and size of the clip",
        "timesformer_jax.benchmark.attention:benchmark_attention",
        (
            _list("schemes", "divided, joint, ...; by default all"),
            _list("frames", "of the clips; by default 8,16,32,64,96"),
            _list("sides", "of the clips, in pixels; by default 224,336,448,560"),
            _string("preset", "timesformer_base", "the model"),
            _integer("depth", None, "blocks; by default the preset's", least=1),
            _integer("batch_size", 1, "clips a run", least=1),
            _flag(flags.DEFINE_bool, "quick", False, "one block, up to 32 frames of 224"),
            _flag(
                flags.DEFINE_bool,
                "autotune",
                False,
                "first find the fastest kernels, which programs then use",
            ),
            *MEASURING,
        ),
    ),
    "benchmark model": Command(
        "clips a second, memory and MFU of inference and of the training step, by batch size",
        "timesformer_jax.benchmark.model:benchmark_model",
        (
            _list("presets", "by default timesformer_base"),
            _list("workloads", "by default inference,training"),
            _list("batch_sizes", "by default 1, 2, 4, ... while the rate grows"),
            _string("remat", "none", "of the training step: none, outputs, block or offload"),
            *MEASURING,
        ),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0, 2 for what a person can put right, 143 after SIGTERM."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's remarks on the machine
    argv = list(sys.argv if argv is None else argv)
    flags.FLAGS(argv[:1])  # absl's own flags: none is given, and logging waits for them
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold("info")
    logging.get_absl_handler().addFilter(_is_for_people)
    _step_aside_for(logging.get_absl_handler().python_handler)
    try:
        run = _command(argv[1:])
        _keep_memory()
        run()
        sys.stdout.flush()
    except InputError as e:
        _fail(str(e))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `timesformer predict ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _keep_memory() -> None:
    if "jax" in sys.modules:  # else the command computes nothing
        importlib.import_module("timesformer_jax.host_memory").keep_freed()


def _command(argv: Sequence[str]) -> Callable[[], None]:
    """What the words ask for, its module loaded and its flags read, to be called."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        return functools.partial(print, _overview())
    name, rest = _named(argv)
    command = COMMANDS[name]
    values = flags.FlagValues()
    try:
        for define in command.flags:
            define(values)
        if {"-h", "--help", "-help"} & set(rest):
            return functools.partial(print, _help(name, command, values))
        arguments = _parse(name, command, values, rest)
        module, function = command.function.split(":")
        with _without_remarks():
            run = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as e:
        if e.name and e.name.startswith("timesformer_jax"):
            raise
        _fail(f"{name} needs the package {e.name}: pip install '.[data]' in the project's folder")
    return functools.partial(run, **arguments)


def _named(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The command, of one word or two (`benchmark input`), and what follows it."""
    for words in (2, 1):
        if (name := " ".join(argv[:words])) in COMMANDS:
            return name, argv[words:]
    group = [name for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    said = " ".join(argv[: 2 if group else 1])
    _fail(f"no command {said!r}; there are: {', '.join(group or COMMANDS)}")


def _parse(
    name: str, command: Command, values: flags.FlagValues, rest: Sequence[str]
) -> dict[str, Any]:
    """The command's keyword arguments, or the end of the program in one line."""
    try:
        # The fields of a config are flags too, once it is loaded.
        words = values([name, *rest], known_only=True)
        if "config" in values and values["config"].value is not None:
            from timesformer_jax.cli import config_flag as config_file  # needs ml_collections

            words = config_file.parse("config", values["config"].value, words, values)
        else:
            words = values(words)
    except (flags.Error, InputError) as e:
        _fail(f"timesformer {name}: {e}")
    for flag in command.required:
        if values[flag].value is None:
            _fail(f"timesformer {name} needs --{flag} ({values[flag].help})")
    # A config's overrides (config.batch_size) are flags too, but no arguments.
    arguments = {
        flag: values[flag].value
        for flag in values
        if "." not in flag and values[flag].value is not None
    }
    return arguments | _words(name, command, words[1:])


def _words(name: str, command: Command, words: Sequence[str]) -> dict[str, Any]:
    if command.words and command.words[0].endswith("..."):
        return {command.words[0].removesuffix("..."): list(words)}
    if len(words) != len(command.words):
        takes = " ".join(command.words).upper() or "flags only"
        _fail(f"timesformer {name} takes {takes}, not {' '.join(words) or 'nothing'!r}")
    return dict(zip(command.words, words))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: timesformer <command> [--flag=value ...]", "", *lines, "",
         "timesformer <command> --help lists a command's flags."]
    )  # fmt: skip


def _help(name: str, command: Command, values: flags.FlagValues) -> str:
    words = "".join(f" {word.upper()}" for word in command.words)
    lines = [f"usage: timesformer {name}{words} [--flag=value ...]: {command.summary}", ""]
    for flag in values:
        default = values[flag].default
        end = " (required)" if flag in command.required else f" (default: {default})"
        lines.append(
            f"  --{flag}: {values[flag].help}{'' if default is None and end[2] == 'd' else end}"
        )
    return "\n".join(lines)


def _step_aside_for(handler: Handler) -> None:
    """Has progress bars cleared while the handler writes a line, and drawn again below it."""
    emit = handler.emit

    def emit_alone(record: LogRecord) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            emit(record)

    handler.emit = emit_alone  # type: ignore[method-assign]  # of this one handler


def _is_for_people(record: LogRecord) -> bool:
    """Drops what libraries tell of themselves: files written, options inferred, own code's age."""
    if "tensorflow_datasets" in record.pathname:
        return record.levelno >= WARNING and "deprecated" not in str(record.msg)
    if "orbax" in record.pathname:
        return record.levelno >= ERROR
    return record.levelno >= WARNING or f"{os.sep}jax{os.sep}" not in record.pathname


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Drops what TensorFlow remarks on the machine while it is imported, at any level of logging.

    What else is written to the standard error meanwhile follows at the end.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as written, os.fdopen(os.dup(2), "wb") as errors:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(errors.fileno(), 2)
            written.seek(0)
            errors.writelines(line for line in written if not _REMARK.match(line))


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
