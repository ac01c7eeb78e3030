"""Checkpoints leave with a model card: on the Hub, in a Hugging Face directory, in a workdir."""

import json
import os

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, constants
from test_hub import GOLDENS

import timesformer_jax as tsf
from timesformer_jax.checkpoints.card import model_card
from timesformer_jax.checkpoints.convert import convert
from timesformer_jax.checkpoints.load import load
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.push import push
from timesformer_jax.checkpoints.run_files import Evaluation, RunFiles
from timesformer_jax.checkpoints.store import Checkpoints
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.models.timesformer import parameters

LABELS = ("jump *high*", "run: 100 m", "</details>")
RECIPE = {
    "pretrained": "facebook/timesformer-base-finetuned-k400",
    "epochs": 3,
    "data": {"directory": "/home/somebody/data/sports", "eval_split": "test", "fps": 0.0},
    "optimizer": {"name": "adamw", "learning_rate": 0.01},
}


@pytest.fixture
def run(tmp_path):
    """The workdir of a finished run of a tiny model: steps 4 and 5, the first of which is best."""
    model = tsf.create(
        "timesformer_tiny", num_classes=3, image_size=16, num_frames=2, hidden_size=16, depth=1,
        num_heads=2, patch_size=8,
    )  # fmt: skip
    clip = ClipSpec(frames=2, frame_stride=4, crop=16, short_side=20)
    metadata = CheckpointMetadata(
        model.config, clip, LABELS, RECIPE, license="CC-BY-NC-4.0", license_note="it was told"
    )
    workdir = tmp_path / "run"
    checkpoints = Checkpoints(workdir / "checkpoints")
    for step, top1 in {4: 0.875, 5: 0.75}.items():
        checkpoints.save_model(step, parameters(model), metadata)
        checkpoints.record_validation(step, {"top1": top1, "loss": 0.1})
    checkpoints.wait()
    checkpoints.close()
    results = {"step": 5, "top1": 0.8, "videos": 40, "views": 2, "crops": 3}
    (workdir / "results.json").write_text(json.dumps(results))
    (workdir / "curves.png").write_bytes(b"a picture")
    return workdir


def head(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_a_hugging_face_directory_has_what_the_run_knows(run, tmp_path):
    convert(run, tmp_path / "hf", to="hf")
    card = ModelCard.load(tmp_path / "hf" / "README.md")
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.base_model == "facebook/timesformer-base-finetuned-k400"
    (result,) = card.data.eval_results[:1]
    assert (result.dataset_name, result.dataset_split) == ("sports", "test")
    assert (result.metric_type, result.metric_value) == ("accuracy", 80.0)
    assert "| at the end of training | 80.0 | 40 | 2 x 3 |" in card.text
    assert "| during training | 75.0 |  | 1 x 1 |" in card.text
    assert "](curves.png)" in card.text
    assert (tmp_path / "hf" / "curves.png").read_bytes() == b"a picture"
    recipe = json.loads((tmp_path / "hf" / "recipe.json").read_text())
    assert recipe == RECIPE | {"data": RECIPE["data"] | {"directory": "sports"}}
    everything = b"".join(path.read_bytes() for path in (tmp_path / "hf").iterdir())
    assert b"somebody" not in everything  # nothing of the machine
    # The best step has its own accuracy, and one with a new head has none.
    convert(run / "best", tmp_path / "best", to="hf")
    best = ModelCard.load(tmp_path / "best" / "README.md")
    assert "| during training | 87.5 |" in best.text
    assert "at the end" not in best.text
    convert(run, tmp_path / "other", to="hf", num_classes=2)
    assert "## Results" not in (tmp_path / "other" / "README.md").read_text()
    metadata, _ = load(tmp_path / "hf")
    assert (metadata.license, metadata.license_note) == ("CC-BY-NC-4.0", "it was told")


def test_the_card_of_any_model_is_valid_and_holds_no_markup_of_its_own():
    metadata = CheckpointMetadata(
        tsf.preset("timesformer_base", num_classes=3, attention="space"),
        ClipSpec(sampling="segments", channel_order="bgr"), LABELS, {},
        license='My own: "licence"', license_note="[a](http://b)\n# heading", multilabel=True,
    )  # fmt: skip
    about = RunFiles((Evaluation("evaluated", "x: y", {"mAP": 0.5}, 7, 1, 1),))
    text = model_card(metadata, "me/a: 'b'", about, for_transformers=True)
    assert head(text)["license"] == "other"
    assert head(text)["license_name"] == 'My own: "licence"'
    assert head(text)["model-index"][0]["results"][0]["dataset"]["split"] == "x: y"
    assert head(text)["model-index"][0]["results"][0]["metrics"][0]["type"] == "mAP"
    assert "BGR" in text
    assert "take the mean of the rows" in text
    assert "\n# heading" not in text
    assert r"\[a\](http://b) \# heading" in text
    assert (
        text.count("</details>") == text.count("    </details>") + 1
    )  # a class is in a code block
    unknown = CheckpointMetadata(metadata.model, metadata.clip, (), {})
    text = model_card(unknown, "x", RunFiles(), for_transformers=False)
    assert head(text)["library_name"] == "timesformer_jax"
    assert "license" not in head(text)
    assert "No license of these weights is known" in text
    assert "transformers" not in text.split("---\n")[2]


# huggingface_hub, where a server has no Xet.
@pytest.mark.filterwarnings("ignore:Use 'content=.*' to upload:DeprecationWarning")
def test_what_is_pushed_is_loaded_by_its_name(hub, run, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "secret")
    results = {"top1": 0.9, "videos": 9, "views": 4, "crops": 3, "split": "test"}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    push(run, "mine", private=True, results=os.fspath(path))
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{hub.address}/me/mine", "timesformer predict VIDEO --checkpoint=me/mine"]
    assert "me/mine" in hub.private
    files = hub.repositories["me/mine"]
    assert "| evaluated | 90.0 | 9 | 4 x 3 |" in files["README.md"].decode()
    assert "--checkpoint=me/mine" in files["README.md"].decode()
    assert files["curves.png"] == b"a picture"
    metadata, params = load("me/mine")
    before, expected = load(run)
    for field in ("clip", "labels", "license", "license_note"):
        assert getattr(metadata, field) == getattr(before, field)
    np.testing.assert_array_equal(params["head"]["kernel"], expected["head"]["kernel"])
    # Another branch; the main one stays.
    push(run, "me/mine", revision="best", labels=["a", "b", "c"])
    assert capsys.readouterr().out.splitlines()[1].endswith("--checkpoint=me/mine@best")
    assert load("me/mine@best")[0].labels == ("a", "b", "c")
    assert load("me/mine")[0].labels == LABELS


def test_nothing_is_uploaded_to_a_folder(run, tmp_path, monkeypatch, timesformer):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = timesformer("push", run, "me/mine", f"--output={tmp_path / 'out'}", "--license=MIT")
    assert done.stdout == f"written to {tmp_path / 'out'}; nothing was uploaded\n"
    card = (tmp_path / "out" / "README.md").read_text()
    assert head(card)["license"] == "mit"
    assert "--checkpoint=me/mine" in card


def test_invalid_pushes_give_one_line_errors(hub, run, monkeypatch):
    def refused(said, repo="me/mine", **options):
        with pytest.raises(tsf.InputError) as error:
            push(run, repo, **options)
        assert "\n" not in str(error.value)
        assert said in str(error.value)

    refused("without a token of the Hugging Face Hub: hf auth login, or HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    refused("answers 401; the token is not valid")
    monkeypatch.setenv("HF_TOKEN", "reader")
    refused("answers 403, You don't have the rights to create a model; the token may not write")
    monkeypatch.setenv("HF_TOKEN", "secret")
    refused("answers 403", repo="other/mine")
    for name in ("a/b/c", "a--b", "me/.", "", "me/x y"):
        refused("is no name of a repository: give OWNER/NAME", repo=name)
    refused("'a b' is no name of a branch", revision="a b")
    refused("it holds no results", results=os.fspath(GOLDENS / "hf_joint_space_time/config.json"))
    refused("nowhere.json: no such file", results="nowhere.json")
    hub.status = 503
    refused("answers 503; try again later")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("the Hugging Face Hub cannot be reached (")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set")
    assert not any(name.startswith("me/") for name in hub.repositories)
