"""Timelines of real videos joined into one, where it is known when each begins and ends."""

import contextlib
import io
import itertools
import json
import shutil
from fractions import Fraction

import av
import jax
import numpy as np
import pytest
from flax import nnx
from selenium.webdriver import ActionChains, Keys
from videos import damage

import timesformer_jax as tsf
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.store import save_parameters
from timesformer_jax.cli.main import load_command
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.decode import VideoError, VideoFile, decode
from timesformer_jax.data.encode import encode_mp4
from timesformer_jax.inference.timeline import page
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.timesformer import TimeSformer, parameters
from timesformer_jax.transforms.preprocess import preprocess

pytestmark = [pytest.mark.compiles, pytest.mark.decodes]

SECONDS = {"bikes": 10.0, "bigbuckbunny": 5.28, "carphone_pristine": 4.0}
LABELS = tuple(SECONDS)
CLIP = ClipSpec(frames=8, frame_stride=2, crop=32, short_side=40)  # of 0.53 s
MODEL = TimeSformerConfig(
    num_classes=3, image_size=32, num_frames=8, hidden_size=32, depth=1, num_heads=2
)
FPS = 30

# What is shown, and from when to when it is taken from its file: the later part of each.
PARTS = [
    ("bikes", 6.2, 8.6), ("carphone_pristine", 2.4, 3.9), ("bigbuckbunny", 3.2, 5.2),
    ("bikes", 8.6, 9.9), ("bigbuckbunny", 3.2, 4.5),
]  # fmt: skip


def training_clips(real_videos):
    """Clips of the first 60% of each video, (n, T, 40, 40, 3), and their classes."""
    for label, name in enumerate(LABELS):
        frames, fps = decode(real_videos / f"{name}.mp4", end=0.6 * SECONDS[name], short_side=40)
        left = (frames.shape[2] - 40) // 2
        for start in np.arange(0, 0.6 * SECONDS[name] - 0.6, 0.2):
            ticks = (start + np.linspace(0, 0.5, 8)) * fps
            yield frames[ticks.astype(int), :, left : left + 40], label


@pytest.fixture(scope="module")
def checkpoint(real_videos, tmp_path_factory):
    """A small model with random weights, but for its head, which is fitted."""
    model = TimeSformer(MODEL, rngs=nnx.Rngs(0))
    clips, classes = map(np.stack, zip(*training_clips(real_videos)))
    boxes = np.tile(np.array([0, 0, 40], np.float32), (len(clips), 1))
    features = jax.jit(lambda frames: model.features(preprocess(frames, boxes, CLIP)))(clips)
    x = np.asarray(features, np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    x = np.concatenate([(x - mean) / scale, np.ones((len(x), 1))], axis=1)
    # Least squares, to logits of 4 and -4.
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ (8 * np.eye(3)[classes] - 4))
    kernel = weights[:-1] / scale[:, None]
    params = parameters(model)
    params["head"] = {
        "kernel": kernel.astype(np.float32),
        "bias": (weights[-1] - mean @ kernel).astype(np.float32),
    }
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    save_parameters(folder, params, CheckpointMetadata(MODEL, CLIP, LABELS, config={}))
    return folder


@pytest.fixture(scope="module")
def joined(real_videos, tmp_path_factory):
    """The parts, at one frame rate and size, in one file."""

    def frames():
        for name, start, end in PARTS:
            with VideoFile(real_videos / f"{name}.mp4") as video:
                timeline = video.timeline(start, end, fps=FPS)
                ticks = np.arange(round((end - start) * FPS))
                for frame in video.frames_at(timeline, ticks.clip(max=len(timeline) - 1)):
                    rgb = video.to_rgb(frame, 96)
                    left = (rgb.shape[1] - 96) // 2
                    yield rgb[:, left : left + 96]

    path = tmp_path_factory.mktemp("joined") / "joined.mp4"
    path.write_bytes(encode_mp4(frames(), FPS, g="15"))
    return path


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return tsf.Predictor(checkpoint, crops=1)


def check_boundaries(timeline):
    assert [segment.label for segment in timeline.segments] == [name for name, *_ in PARTS]
    found = [segment.end for segment in timeline.segments]
    boundaries = np.cumsum([end - start for _, start, end in PARTS])
    np.testing.assert_allclose(found, boundaries, atol=timeline.stride)


def test_the_boundaries_of_joined_videos_come_out_within_a_stride(predictor, joined):
    timeline = predictor.timeline(joined)
    assert timeline.stride == pytest.approx(16 / 30 / 4)
    check_boundaries(timeline)
    assert min(segment.score for segment in timeline.segments) > 0.8
    assert timeline.probabilities.shape == (len(timeline.times), 3)
    # Frames in memory are the same video, scaled after their conversion to RGB.
    in_memory = predictor.timeline(decode(joined))
    np.testing.assert_allclose(in_memory.probabilities, timeline.probabilities, atol=0.02)
    assert [s[:3] for s in in_memory.segments] == [s[:3] for s in timeline.segments]


def test_a_variable_frame_rate_does_not_move_the_boundaries(predictor, joined, tmp_path):
    """Of the second half of the video every third frame is left."""
    frames = decode(joined).frames
    kept = [*range(0, len(frames) // 2), *range(len(frames) // 2, len(frames), 3)]
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number in kept:
            frame = av.VideoFrame.from_ndarray(frames[number], format="rgb24")
            frame.pts, frame.time_base = round(1000 * number / FPS), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    check_boundaries(predictor.timeline(tmp_path / "a.mkv"))


def test_views_that_cover_a_video_are_those_of_its_pieces_alone(
    checkpoint, predictor, joined, tmp_path, caplog, capsys
):
    # 8.5 s in clips of 0.53 s are 16 pieces, of 255 frames in all.
    bounds = np.arange(17) * 255 // 16
    pieces = [
        predictor.probabilities(joined, first / FPS - 1e-3, last / FPS - 1e-3)
        for first, last in itertools.pairwise(bounds)
    ]
    covering = tsf.Predictor(checkpoint, "cover", crops=1)
    found = covering.probabilities(joined)
    np.testing.assert_allclose(found, np.mean(pieces, axis=0), atol=1e-5)
    assert covering.features(joined).clips.shape == (16, 1, MODEL.hidden_size)
    # A long video with a damaged part has an answer; the middle of the file is not decoded alone.
    damaged = tmp_path / "damaged.mp4"
    shutil.copy(joined, damaged)
    damage(damaged, 3.9, 5.9)
    with pytest.raises(VideoError):
        predictor.probabilities(damaged)
    load_command([
        "predict", str(damaged), f"--checkpoint={checkpoint}", "--views=cover", "--crops=1",
        "--json", "--workers=1",
    ])()  # fmt: skip
    [line] = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["views"] == "cover"
    good = [p for p, end in zip(pieces, bounds[1:]) if not 4.1 < end / FPS < 6.1]
    answer = {c["label"]: c["probability"] for c in line["predictions"]}
    expected = dict(zip(LABELS, np.mean(good, axis=0).tolist()))
    assert answer == pytest.approx(expected, abs=0.05)
    assert "from 3.90 to 5.90 s: damaged" in caplog.text


@pytest.mark.parametrize("views", ["cove", "0"])
@pytest.mark.parametrize("command", [["predict", "a.mp4"], ["evaluate"]])
def test_other_words_are_no_views(refusal, command, views):
    assert "10,000, or cover" in refusal(*command, "--checkpoint=b", f"--views={views}")


@pytest.fixture(scope="module")
def written(checkpoint, joined, tmp_path_factory):
    """What the command writes: one walk through it."""
    folder = tmp_path_factory.mktemp("written")
    shutil.copy(joined, folder / "joined.mp4")
    outputs = [folder / f"joined.{ending}" for ending in ("json", "csv", "vtt", "html")]
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        load_command([
            "timeline", str(folder / "joined.mp4"), f"--checkpoint={checkpoint}",
            "--stride=0.12", f"--output={','.join(map(str, outputs))}",
        ])()  # fmt: skip
    return folder, output.getvalue(), errors.getvalue()


def test_the_command_prints_and_writes_what_the_predictor_finds(written, predictor):
    folder, printed, _ = written
    timeline = predictor.timeline(folder / "joined.mp4", 0.12)
    check_boundaries(timeline)
    found = json.loads((folder / "joined.json").read_text())
    np.testing.assert_allclose(found["probabilities"], timeline.probabilities, atol=1e-4)
    assert [s["label"] for s in found["segments"]] == [s.label for s in timeline.segments]
    assert (found["stride"], found["labels"]) == (0.12, list(LABELS))
    assert (folder / "joined.csv").read_text() == timeline.to_csv()
    assert (folder / "joined.vtt").read_text() == timeline.to_vtt()
    lines = printed.splitlines()
    assert [line.split()[-1] for line in lines[: len(PARTS)]] == [name for name, *_ in PARTS]
    assert lines[0].split()[0] == "0:00.0"


@pytest.mark.parametrize("embedded", [True, False])
def test_the_page_plays_the_video_with_its_tracks(
    written, predictor, browser, embedded, monkeypatch
):
    folder, *_ = written
    path = folder / "joined.html"
    timeline = predictor.timeline(folder / "joined.mp4", 0.12)
    if not embedded:
        monkeypatch.setattr(page, "EMBEDDED_BYTES", 1000)
        source = page.find_source(folder / "joined.mp4", folder)
        assert source == page.Source("joined.mp4", embedded=False)
        path = folder / "beside.html"
        path.write_text(page.render(timeline, "joined.mp4", source))
    browser.open(path)
    browser.wait("document.querySelector('track').readyState === 2")
    browser.wait("document.querySelector('video').readyState >= 2")
    cues = browser.run(
        "return [...document.querySelector('video').textTracks[0].cues]"
        ".map((cue) => [cue.startTime, cue.endTime, cue.text])"
    )
    for cue, segment in zip(cues, timeline.segments, strict=True):
        assert cue[:2] == pytest.approx(segment[:2], abs=1e-3)
        assert cue[2].startswith(segment.label)

    # A click in the middle of the chart goes to the middle of the video.
    slider = browser.driver.find_element("id", "slider")
    ActionChains(browser.driver).move_to_element(slider).click().perform()
    browser.wait("!document.querySelector('video').seeking")
    now = "document.querySelector('video').currentTime"
    assert browser.run(f"return {now}") == pytest.approx(timeline.end / 2, abs=0.03)
    before = browser.run(f"return {now}")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert browser.run(f"return {now}") == pytest.approx(before + timeline.stride, abs=1e-3)

    # A click on a segment goes there; its subtitle is shown, and the chart says its class.
    browser.driver.find_elements("css selector", "[data-seek]")[2].click()
    browser.wait("!document.querySelector('video').seeking")
    third = timeline.segments[2]
    assert browser.run(f"return {now}") == pytest.approx(third.start, abs=0.01)
    active = "[...document.querySelector('video').textTracks[0].activeCues].map((c) => c.text)"
    browser.wait(f"{active}.length === 1")
    assert browser.run(f"return {active}") == [f"{third.label} {third.score:.0%}"]
    current = browser.driver.find_elements("css selector", "[aria-current=true] .label")
    assert [element.text for element in current] == [third.label]
    browser.run("document.querySelector('video').play()")
    browser.wait(f"{now} > {third.start + 0.2}")
    assert browser.errors() == []


def test_the_page_fits_narrow_screens_in_light_and_dark(written, browser):
    folder, *_ = written
    backgrounds = set()
    for width in (1280, 760, 380):
        for scheme in ("light", "dark"):
            browser.open(folder / "joined.html", width, scheme=scheme)
            assert browser.overflow() <= 0, (width, scheme)
            backgrounds.add(browser.run("return getComputedStyle(document.body).backgroundColor"))
            chart = browser.run("return document.getElementById('slider').getBoundingClientRect()")
            assert chart["width"] > 0.6 * min(width, 380)
            assert chart["height"] > 100
    assert len(backgrounds) == 2
    assert browser.errors() == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output=a.txt"], "the name must end in"),
        (["--output=nowhere/a.json"], "does not exist"),
        (["--stride=0"], "--stride=0: it must be a number from 0.001"),
        (["--window=2"], "leave out the window"),
    ],
)
def test_invalid_flags_are_refused(checkpoint, joined, refusal, flags, message):
    assert message in refusal("timeline", joined, f"--checkpoint={checkpoint}", *flags)
