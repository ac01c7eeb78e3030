"""examples/browser: the page classifies a file as `Predictor` does."""

import functools
import http.server
import json
import os
import pathlib
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from timesformer_jax.checkpoints import store
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.encode import encode_mp4
from timesformer_jax.export.export import export
from timesformer_jax.inference.predictor import Predictor
from timesformer_jax.models.timesformer import TimeSformerConfig, abstract, parameters

REPOSITORY = pathlib.Path(__file__).parents[1]
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")

# jax2onnx 0.13 is older than the JAX that is pinned.
pytestmark = pytest.mark.filterwarnings("ignore:jax[.].* is deprecated:DeprecationWarning")


@pytest.fixture
def onnxruntime_web():
    """The folder of its files."""
    root = os.environ.get("ONNXRUNTIME_WEB", REPOSITORY / "node_modules" / "onnxruntime-web")
    folder = pathlib.Path(root) / "dist"
    if not all((folder / name).is_file() for name in FILES):
        pytest.skip("needs the npm package onnxruntime-web, in node_modules or $ONNXRUNTIME_WEB")
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def site(tmp_path, onnxruntime_web):
    """A folder with the page and what it needs, and its address."""
    folder = tmp_path / "site"
    shutil.copytree(REPOSITORY / "examples" / "browser", folder, dirs_exist_ok=True)
    (folder / "ort").mkdir(exist_ok=True)
    for name in FILES:
        shutil.copy(onnxruntime_web / name, folder / "ort")
    handler = functools.partial(Quiet, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def checkpoint(folder):
    """A tiny model whose classes depend on the colours of a clip."""
    clip = ClipSpec(4, frame_stride=6, crop=32, short_side=40)
    config = TimeSformerConfig(
        depth=1, hidden_size=16, num_heads=2, num_classes=6, image_size=32, num_frames=4,
        patch_size=8,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.15, x.shape), jnp.float32),
        parameters(abstract(config)),
    )
    labels = [f"class <{i}>" for i in range(6)]
    metadata = CheckpointMetadata(config, clip, tuple(labels), {}, license="MIT")
    store.save_parameters(folder, params, metadata)


def write_video(path):
    """Two seconds that go from blue to orange: frames of other times are other pictures."""
    y, x = np.mgrid[0:120, 0:160] / 160
    ends = (
        np.stack([0.2 + 0 * x, 0.3 * y, 0.9 - 0.4 * x], -1),
        np.stack([0.9 - 0 * x, x, 0 * y], -1),
    )
    shares = np.linspace(0, 1, 60)[:, None, None, None]
    path.write_bytes(
        encode_mp4((255 * (ends[0] * (1 - shares) + ends[1] * shares)).astype("uint8"), 30)
    )


def test_page_finds_what_predict_finds(site, browser, tmp_path):
    folder, address = site
    checkpoint(tmp_path / "run")
    export(tmp_path / "run", folder / "model.onnx", to="onnx", preprocess=True)
    write_video(tmp_path / "a video.mp4")
    browser.open_address(address)
    browser.wait("!document.getElementById('file').disabled", 120)
    browser.driver.find_element("id", "file").send_keys(str(tmp_path / "a video.mp4"))
    browser.wait("!document.getElementById('result').hidden", 120)
    texts = browser.run(
        "return [...document.querySelectorAll('#classes span')].map(x => x.textContent)"
    )
    shown = [
        (label, float(share.rstrip("%")) / 100) for label, share in zip(texts[::2], texts[1::2])
    ]
    wanted = Predictor(tmp_path / "run", crops=1).predict(tmp_path / "a video.mp4")
    # The browser scales and converts the colours of a frame with other rounding than FFmpeg.
    assert [label for label, _ in shown] == [label for label, _ in wanted]
    np.testing.assert_allclose([p for _, p in shown], [p for _, p in wanted], atol=0.01)
    assert "License of the weights: MIT" in browser.run("return document.body.textContent")
    assert browser.errors() == []
    for width, scheme in ((400, "light"), (1280, "dark")):
        browser.set_screen(width, 800, scheme)
        assert browser.overflow() <= 0
        browser.screenshot(tmp_path / f"{width}.png")


def test_page_says_what_is_wrong(site, browser, tmp_path):
    folder, address = site
    card = {"input": {"dtype": "float32"}}
    (folder / "model.json").write_text(json.dumps(card))
    browser.open_address(address)
    browser.wait("document.getElementById('about').textContent.includes('--preprocess')", 120)
    browser.open_address(f"{address}?model=other")
    browser.wait("document.getElementById('about').textContent.includes('other.json')", 120)
    browser.errors()  # the answer 404
