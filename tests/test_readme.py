"""What the README says can be done."""

import re

from conftest import REPOSITORY

from timesformer_jax.cli import main as cli

README = (REPOSITORY / "README.md").read_text()


def test_the_python_lines_run_as_written():
    section = README.split("## In Python")[1].split("##")[0]
    code = "\n".join(re.findall(r"^    (.*)$", section, re.MULTILINE))
    names = {}
    exec(code, names)
    assert names["logits"].shape == (1, 400)
    assert names["features"].shape == (1, 768)


def test_every_command_flag_config_and_file_named_is_there():
    from absl import flags
    from ml_collections import ConfigDict

    from timesformer_jax import recipes

    for line in re.findall(r"^    timesformer ((?:.*\\\n)*.*)$", README, re.MULTILINE):
        name = line.split()[0]
        values = flags.FlagValues()
        for define in cli.COMMANDS[name].flags:
            define(values)
        for flag in re.findall(r"--([\w.]+)", line):
            if flag.startswith("config."):
                config: ConfigDict | object = recipes.recipe()
                for part in flag.split(".")[1:]:
                    assert part in config, flag
                    config = config[part]
            else:
                assert flag in values, flag
    for path in re.findall(
        r"\]\(((?!http)[^)]+)\)|--config=([^\s:`]+)|python (experiments/\S+\.py)", README
    ):
        assert (REPOSITORY / "".join(path)).exists(), path
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
