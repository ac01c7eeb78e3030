"""Outputs of the released model and of its port, on random weights (tests/data/goldens)."""

import functools
import pathlib

import jax
import numpy as np
import optax
import pytest
from conftest import AS_USED

import timesformer_jax as tsf
from timesformer_jax import recipes
from timesformer_jax.models.ops.reference import use_references
from timesformer_jax.models.timesformer import parameters, with_parameters
from timesformer_jax.training.optimizer import make_optimizer

pytestmark = pytest.mark.compiles

GOLDENS = pathlib.Path(__file__).parent / "data" / "goldens"
SCHEMES = {"divided_space_time": "divided", "joint_space_time": "joint", "space_only": "space"}
CASES = ("native", "more_frames", "fewer_frames", "larger", "wide")


def difference(ours, theirs):
    """max|a - b| as a share of max|b|."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def outputs(model, video, compiler_options=None):
    """The logits and features of a clip."""

    def run(video):
        return model(video), model.features(video)

    return jax.jit(run, compiler_options=compiler_options)(video)


@functools.cache
def released(name):
    return tsf.from_pretrained(GOLDENS / f"official_{name}.pyth", num_heads=4)


@pytest.fixture(params=["fast", "references"])
def form(request):
    """The goldens hold for the fast forms of the operations and for their references."""
    with use_references(request.param == "references"):
        yield


@pytest.fixture(scope="module")
def goldens():
    return np.load(GOLDENS / "official.npz")


@pytest.mark.parametrize("name", SCHEMES)
def test_shape_and_scheme_are_read_off_the_file(name):
    config = released(name).config
    assert config.attention == SCHEMES[name]
    assert (config.image_size, config.patch_size) == (32, 8)
    assert (config.hidden_size, config.depth, config.num_classes) == (48, 3, 10)
    assert config.num_frames == (8 if name == "space_only" else 4)  # space only does not say


@pytest.mark.parametrize(
    ("form", "case"),
    # The other cases differ in how position embeddings are resized, which has one form.
    [*(("fast", case) for case in CASES), ("references", "native")],
    indirect=["form"],
)
@pytest.mark.parametrize("name", SCHEMES)
def test_release_checkpoint_gives_the_released_models_outputs(name, form, case, goldens):
    options = AS_USED if case == "native" else None
    logits, features = outputs(released(name), goldens[f"{name}/{case}/video"], options)
    assert difference(logits, goldens[f"{name}/{case}/logits"]) < 1e-4
    assert difference(features, goldens[f"{name}/{case}/features"]) < 1e-4


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", SCHEMES)
def test_goldens_are_near_in_bfloat16(name, goldens):
    path = GOLDENS / f"official_{name}.pyth"
    half = tsf.from_pretrained(path, num_heads=4, dtype="bfloat16")
    out, _ = outputs(half, goldens[f"{name}/native/video"])
    assert out.dtype == np.float32
    # Computed in bfloat16, and near.
    assert 1e-5 < difference(out, goldens[f"{name}/native/logits"]) < 0.05


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", ["divided_space_time", "joint_space_time"])
def test_hugging_face_directory_gives_its_models_outputs(name):
    goldens = np.load(GOLDENS / "hf.npz")
    model = tsf.from_pretrained(GOLDENS / f"hf_{name}")
    assert (model.config.attention, model.config.num_heads) == (SCHEMES[name], 4)
    logits, _ = outputs(model, goldens[f"{name}/video"])
    assert difference(logits, goldens[f"{name}/logits"]) < 1e-4


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("case", "image_size"), [("vit_same", 32), ("vit_resized", 64)])
def test_image_vit_becomes_the_model_that_the_release_builds_from_it(case, image_size):
    goldens = np.load(GOLDENS / "vit.npz")
    model = tsf.from_pretrained(
        GOLDENS / "timm_vit.pth",
        resize="official",
        attention="divided",
        num_heads=4,
        num_classes=10,
        num_frames=4,
        image_size=image_size,
    )
    embedding = parameters(model)["embedding"]
    assert np.array_equal(embedding["space"], goldens[f"{case}/state/pos_embed"][0])
    assert np.array_equal(embedding["time"], goldens[f"{case}/state/time_embed"][0])
    _, features = outputs(model, goldens[f"{case}/video"])
    assert difference(features, goldens[f"{case}/features"]) < 1e-4


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", SCHEMES)
def test_six_training_steps_follow_the_released_models(name):
    goldens = {k: v for k, v in np.load(GOLDENS / "train.npz").items() if k.startswith(name)}
    goldens = {k.split("/")[-1]: v for k, v in goldens.items()}
    model = tsf.from_pretrained(
        GOLDENS / f"train_start_{name}.pyth", num_heads=4, drop_path=0.0, num_frames=4
    )
    optimizer = make_optimizer(recipes.recipe().optimizer, optax.constant_schedule(0.005))

    def loss_of(params, video, labels):
        logits = with_parameters(model.config, params)(video)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, opt_state, video, labels):
        loss, grads = jax.value_and_grad(loss_of)(params, video, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, optax.tree.norm(grads)

    params = parameters(model)
    opt_state, losses, norms = optimizer.init(params), [], []
    for video, labels in zip(goldens["video"], goldens["labels"], strict=True):
        params, opt_state, loss, norm = step(params, opt_state, video, labels)
        losses.append(loss)
        norms.append(norm)
    np.testing.assert_allclose(losses, goldens["losses"], rtol=1e-4)
    np.testing.assert_allclose(norms, goldens["grad_norms"], rtol=1e-4)
    logits, _ = outputs(with_parameters(model.config, params), goldens["video"][0])
    assert difference(logits, goldens["final_logits"]) < 1e-4
