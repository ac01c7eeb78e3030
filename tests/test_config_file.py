"""--config and --config.FIELD: what changes a field, and what is refused in one line."""

import sys

import pytest
from conftest import REPOSITORY

from timesformer_jax.cli.commands import COMMANDS
from timesformer_jax.cli.config_flag import load
from timesformer_jax.cli.flags import parse
from timesformer_jax.errors import InputError
from timesformer_jax.recipes import fit

BASE = f"--config={REPOSITORY}/configs/k400_base.py"


def parsed(*words):
    command = COMMANDS["train"]
    return parse("train", command, command.define_flags(), ["--workdir=x", *words])["config"]


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--config.data.short_side_range=(448,512)"], "data.short_side_range", (448, 512)),
        (["--config.data.short_side_range=448,512"], "data.short_side_range", (448, 512)),
        (["--config.data.short_side_range", "[448, 512]"], "data.short_side_range", (448, 512)),
        (["--config.optimizer.decay_epochs=3,4"], "optimizer.decay_epochs", (3, 4)),
        (["--config.optimizer.learning_rate=1"], "optimizer.learning_rate", 1.0),
        (["--config.batch_size=8", "--config.batch_size=16"], "batch_size", 16),
        (["-config.batch_size", "8"], "batch_size", 8),
        (["--noconfig.data.flip"], "data.flip", False),
        (["--config.data.flip=false"], "data.flip", False),
        (["--config.data.directory=a=b:c,d"], "data.directory", "a=b:c,d"),
        (["--config.pretrained="], "pretrained", ""),
        (["--config.clip.frames=16"], "model.num_frames", 16),
    ],
)
def test_fields_are_changed(words, field, value):
    found = parsed(BASE, *words)
    for part in field.split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value)


def test_arguments_come_before_changes_wherever_they_stand():
    config = parsed("--config.clip.frame_stride=7", f"{BASE}:frames=16,attention=joint")
    assert (config.clip.frames, config.clip.frame_stride, config.model.attention) == (
        16,
        7,
        "joint",
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([BASE, "--config.optimizer.lr=1"], "did you mean --config.optimizer.learning_rate?"),
        ([BASE, "--config.lr=1"], "did you mean --config.optimizer.learning_rate?"),
        ([BASE, "--config.optimizer.wd=1"], "did you mean --config.optimizer.weight_decay?"),
        ([BASE, "--config.optimiser.momentum=1"], "did you mean --config.optimizer.momentum?"),
        ([BASE, "--config.batchsize=1"], "did you mean --config.batch_size?"),
        ([BASE, "--config.eval.batchsize=1"], "did you mean --config.eval.batch_size?"),
        ([BASE, "--noconfig.data.flipp"], "did you mean --config.data.flip?"),
        ([BASE, "--config.mesh.zzz=1"], "no config field mesh.zzz; there are: mesh.data"),
        ([BASE, "--config.batch_size.x=1"], "no config field batch_size.x"),
        ([BASE, "--config.eval=1"], "eval: it is a group; change one of --config.eval.batch_size"),
        (
            [BASE, "--config.data.short_side_range=256,x"],
            "data.short_side_range must be like 256,320, not 256,x",
        ),
        (
            [BASE, "--config.data.short_side_range=256.5,320"],
            "must be a whole number from 1 to 8,192, not 256.5",
        ),
        (
            [BASE, "--config.data.short_side_range=256", "--config.data.short_side_range=320"],
            "is given twice",
        ),
        ([BASE, "--config.data.short_side_range=256 320"], "Use commas instead of whitespace"),
        ([BASE, "--config.batch_size=8.5"], "--config.batch_size=8.5"),
        ([BASE, "--config.data.flip=maybe"], "--config.data.flip=maybe"),
        ([BASE, "--wrokdir=y"], "Did you mean: workdir"),
        ([f"{BASE}:frame=8"], "did you mean 'frames'?"),
        (["--config=configs/k400_bas.py"], "did you mean 'configs/k400_base.py'?"),
        (["--config=k400_bas"], "there is no recipe k400_bas; did you mean 'k400_base'?"),
        (["--config=config/k400_base.py"], "did you mean 'configs/k400_base.py'?"),
        (["--config=/nowhere/zzz.py"], "there is no config file /nowhere/zzz.py\n"),
        (["--config.batch_size=8"], "config.batch_size"),
    ],
)
def test_an_error_is_one_line(words, said, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(InputError) as error:
        parsed(*words)
    written = f"{error.value}\n"
    assert said in written
    assert written.startswith("timesformer train: ")
    assert written.count("\n") == 1
    assert "Traceback" not in written


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config():\n    return 1 / 0\n", "mine.py, line 2: ZeroDivisionError: division"),
        ("import nothing_of_that_name\n", "mine.py, line 1: ModuleNotFoundError: No module"),
        ("x = (\n", "mine.py, line 1: SyntaxError: '(' was never closed"),
        ("x = 1\n", "mine.py: it defines no get_config"),
        ("def get_config():\n    return {}\n", "mine.py: get_config must return a ConfigDict"),
        ("from timesformer_jax.models.presets import preset\n"
         "def get_config():\n    return preset('timesformer_bas')\n", "mine.py: no preset"),
    ],
)  # fmt: skip
def test_an_error_in_a_file_names_the_line(text, said, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        parsed(f"--config={path}")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_is_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("demo", "configs/demo.py", str(REPOSITORY / "configs" / "demo.py")):
        assert load(source).to_dict() == load("demo").to_dict()
    assert load("k400_base:frames=16").clip.frames == 16
    with pytest.raises(InputError, match=r"no recipe demos; did you mean 'demo'\?"):
        load("demos")
    with pytest.raises(
        InputError, match="no recipe zzz; there are: demo, demo_long, diving48_base, "
    ):
        load("zzz")
    (tmp_path / "demo").mkdir()  # a folder is no config
    assert load("demo").name == "demo"


def test_a_config_imports_its_neighbour_from_any_folder(tmp_path, monkeypatch):
    for folder, batch in (("a", 3), ("b", 5)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "common.py").write_text(f"BATCH = {batch}\n")
        (tmp_path / folder / "mine.py").write_text(
            "from timesformer_jax.recipes import demo\n"
            "def get_config():\n"
            "    import common\n"
            "    config = demo()\n    config.batch_size = common.BATCH\n    return config\n"
        )
    monkeypatch.chdir(tmp_path / "a")
    path = list(sys.path)
    assert load("mine.py").batch_size == 3
    assert load(str(tmp_path / "b" / "mine.py")).batch_size == 5
    assert sys.path == path
    assert "common" not in sys.modules


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it is no recipe.json of a run"),
        ("[]", "it is no recipe.json of a run"),
        ('{"batchsize": 3}', "no config field batchsize; did you mean 'batch_size'?"),
        ('{"clip": {"frames": "x"}}', "clip.frames must be like 8, not 'x'"),
        ('{"clip": {"mean": 5}}', "clip.mean must be like (0.45, 0.45, 0.45), not 5"),
    ],
)
def test_a_wrong_recipe_of_a_run_gives_a_one_line_error(text, said, tmp_path):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(InputError) as error:
        load(str(tmp_path / "recipe.json"))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_field_set_on_the_command_line_is_not_automatic():
    config = parsed("--config=finetune", "--config.data.flip=true", "--config.clip.frames=16")
    assert not {"data.flip", "clip.frames"} & fit.automatic(config)
    assert {"clip.frame_stride", "model.depth"} <= fit.automatic(config)
    with pytest.raises(InputError, match=r"no config field defaults\.data\.flip"):
        parsed("--config=finetune", "--config.defaults.data.flip=false")


def swept(*words):
    command = COMMANDS["sweep"]
    return parse("sweep", command, command.define_flags(), ["--workdir=x", *words])["configs"]


def test_a_sweep_has_a_config_for_each_combination():
    configs = swept(
        "--config=finetune", "--config.optimizer.learning_rate=1e-3,3e-3", "--config.epochs=2",
        "--config.data.short_side_range=(256,320),(224,256)", "--config.clip.mean=0.4,0.5,0.6",
    )  # fmt: skip
    found = {n: (c.optimizer.learning_rate, c.data.short_side_range) for n, c in configs.items()}
    assert found == {
        f"learning_rate={rate},short_side_range={size}": (float(rate), eval(size))
        for rate in ("1e-3", "3e-3")
        for size in ("(256,320)", "(224,256)")
    }
    assert all((c.epochs, c.clip.mean) == (2, (0.4, 0.5, 0.6)) for c in configs.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config=finetune"], "give several values of a field, as in"),
        (["--config.epochs=1,2"], "timesformer sweep: Unknown command line flag 'config.epochs'"),
        ([], "timesformer sweep needs --config"),
        (["--config=finetune", "--config.epochs=1,1"], "gives a value twice"),
        (["--config=finetune", "--config.epochs=1,x"], "--config.epochs=x"),
        (["--config=finetune", "--config.epoch=1,2"], "did you mean --config.epochs?"),
    ],
)
def test_an_impossible_sweep_gives_a_one_line_error(words, said):
    with pytest.raises(InputError) as error:
        swept(*words)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_without_arguments_says_so(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from timesformer_jax.recipes import demo\ndef get_config():\n    return demo()"
    )
    assert load(str(path)).batch_size == 32
    with pytest.raises(InputError, match="takes no arguments; leave out :frames=8"):
        load(f"{path}:frames=8")
