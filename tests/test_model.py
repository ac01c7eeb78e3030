"""The whole model of every scheme against one written from the paper in float64, and its rules."""

import dataclasses
import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from flax import nnx, traverse_util
from test_attention import brute_force, sequences

import timesformer_jax as tsf
from timesformer_jax.models.block import Attention
from timesformer_jax.models.embedding import resize_space, resize_time
from timesformer_jax.models.schemes import SCHEMES, SPATIAL, TIME, Scheme
from timesformer_jax.models.timesformer import abstract, parameters, with_parameters
from timesformer_jax.models.tokens import Tokens, drop_path

# The attentions of a block in the order of the paper, with the oracle's name of each, and whether
# it has a temporal_fc.
BLOCKS = {
    "divided": [("temporal", "temporal", True), ("spatial", "spatial", False)],
    "space": [("spatial", "spatial", False)],
    "joint": [("joint", "joint", False)],
    "local_global": [("local", "local", True), ("global", "global", False)],
    "axial": [
        ("temporal", "temporal", True), ("width", "width", True), ("height", "height", False),
    ],
    "time": [("temporal", "temporal_with_token", False)],
    "space_then_time": [("spatial", "spatial", False), ("temporal", "temporal", True)],
    "parallel": [("temporal", "temporal", True), ("spatial", "spatial", False)],
}  # fmt: skip
TOKENLESS = ("temporal",)
FRAMES, GRID, PATCH = 5, (3, 4), 2


def config_of(scheme: str, **overrides) -> tsf.TimeSformerConfig:
    fields = {
        "num_classes": 3, "image_size": 4, "num_frames": 4, "patch_size": PATCH, "hidden_size": 8,
        "depth": 2, "num_heads": 2, "mlp_ratio": 2, "drop_path": 0.0,
    }  # fmt: skip
    return tsf.TimeSformerConfig(attention=scheme, **fields | overrides)


def random_parameters(config: tsf.TimeSformerConfig, seed: int = 0) -> dict:
    """Every parameter random, zero-initialised ones too: a trained model."""
    rng = np.random.default_rng(seed)
    shapes = parameters(abstract(config))

    def draw(path, x):
        scale = 1.0 if "embedding" in str(path[0]) else 0.5
        return (rng.standard_normal(x.shape) * scale).astype(np.float32)

    return jax.tree.map_with_path(draw, shapes)


def random_video(frames=FRAMES, grid=GRID, batch=2, seed=1) -> np.ndarray:
    shape = (batch, frames, grid[0] * PATCH, grid[1] * PATCH, 3)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def compiled(config: tsf.TimeSformerConfig):
    """(parameters, video, direction) to logits and the gradients of their sum along `direction`."""

    def run(params, video, direction):
        out, vjp = jax.vjp(lambda p, v: with_parameters(config, p)(v), params, video)
        return out, vjp(direction)

    return jax.jit(run)


def run(config, params, video):
    direction = np.random.default_rng(2).standard_normal((len(video), config.num_classes))
    return compiled(config)(params, video, direction.astype(np.float32)), direction


def reference_embedding(config, p, clip):
    """The classification token (d,), or (T, d) for space only, and the patches (T, h, w, d)."""
    d, t = config.hidden_size, clip.shape[0]
    h, w = clip.shape[1] // PATCH, clip.shape[2] // PATCH
    side = config.image_size // PATCH
    patches = torch.empty(t, h, w, d, dtype=torch.float64)
    for f, y, x in np.ndindex(t, h, w):
        pixels = clip[f, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
        token = pixels.reshape(-1) @ p["embedding/patch/kernel"] + p["embedding/patch/bias"]
        if config.position_embedding != "none":
            token = token + p["embedding/space"][1 + y * side // h * side + x * side // w]
        if config.position_embedding == "space_time" and config.attention != "space":
            token = token + p["embedding/time"][f * config.num_frames // t]
        patches[f, y, x] = token
    cls = p["embedding/cls"]
    if config.position_embedding != "none":
        cls = cls + p["embedding/space"][0]
    return cls.expand(t, d) if config.attention == "space" else cls, patches


def reference(
    config, p: dict[str, torch.Tensor], clip: torch.Tensor, attention=brute_force
) -> torch.Tensor:
    """Logits of one clip (T, H, W, 3), slowly: a frame, a patch, a token copy at a time."""
    d = config.hidden_size
    cls, patches = reference_embedding(config, p, clip)
    t, h, w, _ = patches.shape

    def linear(x, name):
        return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    def norm(x, name):
        return F.layer_norm(x, (d,), p[f"{name}/scale"], p[f"{name}/bias"], eps=1e-6)

    for block in range(config.depth):
        block_input = cls, patches
        for name, oracle, has_fc in BLOCKS[config.attention]:
            at = f"blocks/{block}/attention/{name}"
            if f"{at}/qkv/kernel" not in p:  # not in this block
                continue
            read_cls, read = block_input if config.attention == "parallel" else (cls, patches)

            def project_in(x, at=at):
                kernel, bias = p[f"{at}/qkv/kernel"].flatten(1), p[f"{at}/qkv/bias"].flatten()
                qkv = norm(x, f"{at}/norm") @ kernel + bias
                return qkv.reshape(*x.shape[:-1], 3, -1, d // config.num_heads)

            def project_out(x, at=at, has_fc=has_fc):
                x = linear(x, f"{at}/proj")
                return linear(x, f"{at}/temporal_fc") if has_fc else x

            copies = None
            if oracle not in TOKENLESS:
                copies = project_in(read_cls.expand(len(sequences(oracle, t, h, w)), d))
            out_cls, out = attention(oracle, copies, project_in(read))
            patches = patches + project_out(out)
            if out_cls is not None:
                update = project_out(out_cls)
                cls = cls + (update if config.attention == "space" else update.mean(dim=0))
        mlp = f"blocks/{block}/mlp"

        def feed_forward(x, mlp=mlp):
            return linear(F.gelu(linear(norm(x, f"{mlp}/norm"), f"{mlp}/fc1")), f"{mlp}/fc2")

        cls, patches = cls + feed_forward(cls), patches + feed_forward(patches)
    cls = cls.mean(dim=0) if config.attention == "space" else cls
    return linear(norm(cls, "norm"), "head")


def assert_near(ours, theirs, rtol):
    """Within rtol of the largest entry."""
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * max(np.abs(theirs).max(), 1e-6))


@pytest.fixture
def uneven(monkeypatch):
    """A scheme whose blocks differ, and of whose attentions one is narrower: its name."""
    temporal = TIME._replace(has_temporal_fc=True, width=0.5, every=2)
    monkeypatch.setitem(SCHEMES, "uneven", Scheme((temporal, SPATIAL)))
    oracles = [("temporal", "temporal_with_token", True), ("spatial", "spatial", False)]
    monkeypatch.setitem(BLOCKS, "uneven", oracles)
    return "uneven"


def test_blocks_that_differ_equal_the_same_written_out(uneven):
    check_against_reference(config_of(uneven, depth=3))
    params = parameters(abstract(config_of(uneven, depth=3)))["blocks"]
    assert ["temporal" in params[i]["attention"] for i in "012"] == [True, False, True]
    assert params["0"]["attention"]["temporal"]["qkv"]["kernel"].shape == (8, 3, 4)
    with pytest.raises(tsf.InputError, match="set scan_layers=False"):
        config_of(uneven, scan_layers=True)
    with pytest.raises(tsf.InputError, match="times num_heads 1, which is no whole number"):
        config_of(uneven, num_heads=1)


@pytest.mark.compiles
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_and_gradients_equal_the_paper_written_out(scheme):
    check_against_reference(config_of(scheme))


def check_against_reference(config):
    params, video = random_parameters(config), random_video()
    (logits, (params_bar, video_bar)), direction = run(config, params, video)

    flat = traverse_util.flatten_dict(params, sep="/")
    p = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in flat.items()}
    clips = torch.tensor(video, dtype=torch.float64, requires_grad=True)
    theirs = torch.stack([reference(config, p, clip) for clip in clips])
    assert_near(logits, theirs.detach(), 1e-5)
    (theirs * torch.tensor(direction)).sum().backward()
    assert_near(video_bar, clips.grad, 1e-4)
    for name, ours in traverse_util.flatten_dict(params_bar, sep="/").items():
        gradient = torch.zeros_like(p[name]) if p[name].grad is None else p[name].grad
        np.testing.assert_allclose(
            ours, gradient, rtol=1e-3, atol=2e-5 * max(gradient.abs().max(), 1), err_msg=name
        )


@pytest.mark.compiles
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_patch_of_the_video_reaches_the_logits(scheme):
    config = config_of(scheme)
    (_, (_, video_bar)), _ = run(config, random_parameters(config), random_video())
    of_patch = np.abs(video_bar).reshape(2, FRAMES, GRID[0], PATCH, GRID[1], PATCH, 3)
    assert of_patch.max(axis=(3, 5, 6)).min() > 1e-5


# Without a temporal embedding a clip is a set of frames to all but local_global, whose stride
# tells odd from even frames.
@pytest.mark.parametrize(
    ("time_embedding", "ordered"),
    [(True, set(SCHEMES) - {"space"}), (False, {"local_global"})],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_depend_on_the_order_of_frames_where_they_should(scheme, time_embedding, ordered):
    config = config_of(scheme)
    params, video = random_parameters(config, seed=1), random_video()
    if not time_embedding and "time" in params["embedding"]:
        params["embedding"]["time"] = np.zeros_like(params["embedding"]["time"])
    (there, _), _ = run(config, params, video)
    (shuffled, _), _ = run(config, params, video[:, [3, 0, 4, 1, 2]])
    change = np.abs(there - shuffled).max() / np.abs(there).max()
    right = (change > 1e-3) if scheme in ordered else (change < 1e-5)
    assert right, f"{scheme} changes by {change:.1e}; is it rightly in `ordered`, or not?"


@pytest.mark.parametrize("scheme", ["divided", "space_then_time", "parallel"])
def test_a_new_model_of_space_and_time_starts_as_the_image_model(scheme):
    config, image = config_of(scheme), config_of("space")
    new = parameters(tsf.TimeSformer(config, rngs=nnx.Rngs(0)))
    shared = jax.tree.map(lambda x: x, new)
    shared["embedding"].pop("time")
    for block in shared["blocks"].values():
        block["attention"].pop("temporal")
    still = np.repeat(random_video(frames=1), FRAMES, axis=1)
    (logits, _), _ = run(config, new, still)
    (image_logits, _), _ = run(image, shared, still)
    assert_near(logits, image_logits, 1e-5)


def test_one_attention_of_a_block_has_no_temporal_fc_and_those_of_the_others_start_at_zero():
    for scheme, layers in BLOCKS.items():
        params = parameters(abstract(config_of(scheme, depth=1)))
        attention = params["blocks"]["0"]["attention"]
        found = {name: "temporal_fc" in attention[name] for name in attention}
        assert found == {name: has_fc for name, _, has_fc in layers}
    params = parameters(tsf.TimeSformer(config_of("axial", depth=1), rngs=nnx.Rngs(0)))
    for name in ("temporal", "width"):
        attention = params["blocks"]["0"]["attention"][name]
        assert not np.any(attention["temporal_fc"]["kernel"])
        assert not np.any(attention["temporal_fc"]["bias"])
        assert np.all(attention["proj"]["kernel"])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_drop_path_draws_once_a_sequence_for_its_patches_and_its_token(scheme):
    config, rate = config_of(scheme), 0.5
    rng = np.random.default_rng(0)
    b, t, grid, n = 2, FRAMES, GRID, math.prod(GRID)
    cls_shape = (b, t, 8) if config.scheme.token_per_frame else (b, 8)
    x = Tokens(*(rng.standard_normal(s).astype(np.float32) for s in (cls_shape, (b, t, n, 8))))
    for layer in config.scheme.layers:
        layer = layer._replace(has_temporal_fc=False)
        module = Attention(config, layer, rngs=nnx.Rngs(0))
        number = layer.partition(t, grid)
        count = number.max() + 1
        copies = None
        if layer.joins_cls:
            copies = x.cls if x.cls.ndim == 3 else np.repeat(x.cls[:, None], count, axis=1)

        @jax.jit
        def run(x, copies, key, module=module, layer=layer):
            normed = jax.tree.map(module.norm, Tokens(copies, x.patches))
            mixed = layer.attend(jax.tree.map(module._split_heads, module.qkv(normed)), grid)
            return module(x, grid), module(x, grid, key, rate), module.proj(mixed).cls

        kept, dropped, update = run(x, copies, jax.random.key(3))
        factor = np.asarray(dropped.patches / kept.patches)
        draws = np.empty((b, count), np.float32)
        for clip, sequence in np.ndindex(draws.shape):
            drawn = factor[clip][number == sequence]
            draws[clip, sequence] = round(drawn.flat[0])
            np.testing.assert_allclose(drawn, draws[clip, sequence], atol=1e-4)
        assert set(draws.flat) <= {0.0, 2.0}
        assert count < 4 or set(draws.flat) == {0.0, 2.0}  # sequences do differ
        if layer.joins_cls:
            expected = update * draws[..., None]
            expected = expected if config.scheme.token_per_frame else expected.mean(axis=1)
            np.testing.assert_allclose(dropped.cls, expected, atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_drop_path_keeps_the_expectation(rate):
    number = np.arange(6).reshape(2, 3)
    x = Tokens(jnp.ones((50, 6, 1)), jnp.ones((50, 2, 3, 1)))
    keys = jax.random.split(jax.random.key(0), 200)
    y = jax.jit(jax.vmap(lambda key: drop_path(x, rate, number, key)))(keys)
    np.testing.assert_allclose(y.patches.mean(axis=(0, 1)), 1, atol=0.05)
    np.testing.assert_array_equal(y.cls, y.patches.reshape(y.cls.shape))
    assert drop_path(x, rate, number, None) is x
    assert drop_path(x, 0.0, number, keys[0]) is x


def test_drop_path_rises_linearly_and_acts_only_with_a_key():
    model = tsf.TimeSformer(config_of("divided", depth=3, drop_path=0.4), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(model.config.drop_path_rates, [0, 0.2, 0.4])
    video = random_video()
    drop = jax.jit(lambda key: model(video, key=key))
    outputs = [drop(jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[1] - outputs[2]).max() > 0


@pytest.mark.compiles
def test_remat_changes_no_number():
    config = config_of("joint", drop_path=0.3)
    params, video, key = random_parameters(config), random_video(), jax.random.key(0)

    def gradient(config):
        def loss(params):
            return with_parameters(config, params)(video, key=key).var()

        return jax.jit(jax.grad(loss))(params)

    plain, remat = gradient(config), gradient(dataclasses.replace(config, remat="block"))
    jax.tree.map(lambda a, b: assert_near(a, b, 1e-4), plain, remat)


# Position embeddings


def test_position_embedding_has_the_parameters_it_names():
    found = {
        (scheme, kind): {
            name
            for name in ("space", "time")
            if name in parameters(abstract(config_of(scheme, position_embedding=kind)))["embedding"]
        }
        for scheme in ("divided", "space")
        for kind in ("none", "space", "space_time")
    }
    for (scheme, kind), names in found.items():
        wanted = {"none": set(), "space": {"space"}, "space_time": {"space", "time"}}[kind]
        assert names == wanted - ({"time"} if scheme == "space" else set())


def test_without_position_embedding_a_clip_is_a_set_of_patches():
    config = config_of("joint", position_embedding="none", depth=1)
    params, video = random_parameters(config), random_video()
    turned = video[:, ::-1].reshape(2, FRAMES, GRID[0], PATCH, GRID[1], PATCH, 3)
    turned = turned[:, :, ::-1, :, [2, 0, 3, 1]].reshape(video.shape)
    (there, _), _ = run(config, params, video)
    (back, _), _ = run(config, params, turned)
    assert_near(there, back, 1e-5)
    placed = config_of("joint", position_embedding="space", depth=1)
    params = random_parameters(placed)
    (there, _), _ = run(placed, params, video)
    (back, _), _ = run(placed, params, turned)
    assert np.abs(there - back).max() / np.abs(there).max() > 1e-3


side = st.integers(1, 40)


@hypothesis.given(side, side)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=50)
def test_nearest_resize_is_pytorchs(old, new):
    table = torch.arange(old, dtype=torch.float32)[:, None]
    expected = F.interpolate(table.T[None], size=new, mode="nearest")[0].T
    np.testing.assert_array_equal(resize_time(jnp.asarray(table), new), expected)


@pytest.mark.parametrize("new", [(3, 5), (5, 3), (9, 12), (7, 2)])
def test_nearest_resize_of_space_is_pytorchs_and_leaves_the_token(new):
    table = np.random.default_rng(0).standard_normal((1 + 15, 4)).astype(np.float32)
    out = resize_space(jnp.asarray(table), (3, 5), new)
    grid = torch.tensor(table[1:].reshape(3, 5, 4)).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, size=new, mode="nearest")[0].permute(1, 2, 0)
    np.testing.assert_array_equal(out[0], table[0])
    np.testing.assert_array_equal(out[1:], expected.reshape(-1, 4))


@pytest.mark.parametrize("new", [(14, 20), (4, 3), (9, 30)])
def test_bicubic_resize_of_space_is_pillows_bicubic(new):
    table = np.random.default_rng(0).standard_normal((1 + 7 * 10, 2)).astype(np.float32)
    out = np.asarray(resize_space(jnp.asarray(table), (7, 10), new, "bicubic"))
    np.testing.assert_array_equal(out[0], table[0])
    for channel in range(2):
        image = PIL.Image.fromarray(table[1:, channel].reshape(7, 10))
        expected = np.asarray(image.resize(new[::-1], PIL.Image.Resampling.BICUBIC))
        np.testing.assert_allclose(out[1:, channel].reshape(new), expected, atol=1e-5)


@pytest.mark.parametrize("new", [3, 8, 13, 96])
def test_bicubic_resize_of_time_is_linear(new):
    table = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    out = resize_time(jnp.asarray(table), new, "bicubic")
    expected = F.interpolate(torch.tensor(table).T[None], size=new, mode="linear")[0].T
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_model_resizes_its_positions_to_the_clip_as_configured():
    # A model made for the clip's size, given the resized tables, is the model resized at run time.
    base = config_of("joint", image_size=6, num_frames=3, depth=1)
    params, video = random_parameters(base), random_video(frames=7, grid=(4, 4))
    native = config_of("joint", image_size=8, num_frames=7, depth=1)
    logits = {}
    for how in ("nearest", "bicubic"):
        resized = jax.tree.map(lambda x: x, params)
        resized["embedding"]["space"] = resize_space(
            params["embedding"]["space"], base.grid, native.grid, how
        )
        resized["embedding"]["time"] = resize_time(params["embedding"]["time"], 7, how)
        (logits[how], _), _ = run(dataclasses.replace(base, position_resize=how), params, video)
        (expected, _), _ = run(native, resized, video)
        assert_near(logits[how], expected, 1e-5)
    assert np.abs(logits["nearest"] - logits["bicubic"]).max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"attention": "divide"}, "did you mean 'divided'"),
        ({"position_resize": "bilinear"}, "must be one of nearest, bicubic"),
        ({"position_embedding": "spacetime"}, "did you mean 'space_time'"),
        ({"hidden_size": 10, "num_heads": 3}, "not divisible by num_heads 3"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields, says):
    with pytest.raises(tsf.InputError, match=says):
        tsf.TimeSformerConfig(**fields)


def test_presets_are_the_papers():
    sizes = {
        name: (c.num_frames, c.image_size, c.patch_size, c.hidden_size, c.depth, c.num_heads)
        for name, c in tsf.PRESETS.items()
    }
    assert sizes["timesformer_base"] == (8, 224, 16, 768, 12, 12)
    assert sizes["timesformer_hr"] == (16, 448, 16, 768, 12, 12)
    assert sizes["timesformer_l"] == (96, 224, 16, 768, 12, 12)
    assert sizes["timesformer_vit_s"] == (8, 224, 16, 384, 12, 6)
    assert sizes["timesformer_vit_l"] == (8, 224, 16, 1024, 24, 16)
    assert sizes["timesformer_p32"] == (8, 224, 32, 768, 12, 12)
    assert tsf.preset("timesformer_hr", attention="axial").scheme is SCHEMES["axial"]
    with pytest.raises(tsf.InputError, match="did you mean 'timesformer_base'"):
        tsf.preset("timesformer_bas")
