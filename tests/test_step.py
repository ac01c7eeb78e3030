"""What a training step computes, keeps and sends, and what the loop makes of it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_costs import equations, products

from timesformer_jax import recipes
from timesformer_jax.checkpoints import store as checkpoints
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.distributed.mesh import check_batch, make_mesh, put_batch
from timesformer_jax.errors import InputError
from timesformer_jax.evaluation.metrics import Results
from timesformer_jax.models import costs
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.timesformer import TimeSformer, parameters, with_parameters
from timesformer_jax.planning.collectives import collectives
from timesformer_jax.training import loop, run
from timesformer_jax.training.optimizer import make_optimizer
from timesformer_jax.training.step import abstract_state, init_state, make_train_step
from timesformer_jax.transforms.augmentation import OFF, Augmentation
from timesformer_jax.transforms.preprocess import crop

pytestmark = pytest.mark.training

CLIP = ClipSpec(frames=2, crop=8, short_side=10)
MODEL = TimeSformerConfig(
    num_classes=3, image_size=8, num_frames=2, patch_size=4, hidden_size=8, depth=1, num_heads=2,
    attention="joint", drop_path=0.0, init="width_scaled",
)  # fmt: skip
SCHEDULE = optax.constant_schedule(0.1)


def first_parameters(model=MODEL):
    return parameters(TimeSformer(model, rngs=nnx.Rngs(0)))


def batch(size=16):
    rng = np.random.default_rng(0)
    return {
        "frames": rng.integers(0, 256, (size, 2, 10, 10, 3), dtype=np.uint8),
        "crop_boxes": np.tile(np.float32([1, 1, 8]), (size, 1)),
        "flip": rng.random(size) < 0.5,
        "augment_seed": rng.integers(0, 2**32, size, dtype=np.uint32),
        "label": rng.integers(0, 3, size, dtype=np.int32),
    }


class Compiled:
    """A step for a mesh, traced and, where asked for, compiled and run."""

    def __init__(self, mesh, model=MODEL, optimizer=(), augmentation=OFF, **options):
        config = recipes.recipe().optimizer
        config.update(dict(optimizer))
        self.mesh = mesh
        self.optimizer = make_optimizer(config, SCHEDULE)
        ema = options.get("ema_decay", 0) > 0
        self.target = abstract_state(model, self.optimizer, mesh, ema=ema)
        step = make_train_step(
            model, CLIP, self.optimizer, SCHEDULE, self.target, mesh, 0, augmentation,
            trainable=config.trainable, **options,
        )  # fmt: skip
        with jax.set_mesh(mesh):
            self.traced = step.trace(self.target, put_batch(mesh, batch()))

    @functools.cached_property
    def program(self):
        return self.traced.lower().compile()

    def run(self, steps=1, first=None, clips=None):
        """The states, from the first on, and the metrics, of steps with the same batch."""
        first, clips = first or first_parameters(), clips or batch()
        with jax.set_mesh(self.mesh):
            state = init_state(first, self.optimizer, self.target)
            states, metrics = [jax.device_get(state)], []
            for _ in range(steps):
                state, found = self.program(state, put_batch(self.mesh, clips))
                states.append(jax.device_get(state))
                metrics.append({name: float(value) for name, value in found.items()})
        return states, metrics


def one_device():
    return make_mesh(1, 1, devices=jax.devices()[:1])


@functools.cache
def plain():
    return Compiled(one_device())


@functools.cache
def averaging():
    return Compiled(one_device(), optimizer={"name": "adamw", "clip_norm": 1.0}, ema_decay=0.9)


# bfloat16


def gradients(dtype):
    model = TimeSformerConfig(
        num_classes=3, image_size=16, num_frames=4, patch_size=4, hidden_size=32, depth=1,
        num_heads=2, init="width_scaled", dtype=dtype,
    )  # fmt: skip
    video = np.random.default_rng(0).standard_normal((4, 4, 16, 16, 3), np.float32)

    def loss(params):
        logits = with_parameters(model, params)(video)
        labels = jnp.array([0, 1, 2, 0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    params = first_parameters(model)
    run = jax.jit(jax.value_and_grad(loss))
    return jax.make_jaxpr(loss)(params), *run(params)


def test_bfloat16_multiplies_in_it_and_adds_up_in_float32():
    jaxpr, loss, gradient = gradients("bfloat16")
    _, exact_loss, exact = gradients("float32")
    # Softmax, norms and loss; and the products of linear layers.
    found = list(equations(jaxpr))
    wide = [e for e in found if e.primitive.name in ("exp", "log", "rsqrt", "reduce_max")]
    assert {e.primitive.name for e in wide} == {"exp", "log", "rsqrt", "reduce_max"}
    assert all(e.invars[0].aval.dtype == jnp.float32 for e in wide)
    products = [e for e in found if e.primitive.name == "dot_general"]
    # Fusing multiplies parameters, (32, 32) and (32,), before they are rounded.
    fused, others = [], []
    for e in products:
        shapes = {v.aval.shape for v in (*e.invars, *e.outvars)}
        (fused if shapes <= {(32,), (32, 32)} else others).append(e.invars[0].aval.dtype)
    *body, head = others
    assert set(body) == {jnp.dtype(jnp.bfloat16)}
    assert head == jnp.float32
    assert set(fused) == {jnp.dtype(jnp.float32)}

    assert 1e-6 < abs(loss - exact_loss) < 0.02 * exact_loss

    def compare(path, ours, theirs):
        assert ours.dtype == jnp.float32
        # One that was rounded to bfloat16 on its way would lie on its grid.
        on_grid = np.mean(ours == ours.astype(jnp.bfloat16))
        assert on_grid < 0.8, jax.tree_util.keystr(path)
        difference = np.linalg.norm(ours - theirs)
        assert difference < 0.05 * max(np.linalg.norm(theirs), 1e-2), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(compare, gradient, exact)


def test_in_bfloat16_the_state_and_the_metrics_are_float32():
    model = TimeSformerConfig(**vars(MODEL) | {"dtype": "bfloat16"})
    state, metrics = Compiled(one_device(), model, {"name": "adamw"}, ema_decay=0.9).traced.out_info
    integers = [x for x in jax.tree.leaves(state) if x.dtype != jnp.float32]
    assert all(x.dtype == jnp.int32 and x.ndim == 0 for x in integers)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(metrics))


# Accumulation

MIXING = Augmentation(label_smoothing=0.1, mixup=0.8)


def assert_same_training(ours, theirs):
    (found, metrics), (expected, expected_metrics) = ours.run(2), theirs.run(2)
    for a, b in zip(metrics, expected_metrics):
        assert a == pytest.approx(b, rel=1e-4)
    assert_near(found[-1].params, expected[-1].params, 2e-5)


def assert_near(ours, theirs, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), ours, theirs)


def test_a_batch_in_parts_is_the_batch():
    assert_same_training(Compiled(one_device(), accumulate_steps=4), plain())


def test_a_mixed_batch_in_parts_is_the_batch_and_no_clip_changes_its_device():
    mesh = make_mesh(2, 2, devices=jax.devices()[:4])
    whole = Compiled(mesh, augmentation=MIXING)
    parts = Compiled(mesh, augmentation=MIXING, accumulate_steps=4)
    assert_same_training(parts, whole)
    # Mixing sends a clip from each device to the next; parts send no others. (Sums are of scalars
    # and gradients, as they happen to be put together.)
    sent, allowed = (
        {(c.kind, c.num_bytes) for c in collectives(compiled.program, mesh)}
        for compiled in (parts, whole)
    )
    assert {c for c in sent if c[0] != "all-reduce"} <= allowed


def test_drop_path_draws_anew_in_every_part():
    """Clips that change their part keep the loss only if both parts drop the same paths."""

    def losses(drop_path):
        model = TimeSformerConfig(**vars(MODEL) | {"drop_path": drop_path, "depth": 2})
        step = Compiled(one_device(), model, accumulate_steps=2)
        first, clips = first_parameters(model), batch()
        swapped = {name: x.reshape(8, 2, *x.shape[1:])[:, ::-1] for name, x in clips.items()}
        swapped = {name: x.reshape(clips[name].shape) for name, x in swapped.items()}
        found = (step.run(first=first, clips=c)[1][0]["loss"] for c in (clips, swapped))
        return tuple(found)

    kept, swapped = losses(0.0)
    assert kept == pytest.approx(swapped, rel=1e-6)
    kept, swapped = losses(0.5)
    assert kept != pytest.approx(swapped, rel=1e-4)


def test_a_batch_that_does_not_divide_into_parts_gives_a_one_line_error():
    check_batch(make_mesh(), 32, "--config.batch_size", 4)
    with pytest.raises(InputError, match=r"= 8 devices, 4 parts each; .*of 32, 32 f"):
        check_batch(make_mesh(), 40, "--config.batch_size", 4)


# Memory, the average, the head


def test_every_array_of_the_state_is_written_where_it_was():
    (aliases,) = re.findall(r"input_output_alias=\{(.*?)\}, \w+=", averaging().program.as_text())
    assert aliases.count("-alias)") == len(jax.tree.leaves(averaging().target))


def test_the_moving_average_is_that_of_the_parameters():
    states, _ = averaging().run(3)
    average = states[0].params
    for state in states[1:]:
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, state.params)
        assert_near(state.ema, average, 1e-6)
    last = states[-1]
    assert last.best_params is last.ema
    assert np.abs(last.ema["head"]["kernel"] - last.params["head"]["kernel"]).max() > 1e-3
    assert last._replace(ema=None).best_params is last.params


def test_training_the_head_alone_leaves_the_rest_and_computes_no_gradient_of_it():
    head = Compiled(one_device(), optimizer={"trainable": "head"})
    (first, after), (metrics,) = head.run()
    (_, expected), (all_metrics,) = plain().run()
    assert metrics["loss"] == pytest.approx(all_metrics["loss"], rel=1e-5)
    assert metrics["gradient_norm"] < all_metrics["gradient_norm"]
    for name, part in after.params.items():
        if name == "head":
            assert_near(part, expected.params[name], 1e-6)
            assert np.abs(part["kernel"] - first.params[name]["kernel"]).max() > 1e-3
        else:
            jax.tree.map(np.testing.assert_array_equal, part, first.params[name])
    # A backward pass costs about twice the forward pass, less where the last MLP's patches are of
    # no use; the head's next to nothing.
    frames, crop_boxes = batch()["frames"], batch()["crop_boxes"]
    forward = products(jax.make_jaxpr(lambda f, w: crop(f, w, 8))(frames, crop_boxes))
    model = len(frames) * costs.macs(MODEL)
    backward = [products(each.traced.jaxpr) - forward - model for each in (head, plain())]
    assert 0 < backward[0] < 0.01 * model < 0.8 * model < backward[1]


# The loop


@pytest.fixture
def config(demo_data):
    config = recipes.demo()
    config.data.update(directory=str(demo_data), demo="")
    config.model.update(depth=1, hidden_size=16, num_heads=2, attention="space")
    config.update(epochs=2, batch_size=32, log_every_steps=100)
    config.optimizer.warmup_epochs = 0.0
    config.eval.update(batch_size=24, every_epochs=0, crops=1)
    config.checkpoint.every_steps = 1
    return config


def poisoned(at, where):
    """A step that trains nothing, and goes wrong at one step: in its loss or its parameters."""

    def make(*_, **__):
        def step(state, _):
            wrong = float("nan") if int(state.step) + 1 == at else 0.0
            metrics = dict.fromkeys(("loss", "accuracy", "gradient_norm"), jnp.float32(1))
            metrics["learning_rate"] = jnp.float32(0.25)
            if where == "params":
                params = jax.tree.map(lambda x: x + wrong, state.params)
                state = state._replace(params=params)
            else:
                metrics[where] = metrics[where] + wrong
            return state._replace(step=state.step + 1), metrics

        return step

    return make


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("loss", "the loss is nan at step 4, at learning rate 0.25"),
        ("gradient_norm", "the gradient norm is nan at step 4, at learning rate 0.25"),
        ("params", "the parameters are not finite after step 6"),
    ],
)
def test_what_is_not_finite_ends_the_run_and_is_not_saved(
    config, tmp_path, monkeypatch, where, said
):
    monkeypatch.setattr(run, "make_train_step", poisoned(4, where))
    config.checkpoint.every_steps, config.epochs, config.batch_size = 3, 2, 16
    config.eval.batch_size = 16
    with pytest.raises(InputError, match=said) as e:
        loop.train(config, tmp_path / "run")
    saved = checkpoints.Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    assert saved.steps() == [3]
    assert str(e.value).endswith(f"the last good checkpoint is {saved.directory / '3'}")


def test_where_nothing_was_saved_the_line_says_so(config, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "make_train_step", poisoned(1, "loss"))
    with pytest.raises(InputError, match=r"at step 1, .*; no checkpoint was saved before"):
        loop.train(config, tmp_path / "run")


def test_the_moving_average_is_saved_resumed_evaluated_and_used_to_predict(
    config, tmp_path, monkeypatch
):
    """Goes on scanned and with remat, which are no matter of the checkpoint."""
    states, evaluated, told = [], [], []

    def make(*_, ema_decay, **__):
        told.append(ema_decay)

        def step(state, _):
            states.append(jax.device_get(state))
            state = state._replace(
                step=state.step + 1,
                params=jax.tree.map(lambda x: x + 1, state.params),
                ema=jax.tree.map(lambda x: x + 0.5, state.ema),
            )
            states.append(jax.device_get(state))
            return state, dict.fromkeys(("loss", "gradient_norm", "learning_rate"), jnp.float32(1))

        return step

    def evaluate(params, *_, **__):
        evaluated.append(jax.device_get(params))
        return Results(tuple("abcdefgh"), np.array(list("abcdefgh")), np.arange(8), np.eye(8))

    monkeypatch.setattr(run, "make_train_step", make)
    monkeypatch.setattr(loop, "evaluate", evaluate)
    config.ema_decay, config.epochs = 0.5, 1
    loop.train(config, tmp_path / "run")
    config.epochs = 2
    config.model.update(scan_layers=True, remat="block")
    loop.train(config, tmp_path / "run")

    before, after = states[::2], states[1::2]
    assert len(before) == 4
    jax.tree.map(np.testing.assert_array_equal, before[0].ema, before[0].params)
    jax.tree.map(np.testing.assert_array_equal, before[2], after[1])  # the second call's start
    _, loaded = checkpoints.load_parameters(tmp_path / "run")
    for found in (loaded, evaluated[-1]):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), after[-1].ema)

    config.ema_decay = 0.0
    with pytest.raises(InputError, match=r"ema_decay is 0\.0, saved was 0\.5"):
        loop.train(config, tmp_path / "run")
    assert told == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("accumulate_steps", 0, "accumulate_steps must be a whole number from 1"),
        ("accumulate_steps", 3, "3 parts each; set --config.batch_size to a multiple of 24"),
        ("ema_decay", 1.0, "ema_decay must be a number from 0 to below 1, not 1"),
        ("ema_decay", -0.1, "ema_decay must be a number from 0"),
        ("optimizer.clip_norm", -1.0, "clip_norm must be a number from 0"),
        ("optimizer.trainable", "tail", "optimizer.trainable must be all or head"),
        ("model.remat", "blocks", "remat must be one of .*did you mean 'block'"),
    ],
)
def test_impossible_values_give_one_line_errors(config, tmp_path, field, value, said):
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=said) as e:
        loop.train(config, tmp_path / "run")
    assert "\n" not in str(e.value)
