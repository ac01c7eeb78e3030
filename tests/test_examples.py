"""The scripts of examples/ run, as their docstrings say."""

import forked
import pytest
from conftest import REPOSITORY, environment

pytestmark = pytest.mark.processes


def run(name, *arguments):
    path = str(REPOSITORY / "examples" / name)
    done = forked.run(forked.run_file, path, *map(str, arguments), environment=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_scheme_registered_from_outside_the_package():
    lines = run("custom_scheme.py").splitlines()
    assert lines[0] == "logits (2, 8)"
    # 8 frames of a 2 x 2 window and the token, then a frame and the token.
    assert lines[2].split()[:2] == ["window", str(8 * 4 + 1 + 196 + 1)]


def test_finetuned_from_python_and_then_predicted(demo_data, tmp_path):
    # What its command line does, with a smaller model and fewer epochs.
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY / "examples")!r})
import finetune
from timesformer_jax import recipes
recipe = recipes.finetune
def small(name):
    config = recipe(name)
    config.model.depth, config.model.hidden_size = 1, 16
    return config
recipes.finetune = small
finetune.main(*sys.argv[1:], epochs=2)
"""
    arguments = (str(demo_data), str(tmp_path / "run"))
    done = forked.run(forked.run_script, code, *arguments, environment=environment())
    assert done.returncode == 0, done.stderr
    assert "of 21 videos, step 16" in done.stdout
    video = demo_data / "videos" / "train" / "00000.mp4"
    lines = run("predict.py", tmp_path / "run", video).splitlines()
    assert len(lines) == 5
    shares = [float(line.split("%")[0]) for line in lines]
    assert shares == sorted(shares, reverse=True)
    assert 50 < sum(shares) <= 100.1
