"""Image ViTs of every format become video models of every scheme, starting as the image model."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.torch import save_file

import timesformer_jax as tsf
from timesformer_jax.models.schemes import SCHEMES
from timesformer_jax.models.timesformer import parameters

pytestmark = pytest.mark.compiles

VIT = pathlib.Path(__file__).parent / "data" / "goldens" / "timm_vit.pth"


@pytest.fixture(scope="module")
def timm():
    """A timm state dict: 48 wide, 3 deep, 4 heads, 4 x 4 patches of 8, 1000 classes."""
    return torch.load(VIT, weights_only=True)


@pytest.fixture(scope="module")
def reference():
    return flat(tsf.from_pretrained(VIT, num_heads=4))


def flat(model):
    return traverse_util.flatten_dict(parameters(model), sep="/")


def assert_same(ours, reference):
    assert ours.keys() == reference.keys()
    for name, value in reference.items():
        assert np.array_equal(ours[name], value), name


def features(model, video):
    return jax.jit(lambda v: model.features(v))(video)


@pytest.mark.parametrize("container", [None, "state_dict", "model", "model_state"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
def test_wrapped_and_prefixed_state_dicts_are_read(container, prefix, timm, reference, tmp_path):
    state = {prefix + name: value for name, value in timm.items()}
    torch.save({container: state, "epoch": 3} if container else state, tmp_path / "vit.pth")
    model = tsf.from_pretrained(tmp_path / "vit.pth", num_heads=4, attention="divided")
    assert_same(flat(model), reference)


@pytest.mark.parametrize("name", ["vit.safetensors", "vit.pth", "vit"])
def test_the_content_tells_the_kind_of_file(name, timm, reference, tmp_path):
    save_file(timm, tmp_path / name)
    assert_same(flat(tsf.from_pretrained(tmp_path / name, num_heads=4)), reference)


def test_files_of_old_torch_are_read(timm, reference, tmp_path):
    torch.save(timm, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(flat(tsf.from_pretrained(tmp_path / "old.pth", num_heads=4)), reference)


def test_timm_directory_is_read(timm, reference, tmp_path):
    save_file(timm, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch16_224"}')
    assert_same(flat(tsf.from_pretrained(tmp_path, num_heads=4)), reference)


TORCHVISION = {
    "cls_token": "class_token", "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj": "conv_proj", "norm": "encoder.ln", "head": "heads.head",
    "norm1": "ln_1", "norm2": "ln_2", "attn.qkv": "self_attention.in_proj",
    "attn.proj": "self_attention.out_proj", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3",
}  # fmt: skip


def torchvision_name(name):
    if not name.startswith("blocks."):
        module, _, kind = name.rpartition(".")
        return f"{TORCHVISION[module]}.{kind}" if module else TORCHVISION[name]
    _, i, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    joint = "_" if module == "attn.qkv" else "."  # in_proj_weight is no linear layer's
    return f"encoder.layers.encoder_layer_{i}.{TORCHVISION[module]}{joint}{kind}"


@pytest.mark.parametrize("old", [False, True], ids=["mlp.0", "linear_1"])
def test_torchvision_names(old, timm, reference, tmp_path):
    state = {torchvision_name(name): value for name, value in timm.items()}
    if old:
        state = {
            k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v
            for k, v in state.items()
        }
    torch.save(state, tmp_path / "vit_b_16.pth")
    assert_same(flat(tsf.from_pretrained(tmp_path / "vit_b_16.pth", num_heads=4)), reference)


def test_distilled_deit_loses_its_second_token_and_says_so(timm, reference, tmp_path, caplog):
    pos = timm["pos_embed"]
    distilled = timm | {
        "dist_token": torch.ones(1, 1, 48),
        "head_dist.weight": torch.ones(1000, 48),
        "head_dist.bias": torch.ones(1000),
        "pos_embed": torch.cat([pos[:, :1], torch.ones(1, 1, 48), pos[:, 1:]], dim=1),
    }
    torch.save({"model": distilled}, tmp_path / "deit.pth")
    assert_same(flat(tsf.from_pretrained(tmp_path / "deit.pth", num_heads=4)), reference)
    assert "dist_token and head_dist dropped" in caplog.text


def test_layer_before_the_head_goes_with_the_head(timm, reference, tmp_path, caplog):
    hidden = {"pre_logits.fc.weight": torch.ones(48, 48), "pre_logits.fc.bias": torch.ones(48)}
    torch.save(timm | hidden, tmp_path / "vit.pth")
    ours = flat(tsf.from_pretrained(tmp_path / "vit.pth", num_heads=4, num_classes=1000))
    assert "pre_logits.* and the head behind it dropped" in caplog.text
    assert not np.array_equal(ours["head/kernel"], reference["head/kernel"])
    assert_same(*({k: v for k, v in x.items() if "head" not in k} for x in (ours, reference)))


class JaxViT(nn.Module):
    """The ViT of google-research/vision_transformer, by its modules' names: the features."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(16, (4, 4), strides=(4, 4), name="embedding")(images)
        x = x.reshape(len(x), -1, 16)
        cls = self.param("cls", nn.initializers.normal(), (1, 1, 16))
        x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
        return JaxEncoder(name="Transformer")(x)[:, 0]


class JaxEncoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = JaxPositions(name="posembed_input")(x)
        for i in range(2):
            x = JaxBlock(name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class JaxPositions(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.param("pos_embedding", nn.initializers.normal(), (1, *x.shape[1:]))


class JaxBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="LayerNorm_0")(x)
        x += nn.MultiHeadDotProductAttention(2, name="MultiHeadDotProductAttention_1")(y, y)
        return x + JaxMlp(name="MlpBlock_3")(nn.LayerNorm(name="LayerNorm_2")(x))


class JaxMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(24, name="Dense_0")(x), approximate=False)
        return nn.Dense(16, name="Dense_1")(x)


@pytest.fixture(scope="module")
def jax_vit():
    """Images, the features of a Linen ViT, and its parameters by their names in an .npz."""
    images = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    shapes = jax.eval_shape(JaxViT().init, jax.random.key(0), images)["params"]
    draw = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: (0.3 * draw.normal(size=x.shape) + 0.1).astype(np.float32), shapes
    )
    run = jax.jit(lambda p, x: JaxViT().apply({"params": p}, x))
    return images, run(params, images), traverse_util.flatten_dict(params, sep="/")


def test_jax_vit_gives_its_own_features(jax_vit, tmp_path):
    images, theirs, names = jax_vit
    head = {"head/kernel": np.ones((16, 7), np.float32), "head/bias": np.ones(7, np.float32)}
    np.savez(tmp_path / "vit.npz", **names, **head)
    model = tsf.from_pretrained(tmp_path / "vit.npz", attention="space")
    assert (model.config.num_heads, model.config.mlp_ratio, model.config.num_classes) == (2, 1.5, 7)
    assert (model.config.image_size, model.config.patch_size) == (12, 4)
    np.testing.assert_allclose(features(model, images[:, None]), theirs, atol=1e-5)


def test_jax_vit_with_pre_logits_and_a_missing_key(jax_vit, tmp_path):
    names = jax_vit[2] | {"pre_logits/kernel": np.ones((16, 16)), "head/kernel": np.ones((16, 3))}
    np.savez(tmp_path / "vit.npz", **names)
    assert tsf.from_pretrained(tmp_path / "vit.npz", num_classes=5).config.num_classes == 5
    key = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/kernel"
    del names[key]
    np.savez(tmp_path / "vit.npz", **names)
    with pytest.raises(tsf.InputError, match=f"{key} is missing"):
        tsf.from_pretrained(tmp_path / "vit.npz")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_attention_starts_from_the_image_models(scheme, timm):
    ours = flat(tsf.from_pretrained(VIT, num_heads=4, attention=scheme, num_frames=5))
    qkv = timm["blocks.1.attn.qkv.weight"]
    for layer in SCHEMES[scheme].layers:
        path = f"blocks/1/attention/{layer.name}"
        assert np.array_equal(ours[f"{path}/qkv/kernel"].reshape(48, -1), qkv.T)
        assert np.array_equal(ours[f"{path}/proj/bias"], timm["blocks.1.attn.proj.bias"])
        assert np.array_equal(ours[f"{path}/norm/scale"], timm["blocks.1.norm1.weight"])
    further = [value for name, value in ours.items() if "/temporal_fc/" in name]
    assert len(further) == 2 * 3 * (len(SCHEMES[scheme].layers) - 1)
    assert not any(np.any(value) for value in further)
    if scheme == "space":
        assert "embedding/time" not in ours
    else:
        assert ours["embedding/time"].shape == (5, 48)
        assert not np.any(ours["embedding/time"])


@pytest.mark.parametrize("scheme", ["divided", "space_then_time", "parallel", "joint"])
def test_video_model_starts_at_the_image_models_features(scheme):
    frames = 1 if scheme == "joint" else 3  # joint weighs the patches by their number
    image = np.random.default_rng(0).normal(size=(2, 1, 32, 32, 3)).astype(np.float32)
    still = np.repeat(image, frames, axis=1)
    expected = features(tsf.from_pretrained(VIT, num_heads=4, attention="space"), image)
    ours = features(tsf.from_pretrained(VIT, num_heads=4, attention=scheme), still)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_an_image_model_becomes_a_divided_one_by_default(caplog):
    assert tsf.from_pretrained(VIT, num_heads=4).config.attention == "divided"
    assert "an image model; a divided one starts from it" in caplog.text


def test_other_classes_get_a_new_head_and_that_is_said(reference, caplog):
    ours = flat(tsf.from_pretrained(VIT, num_heads=4, num_classes=10))
    assert ours["head/kernel"].shape == (48, 10)
    assert "head of 1000 classes is replaced by a new one of 10" in caplog.text
    assert_same(*({k: v for k, v in x.items() if "head" not in k} for x in (ours, reference)))


def test_positions_resize_in_two_dimensions_unless_official(timm):
    table = timm["pos_embed"][0].numpy()
    proper = flat(tsf.from_pretrained(VIT, num_heads=4, image_size=64))["embedding/space"]
    official = flat(tsf.from_pretrained(VIT, num_heads=4, image_size=64, resize="official"))
    flattened = np.concatenate([table[:1], np.repeat(table[1:], 4, axis=0)])
    assert np.array_equal(official["embedding/space"], flattened)
    assert np.array_equal(proper[0], table[0])
    bicubic = jax.image.resize(table[1:].reshape(4, 4, 48), (8, 8, 48), "bicubic")
    np.testing.assert_allclose(proper[1:], bicubic.reshape(64, 48), atol=1e-6)


@pytest.mark.parametrize("kept", ["none", "space"])
def test_embeddings_that_are_not_wanted_are_dropped(kept, caplog):
    model = tsf.from_pretrained(VIT, num_heads=4, position_embedding=kept)
    assert model.embedding.time is None
    assert (model.embedding.space is None) == (kept == "none")
    assert ("space embedding dropped" in caplog.text) == (kept == "none")


def test_unusual_width_warns_that_heads_are_a_guess(caplog):
    tsf.from_pretrained(VIT)
    assert "does not say how many heads" in caplog.text
    assert "num_heads" in caplog.text
