"""`Predictor.attention` and `timesformer explain`, on a real video and in a real browser."""

import dataclasses
import io

import av
import numpy as np
import pytest
from flax import nnx
from selenium.webdriver.common.keys import Keys

import timesformer_jax as tsf
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.store import save_parameters
from timesformer_jax.cli.main import load_command
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.inference import overlay, page
from timesformer_jax.models.rollout import attention_rollout
from timesformer_jax.models.timesformer import TimeSformer, parameters

CLIP = ClipSpec(frames=4, frame_stride=8, crop=32, short_side=40)
MODEL = tsf.TimeSformerConfig(
    num_classes=3, image_size=32, num_frames=4, patch_size=8, hidden_size=16, depth=2, num_heads=2,
    init="width_scaled",
)  # fmt: skip
LABELS = ("bikes", "<b>cars</b> & co", "größer")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    params = parameters(TimeSformer(MODEL, rngs=nnx.Rngs(0)))
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    save_parameters(folder, params, CheckpointMetadata(MODEL, CLIP, LABELS, config={}))
    return folder


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return tsf.Predictor(checkpoint, crops=1)


def test_the_map_is_that_of_the_clip_which_is_predicted(predictor, real_videos):
    video = real_videos / "bikes.mp4"
    found = predictor.attention(video)
    assert found.heat.shape == (4, 4, 4)
    assert found.heat.min() >= 0
    assert found.heat.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(found.by_frame, found.heat.sum((1, 2)))
    np.testing.assert_allclose(found.probabilities, predictor.probabilities(video), atol=1e-6)
    clip = predictor.read(video)
    np.testing.assert_array_equal(found.frames, clip.frames[0])
    np.testing.assert_array_equal(found.times, clip.times[0])
    np.testing.assert_array_equal(found.crop_box, [0, (94 - 40) / 2, 40])  # of 94 x 40, the centre

    patches = attention_rollout(
        predictor.model, predictor.inputs(clip.frames[0], clip.crop_boxes), np.array([2])
    ).patches[0]
    for target in ("größer", 2, "2"):
        weighted = predictor.attention(found.frames, target)  # frames that are sampled already
        assert weighted.target == "größer"
        assert np.isnan(weighted.times).all()
        np.testing.assert_allclose(
            weighted.heat.reshape(4, 16), patches / patches.sum(), rtol=1e-3, atol=1e-6
        )
    assert not np.allclose(weighted.heat, found.heat, atol=1e-3)
    with pytest.raises(tsf.InputError, match=r"no class 'bike'; did you mean 'bikes'\?"):
        predictor.attention(video, "bike")


def test_any_number_of_labels_have_probabilities_of_their_own(predictor, real_videos, monkeypatch):
    video = real_videos / "bikes.mp4"
    one = predictor.attention(video).probabilities
    metadata = dataclasses.replace(predictor.metadata, multilabel=True)
    monkeypatch.setattr(predictor, "metadata", metadata)
    each = predictor.attention(video).probabilities
    odds = each / (1 - each)  # exp of the logits
    np.testing.assert_allclose(odds / odds.sum(), one, rtol=1e-4)


def test_levels_have_one_scale_for_all_frames():
    heat = np.linspace(0, 1, 200).reshape(2, 10, 10)
    levels = overlay.levels(heat)
    assert levels.dtype == np.uint8
    assert (levels[0, :2] == 0).all()  # a tenth of all patches are the first two rows
    assert (levels[1, -1, -2:] == 255).all()
    assert (np.diff(levels.reshape(-1).astype(int)) >= 0).all()
    single = np.zeros((2, 10, 10))
    single[1, 3, 4] = 1
    assert (overlay.levels(single) == 255 * single).all()
    assert (overlay.levels(np.zeros((2, 3, 3))) == 0).all()


def test_heat_is_drawn_in_the_square_and_the_rest_is_dark():
    frames = np.full((3, 20, 40, 3), 100, np.uint8)
    heat = np.zeros((2, 2, 2), np.uint8)
    heat[1, 0, 1] = 255
    box = np.array([0, 10 / 40, 1])
    first, second, third = overlay.overlaid(frames, heat, np.array([0, 1, 1]), box)
    assert (first[:, :10] == 45).all()
    assert (first[:, 30:] == 45).all()
    assert (first[:, 10:30] == 100).all()
    hottest = np.rint(0.3 * 100 + 0.7 * np.array(overlay.COLOURS[-1]))
    assert (second[:5, 25:30] == hottest).all()
    assert (second[15:, 10:15] == 100).all()  # the opposite patch
    assert (second == third).all()


def test_a_label_is_no_markup_and_a_template_needs_its_variables():
    with pytest.raises(page.jinja2.UndefinedError):
        page.render("explain.html", title="a", kind="b", subtitle="c")
    html = page.render("base.html", title="<script>", kind="b", subtitle="c")
    assert "&lt;script&gt;" in html


@pytest.fixture(scope="module")
def written(checkpoint, real_videos, tmp_path_factory):
    """The folder of a page and a video of the class "größer"."""
    folder = tmp_path_factory.mktemp("page")
    flags = f"--output={folder / 'page.html'}", f"--video={folder / 'heat.mp4'}"
    words = "explain", real_videos / "bikes.mp4", f"--checkpoint={checkpoint}", *flags
    load_command([*map(str, words), "--top=2", "--class=2"])()
    return folder


def test_the_video_has_the_clip_with_the_heat(written, predictor, real_videos):
    shown = predictor.attention(real_videos / "bikes.mp4", 2)
    with av.open(io.BytesIO((written / "heat.mp4").read_bytes())) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    original = tsf.decode(real_videos / "bikes.mp4", shown.times[0], shown.times[-1] + 1e-3).frames
    assert len(frames) == len(original)
    assert frames[0].shape == original[0].shape == (272, 640, 3)
    box = round(shown.crop_box[1] / 94 * 640)
    outside = np.abs(frames[0][:, : box - 8] - overlay.OUTSIDE * original[0][:, : box - 8])
    assert outside.mean() < 3
    hottest = np.unravel_index(shown.heat.argmax(), shown.heat.shape)
    y, x = (round((i + 0.5) * 272 / 4) for i in hottest[1:])
    near = np.abs(np.arange(len(frames)) / 25 - (shown.times[hottest[0]] - shown.times[0])).argmin()
    colour = frames[near][y, box + x].astype(float)
    expected = 0.3 * original[near][y, box + x] + 0.7 * np.array(overlay.COLOURS[-1])
    assert np.abs(colour - expected).max() < 40
    assert np.abs(colour - expected).max() < np.abs(colour - original[near][y, box + x]).max()


NOW = "document.querySelector('video').currentTime"
# Opacities of the heat in the middle of every patch, row by row.
HEAT = """
const canvas = document.getElementById('heat');
const copy = new OffscreenCanvas(canvas.width, canvas.height);
const context = copy.getContext('2d', { willReadFrequently: true });
context.drawImage(canvas, 0, 0);
const side = canvas.height, left = (canvas.width - side) / 2, out = [];
for (let y = 0; y < 4; y++) for (let x = 0; x < 4; x++)
  out.push(context.getImageData(left + (x + 0.5) * side / 4, (y + 0.5) * side / 4, 1, 1).data[3]);
return out;
"""


def test_the_page_plays_the_clip_and_shows_its_heat(written, predictor, real_videos, browser):
    maps = {i: predictor.attention(real_videos / "bikes.mp4", i) for i in range(3)}
    plain = predictor.attention(real_videos / "bikes.mp4")
    shown = [label for label, _ in predictor.top(plain.probabilities, 2)]
    if "größer" not in shown:
        shown.append("größer")
    browser.open(written / "page.html")
    browser.wait("document.querySelector('video').readyState >= 2")

    def at(frame, found, strength):
        """The canvas shows this frame of this map."""
        levels = overlay.levels(found.heat)[frame].reshape(-1) * strength
        np.testing.assert_allclose(browser.run(HEAT), levels, atol=12)

    names = browser.driver.find_elements("css selector", ".choice .name")
    assert [name.text for name in names] == ["any class (rollout)", *shown]
    checked = "return document.querySelector('[name=map]:checked').value"
    assert browser.run(checked) == str(1 + shown.index("größer"))
    at(0, maps[2], 0.7)

    # Arrows go to the frames of the clip, space plays, and the strip follows.
    body = browser.driver.find_element("tag name", "body")
    times = plain.times - plain.times[0]
    for frame, key in ((1, Keys.ARROW_RIGHT), (2, Keys.ARROW_RIGHT), (1, Keys.ARROW_LEFT)):
        body.send_keys(key)
        browser.wait("!document.querySelector('video').seeking")
        assert browser.run(f"return {NOW}") == pytest.approx(times[frame], abs=0.045)
        current = browser.run("return document.querySelector('[aria-current=true]').dataset.frame")
        assert current == str(frame)
    at(1, maps[2], 0.7)
    body.send_keys(Keys.SPACE)
    browser.wait(f"{NOW} > {times[2]}")
    play = browser.driver.find_element("css selector", ".play")
    assert play.get_attribute("aria-label") == "Pause"
    body.send_keys(Keys.SPACE)
    browser.wait("document.querySelector('video').paused")

    # A click on a frame, the slider, and another map.
    browser.driver.find_element("css selector", "[data-frame='3']").click()
    browser.wait("!document.querySelector('video').seeking")
    at(3, maps[2], 0.7)
    browser.driver.find_element("id", "strength").send_keys(Keys.HOME)
    at(3, maps[2], 0)
    browser.driver.find_element("id", "strength").send_keys(Keys.END)
    names[0].click()
    at(3, plain, 1)
    shares = browser.driver.find_elements("css selector", ".strip .share")
    assert [share.text for share in shares] == [f"{100 * s:.1f}%" for s in plain.by_frame]
    loaded = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    assert all(name.startswith(("data:", "blob:")) for name in browser.run(loaded))
    assert browser.errors() == []


def test_the_page_fits_narrow_screens_in_light_and_dark(written, browser):
    backgrounds = set()
    for width in (1280, 760, 380):
        for scheme in ("light", "dark"):
            browser.open(written / "page.html", width, scheme=scheme)
            assert browser.overflow() <= 0, (width, scheme)
            backgrounds.add(browser.run("return getComputedStyle(document.body).backgroundColor"))
            stage = browser.run("return document.querySelector('.stage').getBoundingClientRect()")
            assert stage["width"] / stage["height"] == pytest.approx(640 / 272, rel=0.01)
            assert stage["width"] > 0.45 * width
    assert len(backgrounds) == 2
    browser.driver.find_element("id", "theme").click()
    assert browser.run("return getComputedStyle(document.body).backgroundColor") in backgrounds
    assert browser.run("return document.documentElement.dataset.theme") == "light"
    assert browser.errors() == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--class=bike"], "no class 'bike'; did you mean 'bikes'"),
        (["--start=900"], "bikes.mp4: no frame from 900 s"),
        (["--output=nowhere/a.html"], "folder of --output=nowhere/a.html does not exist"),
        (["--video=nowhere/a.mp4"], "folder of --video=nowhere/a.mp4 does not exist"),
    ],
)
def test_invalid_flags_are_refused(checkpoint, real_videos, refusal, flags, message, tmp_path):
    page = [] if "--output" in flags[0] else [f"--output={tmp_path / 'a.html'}"]
    video = real_videos / "bikes.mp4"
    assert message in refusal("explain", video, f"--checkpoint={checkpoint}", *page, *flags)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--output", "--video"])
def test_the_video_itself_is_not_replaced(flag, real_videos, refusal, tmp_path):
    video, link = real_videos / "bikes.mp4", tmp_path / "link.mp4"
    link.symlink_to(video)
    message = refusal("explain", video, "--checkpoint=/nowhere", f"{flag}={link}")
    assert f"{flag}={link} is the input itself" in message
    message = refusal("explain", video, "--checkpoint=/nowhere", f"{flag}={tmp_path}")
    assert f"{flag}={tmp_path} is a folder" in message


def test_a_page_whose_name_was_not_given_replaces_no_file(
    real_videos, refusal, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bikes.html").write_text("notes")
    message = refusal("explain", real_videos / "bikes.mp4", "--checkpoint=/nowhere")
    assert message.startswith("bikes.html exists; give --output=bikes.html to replace it")
    (tmp_path / "bikes.html").unlink()
    monkeypatch.setattr("os.access", lambda path, mode: path != str(tmp_path))
    message = refusal("explain", real_videos / "bikes.mp4", "--checkpoint=/nowhere")
    assert message.startswith("--output=bikes.html may not be written")
