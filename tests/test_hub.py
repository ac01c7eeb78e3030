"""Checkpoints by name: downloaded once, then from the cache; every failure is one line."""

import json
import os
import pathlib

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import timesformer_jax as tsf
from timesformer_jax.checkpoints import catalogue
from timesformer_jax.checkpoints.load import load
from timesformer_jax.checkpoints.sources import locate
from timesformer_jax.clip_spec import ClipSpec

GOLDENS = pathlib.Path(__file__).parent / "data" / "goldens"
K400 = "facebook/timesformer-base-finetuned-k400"
VIT = "timm/vit_base_patch16_224.augreg_in21k"
CARD = b"---\nlicense: cc-by-nc-4.0\ntags:\n- vision\n---\n# TimeSformer\n"


def hugging_face(**preprocessor):
    """The files of a tiny model as Hugging Face repositories have them."""
    source = GOLDENS / "hf_divided_space_time"
    config = json.loads((source / "config.json").read_text())
    config["id2label"] = {str(i): f"class name {i}" for i in range(10)}
    normalise = {"image_mean": [0.45] * 3, "image_std": [0.225] * 3}
    return {
        "config.json": json.dumps(config).encode(),
        "preprocessor_config.json": json.dumps(normalise | preprocessor).encode(),
        "model.safetensors": (source / "model.safetensors").read_bytes(),
        "pytorch_model.bin": b"the same again, which nobody needs",
        "README.md": CARD,
        "events.out.tfevents": b"nor this",
    }


@pytest.fixture(autouse=True)
def published(hub):
    """The repository that the tests ask for."""
    hub.repositories[K400] = hugging_face()


def refused(source, said, **options):
    with pytest.raises(tsf.InputError) as error:
        locate(source, **options)
    assert "\n" not in str(error.value)
    assert source.partition("@")[0] in str(error.value)
    assert said in str(error.value)


def test_a_name_is_downloaded_once_with_all_that_is_known_of_it(hub, monkeypatch):
    metadata, _ = load(K400)
    assert metadata.labels == tuple(f"class name {i}" for i in range(10))
    assert metadata.license == "CC-BY-NC-4.0"
    assert metadata.clip.mean == (0.45,) * 3
    assert not any(path.endswith((".bin", ".tfevents")) for path in hub.asked)
    # Again: nothing but the listing is asked for. A path of this name goes before it.
    hub.asked.clear()
    folder = locate(K400).path
    assert not any("/resolve/" in path for path in hub.asked)
    hub.close()  # the network is gone
    assert locate(K400).path == locate(f"{K400}@main").path == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate(K400, revision="main").path == folder
    refused(VIT, "not in the cache of the Hugging Face Hub, and the Hub cannot be reached")
    os.makedirs(K400)
    assert locate(K400).path == K400
    hub.close = lambda: None


def test_every_failure_of_the_hub_gives_a_one_line_error(hub, monkeypatch, tmp_path):
    refused("nobody/nothing", "no file or folder here, and no repository of the Hugging Face Hub")
    refused(f"{K400}@v9", "has no revision 'v9'")
    refused(K400, "has no revision 'v8'", revision="v8")
    hub.gated.add(K400)
    refused(K400, f"is gated: accept its terms on https://huggingface.co/{K400}, and log in")
    hub.gated.clear()
    hub.private.add(K400)
    refused(K400, "log in if it is private (hf auth login, or HF_TOKEN)")
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.damage = True
    refused(K400, "model.safetensors is not what the Hub says it is (its SHA-256 is")
    hub.damage = False
    assert os.path.isfile(os.path.join(locate(K400).path, "model.safetensors"))
    hub.repositories["me/empty"] = {"README.md": CARD}
    refused("me/empty", "has no weights that can be read: model.safetensors, pytorch_model.bin or")
    hub.status = 503
    refused(VIT, "the Hugging Face Hub answers 503; try again later")
    assert locate(K400).path  # from the cache
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(VIT, "and the Hugging Face Hub cannot be reached (")


def test_a_misspelt_path_is_not_asked_for_on_the_network(hub, tmp_path):
    (tmp_path / "runs").mkdir()
    for source in ("runs/mien", "nowhere/model.pyth", "/no/where", "no/such/folder", "a name"):
        refused(source, "neither a file nor a folder of this name exists")
    refused("facebook/timesformer-base-finetuned-k40.pth", "did you mean")
    with pytest.raises(tsf.InputError, match="give a path or a name"):
        locate("")
    assert not hub.asked


def test_a_missing_file_says_where_it_is_to_be_had(hub):
    refused("data/TimeSformer_divST_8x32_224_K400.pyth", f"give {K400} in its place")
    refused("data/TimeSformer_divST_8x32_224_K400.pyth", "license CC-BY-NC-4.0")
    refused("TimeSformer_divST_96x4_224_K600.pyth", "https://github.com/facebookresearch/TimeSf")


def test_image_models_come_with_their_normalisation(hub, tmp_path):
    state = {k: v.contiguous() for k, v in torch.load(GOLDENS / "timm_vit.pth").items()}
    save_file(state, tmp_path / "vit.safetensors")
    config = {
        "architecture": "vit_base_patch16_224",
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    hub.repositories[VIT] = {
        "config.json": json.dumps(config).encode(),
        "README.md": b"---\nlicense: apache-2.0\n---\n",
        "model.safetensors": (tmp_path / "vit.safetensors").read_bytes(),
    }
    model = tsf.from_pretrained(VIT, num_heads=4, num_frames=2, num_classes=3)
    assert (model.clip.mean, model.clip.std, model.clip.frames) == ((0.5,) * 3, (0.5,) * 3, 2)
    assert model.config.attention == "divided"
    hub.repositories["me/vit"] = {"vit.pth": (GOLDENS / "timm_vit.pth").read_bytes()}
    assert locate("me/vit").path.endswith("vit.pth")


def test_files_of_the_bucket(hub):
    name = "augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz"
    content = np.random.default_rng(0).bytes(3_000_000)
    hub.files[name] = hub.files["imagenet21k/ViT-B_16.npz"] = content
    refused("augreg/no.npz", "no checkpoint there")
    with pytest.raises(tsf.InputError, match=r"augreg/no\.npz: .* has no such file"):
        locate("gs://vit_models/augreg/no.npz")
    hub.damage = True
    refused(f"gs://vit_models/{name}", "what came is not what was announced")
    hub.damage = False
    bare = name.removeprefix("augreg/")
    found = locate(bare)
    assert pathlib.Path(found.path).read_bytes() == content
    assert found.known.classes == 21843
    hub.close()
    assert locate(f"gs://vit_models/{name}").path == locate(bare[:-4]).path == found.path
    refused("gs://vit_models/imagenet21k/ViT-B_16.npz", "cannot be downloaded from")
    pathlib.Path(bare).write_bytes(b"mine")
    assert locate(bare).path == bare
    refused("gs://vit_models/../../x.npz", "no checkpoint there")
    hub.close = lambda: None


def test_what_the_authors_trained_is_known_by_its_shape():
    assert len({known.name for known in tsf.list_pretrained()}) == len(tsf.list_pretrained())
    for known in tsf.list_pretrained():
        if known.clip is None:
            continue
        config = tsf.preset(
            "timesformer_base", num_classes=known.classes, num_frames=known.clip.frames,
            image_size=known.clip.crop,
        )  # fmt: skip
        assert catalogue.authors_model(config).clip == known.clip
    tiny = tsf.preset("timesformer_tiny", num_classes=400)
    assert catalogue.authors_model(tiny) is None
    ssv2 = catalogue.by_name("facebook/timesformer-hr-finetuned-ssv2")
    assert ssv2.clip == ClipSpec(
        frames=16, frame_stride=16, crop=448, short_side=448, sampling="segments",
        channel_order="bgr",
    )  # fmt: skip


def test_a_command_finds_the_hub_by_the_environment(hub, monkeypatch, tmp_path, timesformer):
    for name, value in {"HF_ENDPOINT": hub.address, "HF_HOME": tmp_path / "home"}.items():
        monkeypatch.setenv(name, str(value))
    hub.private.add(K400)
    monkeypatch.setenv("HF_TOKEN", "secret")
    done = timesformer("convert", f"{K400}@v1", "ours")
    assert "its license is CC-BY-NC-4.0: no commercial use" in done.stderr
    assert list((tmp_path / "home" / "hub").glob("models--facebook--*/snapshots/*/config.json"))
    metadata, _ = load(tmp_path / "ours")
    assert metadata.license_note == "the file that was read says so"
    assert metadata.labels[3] == "class name 3"
