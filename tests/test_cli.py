"""The command line: errors a person can cause are one line and status 2."""

import importlib.metadata
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, command, environment, tiny_run

import timesformer_jax
from timesformer_jax.cli.commands import COMMANDS
from timesformer_jax.cli.help import WAY
from timesformer_jax.cli.main import load_command, main
from timesformer_jax.data.records.open import open_split
from timesformer_jax.errors import DeviceLost
from timesformer_jax.tensorflow_messages import hide_tensorflow_messages

DEMO = REPOSITORY / "configs" / "demo.py"


def test_help_lists_commands_and_flags(timesformer):
    assert "evaluate" in timesformer("--help").stdout
    assert "--workdir" in timesformer("train", "--help").stdout
    assert "VIDEOS..." in timesformer("predict", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "no command 'trian'; did you mean 'train'?"),
        (["train", f"--config={DEMO}", "--workdir=x", "--config.batchsize=3"], ".batch_size?"),
        (["train", f"--config={DEMO}", "--workdir=/dev/null/x", "--config.data.demo=",
          "--config.data.directory=/nowhere"], "/nowhere"),
        (["convert", "/nowhere.pyth", "x"], "/nowhere.pyth"),
        (["predict", "x.mp4", "--checkpoint=/nowhere"], "/nowhere"),
        (["evaluate", "--checkpoint=/nowhere"], "/nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_errors_are_one_line(arguments, said, timesformer, tmp_path):
    done = timesformer(*arguments, check=False, fresh=True, cwd=tmp_path)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_a_kernel_made_useless_is_one_line(monkeypatch, capsys):
    def lose():
        raise DeviceLost("TPU v5 lite does not answer after the temporal attention 'flash'")

    monkeypatch.setattr("timesformer_jax.cli.main.load_command", lambda words: lose)
    monkeypatch.setattr("timesformer_jax.cli.log.set_up", lambda program: None)
    with pytest.raises(SystemExit) as ended:
        main(["timesformer", "train"])
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line == "error: TPU v5 lite does not answer after the temporal attention 'flash'"


def test_only_messages_of_tensorflow_are_hidden(capfd):
    remarks = "WARNING: All log messages before absl::InitializeLog() is called\nI0000 00:00 x\n"
    with hide_tensorflow_messages():
        os.write(2, f"{remarks}E0000 broken\n{remarks}said I0000".encode())
    print("after", file=sys.stderr)
    assert capfd.readouterr().err == "E0000 broken\nsaid I0000after\n"
    with pytest.raises(ImportError), hide_tensorflow_messages():
        import nothing_of_this_name  # noqa: F401
    os.write(2, b"I0000 is told again\n")
    assert capfd.readouterr().err == "I0000 is told again\n"


def test_failures_of_cuda_are_shown_where_there_is_a_gpu(capfd, monkeypatch, tmp_path):
    failed = "E0000 00:00:17.9  8 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error"
    for device, expected in ((tmp_path / "nvidia[0-9]", ""), (tmp_path, f"{failed}\n")):
        monkeypatch.setattr("timesformer_jax.tensorflow_messages._GPUS", [str(device)])
        with hide_tensorflow_messages():
            os.write(2, f"{failed}\n".encode())
        assert capfd.readouterr().err == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "needs --config"),
        (["train", f"--config={DEMO}"], "needs --workdir"),
        (["train", f"--config={DEMO}", "--workdir=x", "--config.model.dept=3"], ".model.depth?"),
        (["train", f"--config={DEMO}", "--workdir=x", "--config.batch_size=x"], "batch_size=x"),
        (["train", "--config=/nowhere.py", "--workdir=x"], "/nowhere.py"),
        (["train", "--wrokdir=x"], "workdir"),
        (["train", "word", f"--config={DEMO}", "--workdir=x"], "takes flags only, not 'word'"),
        (
            ["train", "finetune", "runs/a", "config.epochs=3"],
            "did you mean --config=finetune --workdir=runs/a --config.epochs=3?",
        ),
        (["prepare", "my_videos", "--output=x"], "did you mean --videos=my_videos?"),
        (["evaluate", "runs/a"], "did you mean --checkpoint=runs/a?"),
        (["predict", "a.mp4", "b.pyth"], "did you mean --checkpoint=b.pyth?"),
        (["check"], "give prepared directories to check, or the folder of --videos"),
        (["convert", "a.pyth"], "takes SRC DST, not 'a.pyth'"),
        (["prepare", "--videos=/nowhere", "--output=x"], "/nowhere"),
        (["predict", "--checkpoint=/nowhere"], "no video given"),
        (["evaluate", "--checkpoint=/nowhere", "--crops=2"], "crops"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_arguments_give_an_error(arguments, said, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_models_training_and_inference_need_no_tensorflow():
    code = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_datasets", "clu", "ml_collections",
                                  "torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import jax
import numpy as np
import timesformer_jax as tsf
import timesformer_jax.data.prepare.shards
import timesformer_jax.inference.predict
import timesformer_jax.training.optimizer
import timesformer_jax.training.step

model = tsf.create("timesformer_tiny", num_classes=3)
assert model(np.zeros((1, 2, 32, 32, 3), np.float32)).shape == (1, 3)
from timesformer_jax.cli.main import main
main(["timesformer", "train", "--config=configs/demo.py", "--workdir=/nowhere"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=environment(), cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "train needs the package ml_collections: pip install '.[data]'" in (done.stderr)


@pytest.fixture(scope="module")
def trained(demo_data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    from conftest import command

    arguments = tiny_run(demo_data, workdir, epochs=1, **{"eval.every_epochs": 0})
    subprocess.run(command(*arguments), env=environment(), check=True)
    return workdir


def test_predict_and_evaluate_agree_on_every_video(trained, demo_data, timesformer, tmp_path):
    """`evaluate` reads records through TensorFlow, `predict` the video files through PyAV."""
    import json

    results = f"--output={tmp_path / 'e.json'}"
    done = timesformer("evaluate", f"--checkpoint={trained}", results, fresh=True)
    found = json.loads((tmp_path / "e.json").read_text())
    at_training = json.loads((trained / "results.json").read_text())
    assert {k: found[k] for k in ("top1", "top5", "videos", "classes")} == {
        k: at_training[k] for k in ("top1", "top5", "videos", "classes")
    }
    assert f"of {found['videos']} videos, 1 x 3 views" in done.stdout

    rows = (demo_data / "videos" / "annotations.csv").read_text().splitlines()[1:]
    truth = {row.split(",")[0]: row.split(",")[1] for row in rows if row.endswith("validation")}
    videos = [demo_data / "videos" / name for name in truth]
    out = timesformer("predict", *videos, f"--checkpoint={trained}", "--top=1", fresh=True).stdout
    first = out.split("\n")[1::2]
    right = sum(line.split()[1] == label for line, label in zip(first, truth.values()))
    # Frames of records went through JPEG, so a close call may fall otherwise.
    assert abs(right / len(truth) - found["top1"]) <= 2 / len(truth)


def test_predict_gives_the_evaluated_probabilities(trained, demo_data):
    from timesformer_jax.checkpoints import store as checkpoints
    from timesformer_jax.data.input import pipeline
    from timesformer_jax.evaluation.step import make_probabilities
    from timesformer_jax.inference.predictor import Predictor

    split = open_split(demo_data, "validation")
    metadata, params = checkpoints.load_parameters(trained)
    batch = next(pipeline.eval_batches(split, metadata.clip, batch_size=8, views=2, crops=3))
    evaluated = make_probabilities(metadata.model, metadata.clip)(
        params, batch["frames"], batch["crop_boxes"]
    )
    predictor = Predictor(trained, views=2, crops=3)
    for row in range(8):
        predicted = predictor.probabilities(demo_data / "videos" / split.ids[batch["record"][row]])
        assert np.abs(predicted - evaluated[row]).max() < 0.03
        assert predicted.sum() == pytest.approx(1, abs=1e-5)


def test_evaluating_on_other_labels_is_refused(trained, tmp_path, refusal):
    from timesformer_jax.data.demo import make as demo
    from timesformer_jax.data.prepare.prepare import prepare

    demo.make_videos(tmp_path / "videos", train=2, validation=2)
    annotations = tmp_path / "videos" / "annotations.csv"
    annotations.write_text(annotations.read_text().replace("down-right", "sideways"))
    prepare(tmp_path / "videos", tmp_path / "data", annotations=annotations, short_side=40)
    said = refusal("evaluate", f"--checkpoint={trained}", f"--data={tmp_path / 'data'}")
    assert "the data has 2 labels (right, sideways), the checkpoint 8" in said


def test_a_workdir_is_a_checkpoint_for_conversion_too(trained, tmp_path):
    import timesformer_jax as tsf
    from timesformer_jax.checkpoints.convert import convert

    convert(trained, tmp_path / "hf", to="hf")
    video = np.random.default_rng(0).normal(size=(1, 8, 32, 32, 3)).astype(np.float32)
    ours, theirs = tsf.from_pretrained(trained), tsf.from_pretrained(tmp_path / "hf")
    assert np.array_equal(ours(video), theirs(video))


def test_output_that_nobody_reads_on_is_no_error():
    listing = subprocess.Popen(
        command("--help"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    listing.stdout.close()
    _, errors = listing.communicate()
    assert listing.returncode == 141
    assert b"BrokenPipe" not in errors


def test_the_program_alone_shows_the_way(capsys):
    """Each step is a line that the parser takes, in the order in which one goes."""
    load_command([])()
    shown = capsys.readouterr().out
    steps = [line.split()[1] for line in shown.splitlines() if line.startswith("  timesformer ")]
    assert steps == ["check", "prepare", "train", "evaluate", "predict"]
    for line in WAY.replace("\n   ", " ").strip().splitlines():
        words = shlex.split(line.split("   ")[0])[1:]
        known = COMMANDS[words[0]].define_flags()
        assert all(word[2:].split("=")[0].split(".")[0] in known for word in words if "--" in word)
    assert max(map(len, shown.splitlines())) <= 120


def test_the_version_names_what_computes(capsys):
    load_command(["--version"])()
    shown = capsys.readouterr().out
    assert shown.startswith(f"timesformer {timesformer_jax.__version__} (jax ")
    assert f"flax {importlib.metadata.version('flax')}" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predit", "a.mp4"], "did you mean 'predict'"),
        (["benchmark", "atention"], "did you mean 'benchmark attention'"),
        (["zzz"], "there are: prepare, check, train"),
        (["predict", "a\0b.mp4", "--checkpoint=x"], "null byte"),
        (["check", "x" * 100_000], "there is no folder xxx"),
        (["convert", "y" * 5000, "z"], "yyy"),
        (["check", "--videos=/dev/null"], "no folder /dev/null"),
        (["prepare", "--videos=.", f"--output={'o' * 300}"], "holds no video file"),
        (["evaluate", "--checkpoint=x", "--output=."], "."),
    ],
)
def test_impossible_words_give_a_short_one_line_error(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["timesformer", *words])
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert len(line) < 2100
