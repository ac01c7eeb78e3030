"""Bad command lines and configs: words that people mistype, and values that nothing can take."""

import contextlib
import io

from hypothesis import strategies as st

from timesformer_jax.cli import main as cli
from timesformer_jax.cli.commands import COMMANDS
from timesformer_jax.recipes import recipe

VALUES = (
    *("", "nan", "inf", "-inf", "1e308", "1e-308", "-1", "0", "-0.0", "1e300", "9" * 20),
    *(
        "9" * 400,
        "-" + "9" * 20,
        "0x10",
        "1_000",
        "٣",
        "1,2",
        "1;2",
        "None",
        "True",
        "null",
        "[]",
        "{}",
        "()",
    ),
    *("..", ".", "/", "../../etc/passwd", "/dev/null", "/dev/stdin/x", "~", "*", "a" * 300),
    *("a/" * 3000, "a\0b", "\udcff", "é", "名前", "\x1b[31m", "%s%n", "{0}", "$(id)", "`id`", "-"),
    *(
        "--",
        "--help=x",
        "gs://",
        "http://127.0.0.1:9/x",
        "file:///etc/passwd",
        "tfds:",
        "tfds:../x",
    ),
    *("/dev/zero", "tfds:no_such", "\n", " ", "'", '"', "\\", "config.py:", ":", "=", "@file"),
)
FIELDS = tuple(
    f"{group}.{name}" if group else name
    for group in ("", "model", "data", "optimizer", "clip", "eval", "mesh", "augment", "checkpoint")
    for name in (recipe()[group] if group else recipe())
)


@st.composite
def command_lines(draw) -> list[str]:
    """A command with flags and arguments, at least one of them wrong."""
    name = draw(
        st.sampled_from([*COMMANDS, "", "trian", "--", "benchmark", "-x", "prepare prepare"])
    )
    words = name.split(" ")
    flags = ["nonsense", "config"]
    command = COMMANDS.get(name)
    if command is not None:
        flags += list(command.define_flags())
        for required in command.required:
            if draw(st.booleans()):
                words.append(f"--{required}={draw(st.sampled_from(VALUES))}")
    value = st.sampled_from(VALUES) | st.text(max_size=20) | st.floats().map(str)
    for _ in range(draw(st.integers(1, 4))):
        match draw(st.integers(0, 3)):
            case 0:
                words.append(draw(value))
            case 1:
                words.append(f"--{draw(st.sampled_from(flags))}")
            case 2:
                words.append(f"--config.{draw(st.sampled_from(FIELDS))}={draw(value)}")
            case 3:
                words.append(f"--{draw(st.sampled_from(flags))}={draw(value)}")
    return words


@st.composite
def training_lines(draw, recipe_file: str, workdir: str) -> list[str]:
    """A run of a recipe, one field of which has an impossible value."""
    words = ["train", f"--config={recipe_file}", f"--workdir={workdir}"]
    words.append(f"--config.data.directory={draw(st.sampled_from(('/nowhere', workdir, '.')))}")
    for field in draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3, unique=True)):
        words.append(f"--config.{field}={draw(st.sampled_from(VALUES))}")
    return words


# Configs with an error in them, and what the message must name.
CONFIGS = {
    "syntax.py": ("def get_config(:\n", "line 1"),
    "name.py": ("import math\n\ndef get_config():\n    return nothing\n", "line 4"),
    "exit.py": ("raise SystemExit(7)\n", "line 1"),
    "quit.py": ("def get_config():\n    exit()\n", "line 2"),
    "assert.py": ("\n\nassert False\n", "line 3"),
    "deep.py": ("def f():\n    f()\n\ndef get_config():\n    f()\n", "line "),
    "none.py": ("def get_config():\n    return None\n", "ConfigDict"),
    "empty.py": ("", "get_config"),
    "number.py": ("get_config = 3\n", "get_config"),
    "binary.py": ("\x00\x01\x02", "binary.py"),
    "latin.py": ("# \udce9\nx = 1\n", "latin.py"),
    "import.py": ("import no_such_module\n", "line 1"),
    "bare.py": (
        "from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict()\n",
        "no field",
    ),
    "text.py": (
        "from timesformer_jax.recipes import finetune\n\ndef get_config():\n"
        "    config = finetune()\n    config.unlock()\n    del config['optimizer']\n"
        "    return config\n",
        "no field optimizer",
    ),
    "type.py": (
        "from timesformer_jax.recipes import finetune\n\ndef get_config():\n"
        "    config = finetune()\n    config.epochs = 'many'\n    return config\n",
        "line 5",
    ),
}


def write_configs(folder) -> None:
    for name, (text, _) in CONFIGS.items():
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))


def run(words: list[str]) -> tuple[int, str, str]:
    """Runs a command line in this process: its exit status, output and errors.

    Other exceptions than SystemExit go through: a person would see a traceback.
    """
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(["timesformer", *words])
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
    return status, out.getvalue(), err.getvalue()
