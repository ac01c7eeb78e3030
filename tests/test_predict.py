"""Predictor, `timesformer predict` and `timesformer features`, with a tiny model."""

import csv
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY, command, environment
from videos import write_video

import timesformer_jax as tsf
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.store import save_parameters
from timesformer_jax.cli.main import main
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.inference import clips as clips_lib
from timesformer_jax.inference.appended import AppendedFile
from timesformer_jax.inference.feature_table import GrowingTable
from timesformer_jax.inference.sources import Source, find
from timesformer_jax.models.timesformer import parameters
from timesformer_jax.storage import check_output
from timesformer_jax.transforms.preprocess import preprocess

SPEC = ClipSpec(frames=4, frame_stride=4, crop=16, short_side=24)
LABELS = ("jump", "run", "sit")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "run"
    model = tsf.create(
        "timesformer_tiny", num_classes=3, image_size=16, num_frames=4, hidden_size=16, depth=2,
        num_heads=2,
    )  # fmt: skip
    params = parameters(model)
    save_parameters(path, params, CheckpointMetadata(model.config, SPEC, LABELS, {}))
    return str(path)


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return tsf.Predictor(checkpoint, views=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five videos in class folders, of three sizes; one is broken."""
    root = tmp_path_factory.mktemp("videos")
    for i, size in enumerate([(48, 32), (32, 48), (48, 32), (64, 24)]):
        path = root / LABELS[i % 2] / f"{i}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_video(path, frames=20 + 12 * i, width=size[0], height=size[1])
    (root / "run" / "broken.mp4").write_bytes(b"no video")
    return root


@pytest.fixture(scope="module")
def good(folder):
    return [str(path) for path in sorted(folder.rglob("?.mp4"))]


def run(*arguments):
    """The exit status of a command line in this process."""
    try:
        main(["timesformer", *map(str, arguments)])
    except SystemExit as end:
        return end.code
    return 0


# ---- Predictor ----------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_model_alone(predictor, good):
    """Every view and crop by itself, through the unjitted model, in plain NumPy afterwards."""
    clips = clips_lib.read(good[0], SPEC, views=2)
    assert clips.frames.shape[:2] == (2, 4)
    model = jax.jit(lambda video: predictor.model(video))
    total = 0
    for frames in clips.frames:
        for box in clips.crop_boxes:
            [logits] = model(preprocess(frames[None], jnp.asarray(box[None]), SPEC))
            total += np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum() / 6
    assert np.abs(predictor.probabilities(good[0]) - total).max() < 1e-5
    [first, second] = predictor.predict(good[0], top=2)
    assert first.label == LABELS[total.argmax()]
    assert first.probability == pytest.approx(total.max(), abs=1e-5)
    assert second.probability <= first.probability
    assert repr(first) == f"{first.label} {first.probability:.1%}"


def test_clips_tell_when_their_frames_are_shown(good):
    clips = clips_lib.read(good[0], SPEC, views=2, start=0.1, end=0.6)
    assert clips.times.min() >= 0.1
    assert clips.times.max() < 0.6
    assert (np.diff(clips.times) > 0).all()
    frames, fps = tsf.decode(good[0])
    in_memory = clips_lib.read(frames, SPEC, views=2, start=0.1, end=0.6, fps=fps)
    assert np.abs(clips.times - in_memory.times).max() < 1e-6


def test_a_list_a_path_a_file_and_frames_give_the_same(predictor, good, checkpoint):
    alone = np.stack([predictor.probabilities(path) for path in good])
    assert np.abs(alone[0] - alone[1]).max() > 1e-3
    batched = tsf.Predictor(checkpoint, views=2, batch_size=3)  # a video's clips in two batches
    assert np.abs(batched.probabilities(good) - alone).max() < 1e-5
    assert batched.probabilities([]).shape == (0, 3)
    with open(good[0], "rb") as file:
        assert np.array_equal(predictor.probabilities(file), alone[0])
        assert not file.closed
    pipe, write = os.pipe()
    content = pathlib.Path(good[0]).read_bytes()
    threading.Thread(target=lambda: (os.write(write, content), os.close(write))).start()
    with open(pipe, "rb") as file:
        assert np.array_equal(predictor.probabilities(file), alone[0])
    # FFmpeg scales the colours of the file and those of RGB frames with other rounding.
    decoded = tsf.decode(good[0])
    both = predictor.probabilities([decoded, good[1]])
    assert np.abs(both - alone[:2]).max() < 0.02
    assert np.array_equal(predictor.probabilities(decoded.frames, fps=decoded.fps), both[0])


def test_a_sampled_clip_is_taken_as_it_is(checkpoint):
    predictor = tsf.Predictor(checkpoint, crops=1)
    clip = np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), np.uint8)
    video = preprocess(clip[None], np.array([[0.0, 0, 24]]), SPEC)
    [logits] = jax.jit(predictor.model.__call__)(video)
    found = predictor.probabilities(clip)
    assert np.abs(found - jax.nn.softmax(logits)).max() < 1e-5


@pytest.mark.parametrize(
    ("video", "fps", "said"),
    [
        (np.zeros((4, 24, 24, 3), np.float32), 30, "(255 * frames).round().astype('uint8')"),
        (np.zeros((4, 24, 24, 3), np.int64), 30, "frames.astype('uint8')"),
        (np.zeros((4, 3, 24, 24), np.uint8), 30, "frames.transpose(0, 2, 3, 1)"),
        (np.zeros((2, 4, 24, 24, 3), np.uint8), 30, "list(frames)"),
        (np.zeros((0, 24, 24, 3), np.uint8), 30, "(0, 24, 24, 3)"),
        (np.zeros((9, 24, 24, 3), np.uint8), None, "fps=..."),
        (np.zeros((9, 24, 24, 3), np.uint8), 0, "fps=..., above 0; not 0"),
        (b"content", None, "io.BytesIO"),
        (io.StringIO("text"), None, "open(path, 'rb')"),
    ],
    ids=lambda value: str(getattr(value, "shape", type(value).__name__)),
)
def test_frames_that_cannot_be_used_are_refused_with_what_to_do(predictor, video, fps, said):
    with pytest.raises(tsf.InputError) as raised:
        predictor.predict(video, fps=fps)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_part_without_a_frame_is_said_as_of_files():
    with pytest.raises(tsf.InputError, match=r"^no frame from 5 s to the end: there are 0\.1 s$"):
        clips_lib.part(np.zeros((4, 24, 24, 3), np.uint8), 30, 5, None)


def test_videos_that_cannot_be_decoded_are_named(predictor, good, folder):
    with pytest.raises(tsf.VideoError, match=r"broken\.mp4: "):
        predictor.predict([good[0], folder / "run" / "broken.mp4"])
    with pytest.raises(tsf.VideoError, match=r"nowhere\.mp4: missing file"):
        predictor.predict("nowhere.mp4")


def test_threads_get_what_one_thread_gets(predictor, good):
    expected = predictor.probabilities(good)
    found = {}

    def work(number):
        path = good[number % len(good)]
        found[number] = predictor.probabilities(path), predictor.features(path).video

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(12):
        assert np.array_equal(found[number][0], expected[number % len(good)])


def test_features_are_what_the_head_reads(predictor, good, checkpoint):
    found = predictor.features(good[1], frames=True, positions=True)
    assert repr(found) == (
        "Features(video=(16,), clips=(2, 3, 16), frames=(2, 3, 4, 16), positions=(2, 3, 4, 16))"
    )
    assert np.allclose(found.video, found.clips.mean(axis=(0, 1)), atol=1e-6)
    head = tsf.from_pretrained(checkpoint).head
    logits = found.clips @ np.asarray(head.kernel[...]) + np.asarray(head.bias[...])
    classes = (np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)).mean(axis=(0, 1))
    assert np.abs(classes - predictor.probabilities(good[1])).max() < 1e-5
    # Both are means of the same patches; and the patches of the first frame by hand.
    assert np.allclose(found.frames.mean(axis=2), found.positions.mean(axis=2), atol=1e-5)
    clips = clips_lib.read(good[1], SPEC, views=2)
    video = predictor.inputs(clips.frames[1], clips.crop_boxes)
    tokens = jax.jit(predictor.model.tokens)(video)
    assert np.allclose(tokens.patches[2, 0].mean(axis=0), found.frames[1, 2, 0], atol=1e-5)
    assert predictor.features(good[1]).frames is None


def test_labels_must_be_as_many_as_classes(checkpoint):
    assert tsf.Predictor(checkpoint, labels=("a", "b", "c")).labels == ("a", "b", "c")
    with pytest.raises(tsf.InputError, match="2 labels for a checkpoint of 3 classes"):
        tsf.Predictor(checkpoint, labels=("a", "b"))


def test_the_python_lines_of_the_readme(checkpoint, good, capsys):
    section = (REPOSITORY / "README.md").read_text().split("## In Python")[1]
    code = "\n".join(re.findall(r"^    (.*)$", section.split("The network")[0], re.MULTILINE))
    names: dict = {}
    exec(code.replace("runs/mine", checkpoint).replace("new.mp4", good[0]), names)
    assert capsys.readouterr().out.count("%") == 3
    assert names["vector"].shape == (16,)


# ---- the videos of a command line ---------------------------------------------------------------


def test_folders_and_globs_are_searched(tmp_path):
    for name in (
        "a/x.mp4",
        "a/deep/y.MOV",
        "b/z.webm",
        "b/notes.txt",
        "b/.hidden.mp4",
        "frames/1.jpg",
        "frames/2.jpg",
        "empty/readme",
    ):
        (tmp_path / "v" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "v" / name).touch()  # fmt: skip
    root = tmp_path / "v"

    def names(*given):
        return [os.path.relpath(s.path, root) for s in find([str(root / g) for g in given])]

    everything = ["a/deep/y.MOV", "a/x.mp4", "b/z.webm"]
    assert names("") == everything
    assert {s.label for s in find([str(root)])} == {"a", "b"}
    assert [s.label for s in find([str(root / "a")])] == ["", ""]  # x.mp4 is in no class folder
    assert names("**/*.mp4") == ["a/x.mp4"]
    assert sorted(names("**")) == everything
    assert names("*") == everything  # folders that fit; `empty` has no video
    assert names("b/notes.txt", "b/notes.txt", "gone.mp4") == ["b/notes.txt", "gone.mp4"]
    assert names("frames") == ["frames"]
    for given, said in (("empty", "holds no video"), ("*.avi", "in a glob")):
        with pytest.raises(tsf.InputError, match=said):
            names(given)
    (root / "b" / "out.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    with pytest.raises(tsf.InputError, match="add --follow"):
        names("b")
    assert len(find([str(root / "b")], follow=True)) == 2


# ---- predict ------------------------------------------------------------------------------------


def test_predict_prints_text_json_and_csv(checkpoint, folder, good, predictor, capsys):
    flags = [folder, f"--checkpoint={checkpoint}", "--views=2", "--top=2"]
    expected = {path: predictor.predict(path, top=2) for path in good}

    assert run("predict", *flags) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == str(folder / "jump" / "0.mp4")
    assert printed.out.splitlines()[1].split()[1] == expected[good[0]][0].label
    errors = [line for line in printed.err.splitlines() if not line.startswith("I")]
    assert errors[0].startswith(f"{folder / 'run' / 'broken.mp4'}: ")
    assert errors[-1] == "error: 1 of 5 videos could not be read; they are named above"

    assert run("predict", *flags, "--json") == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["video"] for line in lines] == good
    assert lines[0]["views"] == 2
    for line in lines:
        for found, best in zip(line["predictions"], expected[line["video"]], strict=True):
            assert found["label"] == best.label
            assert found["probability"] == pytest.approx(best.probability, abs=1e-6)

    assert run("predict", *flags, "--csv") == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["video"] for row in rows] == good
    assert [row["label_2"] for row in rows] == [expected[path][1].label for path in good]


def test_predict_shows_classes_above_a_threshold(checkpoint, good, predictor, tmp_path, capsys):
    p = predictor.probabilities(good[0])
    threshold = float(np.sort(p)[-2:].mean())  # between the two most probable classes
    flags = [good[0], f"--checkpoint={checkpoint}", "--views=2", f"--threshold={threshold}"]
    for name in ("x.csv", "x.jsonl"):
        for _ in range(2):  # the second run has nothing to do
            assert run("predict", *flags, f"--output={tmp_path / name}") == 0
    assert "1 of 1 videos already" in capsys.readouterr().err
    [line] = map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())
    assert [found["label"] for found in line["predictions"]] == [LABELS[p.argmax()]]
    [row] = csv.DictReader(io.StringIO((tmp_path / "x.csv").read_text()))
    assert [row[f"label_{i}"] for i in (1, 2, 3)] == [LABELS[p.argmax()], "", ""]


def test_predict_takes_labels_from_a_file(checkpoint, good, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("eins\nzwei\ndrei\n")
    labels = f"--labels={tmp_path / 'labels.txt'}"
    assert run("predict", good[0], f"--checkpoint={checkpoint}", labels) == 0
    printed = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in printed[1:]} == {"eins", "zwei", "drei"}


@pytest.mark.processes
def test_a_killed_run_leaves_whole_lines_and_the_next_goes_on(checkpoint, good, tmp_path, capsys):
    output = tmp_path / "found.jsonl"
    # The same videos by many names, so that there is time to kill.
    names = []
    for i in range(300):
        names.append(tmp_path / "videos" / f"{i:03}.mp4")
        names[-1].parent.mkdir(exist_ok=True)
        os.link(good[i % len(good)], names[-1])
    flags = [tmp_path / "videos", f"--checkpoint={checkpoint}", f"--output={output}"]
    process = subprocess.Popen(
        command("predict", *flags), env=environment(), stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (output.exists() and output.read_bytes().count(b"\n")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = [json.loads(line)["video"] for line in output.read_text().splitlines()]
    assert 0 < len(done) < 300
    with output.open("a") as file:  # as if it had been killed within a line
        file.write('{"video": "/half')

    assert run("predict", *flags, "--workers=2") == 0
    assert f"has {len(done)} of 300 videos already" in capsys.readouterr().err
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["video"] for line in lines] == list(map(str, names))
    for one, same in zip(lines, lines[len(good) :]):
        assert one["predictions"] == same["predictions"]

    content = output.read_bytes()
    assert run("predict", *flags) == 0  # nothing is left to do
    for more, said in (
        ("--crops=1", "crops=3, not 1"),
        ("--top=2", "--top=3"),
        ("--csv", "holds something else"),
    ):
        assert run("predict", *flags, more) == 2
        assert said in capsys.readouterr().err
    assert output.read_bytes() == content
    (tmp_path / "labels.txt").write_text("eins\nzwei\ndrei\n")
    assert run("predict", *flags, f"--labels={tmp_path / 'labels.txt'}") == 2
    assert "predictions with classes=" in capsys.readouterr().err


def test_files_of_other_programs_are_not_touched(tmp_path):
    for name, content in (("notes", b"no line end"), ("a.mp4", b"\0\1\2"), ("b", b"x\n{\n")):
        (tmp_path / name).write_bytes(content)
        with (
            pytest.raises(tsf.InputError, match="holds something else"),
            AppendedFile(tmp_path / name, '{"video": "'),
        ):
            pass
        assert (tmp_path / name).read_bytes() == content
    with AppendedFile(tmp_path / "new", "a,b\n") as file:
        file.append("a,b")
        with (
            pytest.raises(tsf.InputError, match="another run"),
            AppendedFile(tmp_path / "new", "a,b\n"),
        ):
            pass
    with AppendedFile(tmp_path / "new", "a,b\n") as file:
        assert file.lines == ["a,b"]
    with pytest.raises(tsf.InputError, match="cannot write"):
        AppendedFile(tmp_path / "no" / "folder", "").__enter__()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--json", "--csv"], "exclude each other"),
        (["--output=x.txt"], "give --json or --csv"),
        (["--labels=/nowhere"], "/nowhere"),
    ],
    ids=str,
)
def test_what_predict_refuses(checkpoint, good, flags, said, refusal):
    assert said in refusal("predict", good[0], f"--checkpoint={checkpoint}", *flags)


# ---- features -----------------------------------------------------------------------------------


def test_tables_hold_the_features_with_ids_and_labels(
    checkpoint, folder, good, predictor, tmp_path, capsys
):
    import pyarrow.parquet

    flags = [folder, f"--checkpoint={checkpoint}", "--views=2", "--frames", "--positions"]
    assert run("features", *flags, f"--output={tmp_path / 'f.npz'}") == 1  # one is broken
    assert run("features", *flags, f"--output={tmp_path / 'f.parquet'}") == 1
    capsys.readouterr()
    assert run("features", *flags, f"--output={tmp_path / 'f.npz'}", "--end=0.2") == 2
    assert "features of other settings" in capsys.readouterr().err
    table = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pydict()
    with np.load(tmp_path / "f.npz") as arrays:
        assert list(arrays["id"]) == table["id"] == good
        assert list(arrays["label"]) == table["label"] == ["jump", "jump", "run", "run"]
        assert np.isnan(arrays["start"]).all()
        for i, path in enumerate(good):
            found = predictor.features(path, frames=True, positions=True)
            for name in ("clips", "frames", "positions"):
                assert np.allclose(arrays[name][i], getattr(found, name), atol=1e-5)
                assert np.array_equal(arrays[name][i], np.float32(table[name][i]))
            assert np.allclose(arrays["features"][i], found.video, atol=1e-5)
            assert np.array_equal(arrays["features"][i], np.float32(table["features"][i]))
        assert json.loads(str(arrays["settings"]))["settings"]["views"] == 2
    assert not [path for path in tmp_path.iterdir() if "part" in path.name]


def test_names_of_any_bytes_are_text_in_every_output(checkpoint, good, tmp_path, capfd):
    """A name that is not UTF-8, and one with a line break; each run is gone on with."""
    folder = os.fsencode(tmp_path) + b"/videos"
    os.mkdir(folder)
    names = [b"a\xff.mp4", b"b\nc.mp4"]
    for name in names:
        shutil.copy(os.fsencode(good[0]), folder + b"/" + name)
    expected = [f"{tmp_path}/videos/{name}" for name in ("a\\udcff.mp4", "b\\nc.mp4")]
    flags = [tmp_path / "videos", f"--checkpoint={checkpoint}", "--crops=1"]
    for kind in ("csv", "jsonl"):
        output = tmp_path / f"found.{kind}"
        for _ in range(2):
            assert run("predict", *flags, f"--output={output}") == 0
        assert "has 2 of 2 videos already" in capfd.readouterr().err
        with open(output, encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file) if kind == "csv" else map(json.loads, file)
            assert [row["video"] for row in rows] == expected
    import pyarrow.parquet

    for _ in range(2):
        assert run("features", *flags, f"--output={tmp_path / 'f.parquet'}") == 0
    assert "has 2 of 2 videos already" in capfd.readouterr().err
    table = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pydict()
    assert table["id"] == table["path"] == expected


def test_impossible_arguments_are_refused_before_the_work(
    checkpoint, good, refusal, tmp_path, monkeypatch
):
    monkeypatch.setattr("timesformer_jax.host_memory.physical_memory", lambda: 1 << 30)
    flags = [good[0], f"--checkpoint={checkpoint}"]
    long = tmp_path / f"{'x' * 250}.json"
    assert "is too long" in refusal("timeline", *flags, f"--output={long}")
    with pytest.raises(tsf.InputError, match="null byte"):
        check_output("--output", f"{tmp_path}/a\0.json")
    said = refusal("predict", *flags, "--batch_size=1000000", "--views=1")
    assert "GiB: lower --batch_size" in said
    said = refusal("features", *flags, "--batch_size=1000000", f"--output={tmp_path / 'a.npz'}")
    assert "GiB: lower --batch_size" in said
    assert list(tmp_path.iterdir()) == []
    predictor = tsf.Predictor(checkpoint, crops=1)
    for label in ("9" * 5000, "1" + "0" * 30):
        with pytest.raises(tsf.InputError, match="has no class"):
            predictor.attention(good[0], label)
    with pytest.raises(tsf.InputError, match="leave it out"):
        tsf.from_pretrained(checkpoint, revision="main")


def test_features_of_annotated_clips(checkpoint, folder, tmp_path):
    rows = [
        "path,label,start,end,split",
        "jump/0.mp4,up,0.1,0.5,train",
        "run/1.mp4,up,,,validation",
    ]
    (tmp_path / "clips.csv").write_text("\n".join(rows))
    output = tmp_path / "f.npz"
    flags = [f"--checkpoint={checkpoint}", f"--output={output}"]
    assert run("features", folder, f"--annotations={tmp_path / 'clips.csv'}", *flags) == 0
    with np.load(output) as arrays:
        assert list(arrays["id"]) == ["jump/0.mp4#0.1-0.5", "run/1.mp4"]
        assert list(arrays["split"]) == ["train", "validation"]
        assert list(arrays["label"]) == ["up", "up"]
        part = tsf.Predictor(checkpoint).features(folder / "jump/0.mp4", start=0.1, end=0.5)
        assert np.allclose(arrays["features"][0], part.video, atol=1e-5)


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_a_table_goes_on_after_a_killed_run_and_grows(kind, tmp_path):
    output = str(tmp_path / f"f.{kind}")
    settings, shapes = {"views": 1}, {"features": (3,), "clips": (1, 2, 3)}
    draws = np.random.default_rng(0)
    expected = {
        name: {"features": draws.normal(size=3), "clips": draws.normal(size=(1, 2, 3))}
        for name in "abcdef"
    }

    def append(table, *names):
        for name in names:
            arrays = {key: np.float32(x) for key, x in expected[name].items()}
            table.append(Source(name, f"{name}.mp4", start=1.5 if name == "b" else None), arrays)

    with GrowingTable(output, settings, shapes) as table:
        append(table, "a", "b")  # and is killed here, in the middle of the third row
    with open(f"{output}.part/clips.f32", "ab") as file:
        file.write(b"\1\2\3\4\5")
    with open(f"{output}.part/rows.jsonl", "a") as file:
        file.write('{"id": "c", ')
    with GrowingTable(output, settings, shapes) as table:
        assert table.ids == {"a", "b"}
        append(table, "c", "d")
        assert table.finish() == 4
    with GrowingTable(output, settings, shapes) as table:  # a complete table grows
        assert table.ids == set("abcd")
        append(table, "e", "f")
        assert table.finish() == 6
    with GrowingTable(output, settings, shapes) as table:
        assert table.finish() == 6  # nothing to do
    if kind == "npz":
        with np.load(output) as arrays:
            found = dict(arrays)
    else:
        import pyarrow.parquet

        found = pyarrow.parquet.read_table(output).to_pydict()
    assert list(found["id"]) == list("abcdef")
    assert found["start"][1] == 1.5
    assert np.isnan(found["start"][0])
    for i, name in enumerate("abcdef"):
        for key, array in expected[name].items():
            assert np.array_equal(np.float32(found[key][i]), np.float32(array))
    assert os.listdir(tmp_path) == [f"f.{kind}"]
    with (
        pytest.raises(tsf.InputError, match="other settings"),
        GrowingTable(output, {"views": 2}, shapes),
    ):
        pass


def test_a_run_killed_while_it_removes_the_folder_keeps_the_table(tmp_path, monkeypatch):
    output = str(tmp_path / "f.npz")
    shapes = {"features": (3,)}
    row = {"features": np.zeros(3, np.float32)}

    class Killed(BaseException):
        pass

    def remove_one_file(folder, **_):
        if os.path.isdir(folder):
            os.remove(os.path.join(folder, "features.f32"))
            raise Killed

    with GrowingTable(output, {}, shapes) as table:
        table.append(Source("a", "a.mp4"), row)
        with monkeypatch.context() as patch:
            patch.setattr("shutil.rmtree", remove_one_file)
            with pytest.raises(Killed):
                table.finish()
    with GrowingTable(output, {}, shapes) as table:
        assert table.ids == {"a"}
        table.append(Source("b", "b.mp4"), row)
        assert table.finish() == 2
    assert os.listdir(tmp_path) == ["f.npz"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--output=f.txt"], ".parquet, .npz"),
        (["--output=gs://b/f.npz"], "on a disk"),
        (["--output=/no/where/f.npz"], "does not exist"),
        (["--output=f.npz", "--dataset=ucf101"], "--annotations"),
    ],
    ids=str,
)
def test_what_features_refuses(good, flags, said, refusal):
    assert said in refusal("features", good[0], "--checkpoint=/nowhere", *flags)


# ---- without noise ------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_predictor_in_python_prints_nothing(checkpoint, good):
    code = (
        "import sys, timesformer_jax as tsf; predictor = tsf.Predictor(sys.argv[1])\n"
        "print(predictor.predict(sys.argv[2:], top=1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, checkpoint, *good[:2]],
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.startswith("[[")
    assert done.stdout.count("%") == 2


def test_image_models_have_features_and_no_classes(good, tmp_path):
    goldens = os.path.join(os.path.dirname(__file__), "data", "goldens", "timm_vit.pth")
    with pytest.raises(tsf.InputError, match="image model, and knows no classes of videos"):
        tsf.Predictor(goldens)
    found = tsf.Predictor(goldens, needs_head=False, crops=1).features(good[0])
    assert np.isfinite(found.video).all()
