"""What the README says can be done."""

import re

import forked
import pytest
from conftest import REPOSITORY, environment

from timesformer_jax.cli.commands import COMMANDS

README = (REPOSITORY / "README.md").read_text()


@pytest.mark.processes
@pytest.mark.compiles
def test_the_python_lines_run_as_written():
    section = README.split("The network itself:")[1].split("##")[0]
    code = "\n".join(re.findall(r"^    (.*)$", section, re.MULTILINE))
    code += "\nprint(logits.shape, features.shape)"
    # A process of its own, as tests' quickly compiled programs take twice as long for a base model.
    done = forked.run(
        forked.run_script, code, environment=environment(optimised=True), cwd=REPOSITORY
    )
    assert done.stdout == "(1, 400) (1, 768)\n", done.stderr


def test_every_command_flag_config_and_file_named_is_there():
    from ml_collections import ConfigDict

    from timesformer_jax import recipes
    from timesformer_jax.recipes import files

    for line in re.findall(r"^    timesformer ((?:.*\\\n)*.*)$", README, re.MULTILINE):
        name = line.split()[0]
        values = COMMANDS[name].define_flags()
        for flag in re.findall(r"--([\w.]+)", line):
            if flag.startswith("config."):
                config: ConfigDict | object = recipes.recipe()
                for part in flag.split(".")[1:]:
                    assert part in config, flag
                    config = config[part]
            else:
                assert flag in values, flag
    for path in re.findall(r"\]\(((?!http)[^)]+)\)|python (experiments/\S+\.py)", README):
        assert (REPOSITORY / "".join(path)).exists(), path
    for config in re.findall(r"--config=([^\s:`]+)", README):
        assert config in files.names() or (REPOSITORY / config).exists(), config
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
