"""Augmentation against Pillow, and what a draw, a frame, a mesh and a label may change."""

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import skimage.data
from conftest import AS_USED
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image, ImageEnhance, ImageOps

from timesformer_jax import recipes
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.distributed.mesh import make_mesh, put_batch
from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformer, TimeSformerConfig, parameters
from timesformer_jax.planning.collectives import collectives
from timesformer_jax.training import loop, run
from timesformer_jax.training.step import abstract_state, init_state, make_train_step
from timesformer_jax.transforms import operations
from timesformer_jax.transforms.augment import augment, distort
from timesformer_jax.transforms.augmentation import Augmentation
from timesformer_jax.transforms.operations import ERASED_AREA, OPERATIONS

pytestmark = pytest.mark.compiles

SIDE = 96
FILL = (100 / 255, 120 / 255, 140 / 255)
EVERYTHING = Augmentation(
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    grayscale=0.2,
    randaugment_layers=2,
    randaugment_magnitude=7.0,
    erasing=0.5,
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
)


@pytest.fixture(scope="module")
def photographs():
    """A clip of three different photographs, none of black or white, (3, SIDE, SIDE, 3) uint8."""
    images = (skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee())
    small = np.stack([np.asarray(Image.fromarray(image).resize((SIDE, SIDE))) for image in images])
    return (20 + 0.8 * small).astype(np.uint8)


@pytest.fixture(scope="module")
def batch(photographs):
    """16 clips of 3 small frames, labels and draws."""
    frames = photographs[:, ::4, ::4].astype(np.float32) / 255
    clips = np.stack([np.roll(frames, i, axis=2) for i in range(16)])
    return clips, np.arange(16, dtype=np.int32) % 5, np.arange(100, 116, dtype=np.uint32)


def of_frames(edit):
    return lambda frames: np.stack([np.asarray(edit(Image.fromarray(f))) for f in frames])


def of_clip(edit):
    """Applies an edit of an image to all frames at once, one below the other."""
    return lambda frames: np.asarray(edit(Image.fromarray(np.concatenate(frames)))).reshape(
        frames.shape
    )


def affine(*coefficients):
    color = tuple(round(255 * x) for x in FILL)
    return lambda image: image.transform(
        image.size,
        Image.Transform.AFFINE,
        coefficients,
        Image.Resampling.BILINEAR,
        fillcolor=color,
    )


def turned(degrees):
    color = tuple(round(255 * x) for x in FILL)
    return lambda image: image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=color)


# Each operation of RandAugment at strength s as Pillow does it.
PILLOW = {
    "identity": lambda s: lambda frames: frames,
    "autocontrast": lambda s: of_clip(ImageOps.autocontrast),
    "equalize": lambda s: of_clip(ImageOps.equalize),
    "rotate": lambda s: of_frames(turned(30 * s)),
    "solarize": lambda s: of_clip(lambda i: ImageOps.solarize(i, 256 * (1 - abs(s)))),
    "color": lambda s: of_clip(lambda i: ImageEnhance.Color(i).enhance(1 + 0.9 * s)),
    "posterize": lambda s: of_clip(lambda i: ImageOps.posterize(i, 8 - round(4 * abs(s)))),
    "contrast": lambda s: of_clip(lambda i: ImageEnhance.Contrast(i).enhance(1 + 0.9 * s)),
    "brightness": lambda s: of_clip(lambda i: ImageEnhance.Brightness(i).enhance(1 + 0.9 * s)),
    "sharpness": lambda s: of_frames(lambda i: ImageEnhance.Sharpness(i).enhance(1 + 0.9 * s)),
    "shear_x": lambda s: of_frames(affine(1, 0.3 * s, 0, 0, 1, 0)),
    "shear_y": lambda s: of_frames(affine(1, 0, 0, 0.3 * s, 1, 0)),
    "translate_x": lambda s: of_frames(affine(1, 0, 0.45 * s * SIDE, 0, 1, 0)),
    "translate_y": lambda s: of_frames(affine(1, 0, 0, 0, 1, 0.45 * s * SIDE)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_pillows(name, photographs):
    ours = jax.jit(lambda clip, s: OPERATIONS[name](clip, s, jnp.asarray(FILL)))
    for strength in (-1.0, -0.35, 0.0, 0.6):
        clip = photographs / np.float32(255)
        found = 255 * np.asarray(ours(clip, strength))
        expected = PILLOW[name](strength)(photographs)
        # Pillow rounds to a level, of the grey too; ours does not.
        assert np.abs(found - expected).max() < 1.5
        changes = strength != 0 or name in ("autocontrast", "equalize")
        assert (np.abs(found - 255 * clip).max() > 0.9) == (changes and name != "identity")


def test_solarizing_with_no_strength_keeps_white():
    white = jnp.ones((1, 2, 2, 3))
    assert np.array_equal(OPERATIONS["solarize"](white, 0.0, None), white)


def test_a_single_value_has_no_contrast_to_stretch():
    flat = jnp.full((2, 8, 8, 3), 51 / 255)
    for operation in (operations.autocontrast, operations.equalize):
        np.testing.assert_allclose(jax.jit(operation)(flat), flat, atol=1e-6)


def test_hue_is_turned(photographs):
    pixels = photographs[0, ::12, ::12].reshape(-1, 3) / 255
    key = jax.random.key(3)
    jitter = jax.jit(functools.partial(operations.jitter_colors, strengths=(0, 0, 0, 0.3)))
    found = np.asarray(jitter(key, jnp.asarray(pixels, jnp.float32).reshape(1, 8, 8, 3)))
    (hue, *_), (turned, *_) = (
        colorsys.rgb_to_hsv(*p) for p in (pixels[0], found.reshape(-1, 3)[0].tolist())
    )
    turn = (turned - hue + 0.5) % 1 - 0.5
    assert 0.01 < abs(turn) <= 0.3
    for before, after in zip(pixels, found.reshape(-1, 3)):
        h, s, v = colorsys.rgb_to_hsv(*before)
        np.testing.assert_allclose(after, colorsys.hsv_to_rgb((h + turn) % 1, s, v), atol=1e-4)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_jitter_draws_each_factor_from_its_range(which):
    # A red that none of the three clips, and what the factor makes of it.
    color, strength = np.float32([0.5, 0.3, 0.2]), 0.4
    gray = color @ np.float32([0.2989, 0.587, 0.114])
    clip = jnp.asarray(np.stack([color, color / 2]).reshape(1, 1, 2, 3))
    strengths = [0.0] * 4
    strengths[which] = strength
    keys = jax.random.split(jax.random.key(0), 500)
    jitter = functools.partial(operations.jitter_colors, strengths=strengths)
    found = np.asarray(jax.jit(jax.vmap(lambda key: jitter(key, clip)))(keys))[:, 0, 0, 0, 0]
    away = (0.0, 0.75 * gray, gray)[which]  # from black, the clip's mean grey, the pixel's
    factors = (found - away) / (color[0] - away)
    uniform = scipy.stats.uniform(1 - strength, 2 * strength)
    assert scipy.stats.kstest(factors, uniform.cdf).pvalue > 0.01


def test_operations_and_directions_are_drawn_evenly(monkeypatch):
    def noted(number):
        """An operation that shifts its number and the signed strength into the frames."""

        def operation(clip, signed, fill):
            new = jnp.stack([number + 0.0, signed])[:, None, None, None]
            return jnp.concatenate([clip[2:], jnp.broadcast_to(new, (2, 1, 1, 3))])

        return operation

    told = {str(i): noted(i) for i in range(len(OPERATIONS))}
    monkeypatch.setattr(operations, "OPERATIONS", told)
    keys = jax.random.split(jax.random.key(0), 2800)
    clip = jnp.zeros((4, 1, 1, 3))
    draw = lambda key: operations.randaugment(key, clip, 2, 6.0, FILL)  # noqa: E731
    found = np.asarray(jax.jit(jax.vmap(draw))(keys))[..., 0, 0, 0].reshape(-1, 2, 2)
    first, second = found[:, 0], found[:, 1]
    for layer in (first, second):
        assert (
            scipy.stats.chisquare(np.bincount(layer[:, 0].astype(int), minlength=14)).pvalue > 0.01
        )
        assert np.array_equal(np.unique(layer[:, 1]), np.float32([-0.6, 0.6]))
        assert abs((layer[:, 1] > 0).mean() - 0.5) < 0.05
    pairs = np.histogram2d(first[:, 0], second[:, 0], bins=14)[0]
    assert scipy.stats.chisquare(pairs.ravel()).pvalue > 0.01


# Compiled quickly, rounding puts pixels at another level, and a later operation them far away.
@functools.partial(jax.jit, compiler_options=AS_USED)
def distorted(clip, draw):
    return distort(clip, draw, EVERYTHING, FILL)


def test_all_frames_are_treated_alike(photographs):
    frames = photographs[:, ::4, ::4].astype(np.float32) / 255
    clip, order = frames[[0, 1, 0]], [1, 2, 0]
    changed = 0
    for draw in np.arange(40, dtype=np.uint32):
        found = np.asarray(distorted(clip, draw))
        assert found.min() >= 0
        assert found.max() <= 1
        assert np.array_equal(found[0], found[2])
        # Sums over a clip in another order may round to another level.
        np.testing.assert_allclose(distorted(clip[order], draw), found[order], atol=1.01 / 255)
        changed += np.abs(found - clip).mean() > 0.02
    assert changed > 30


@functools.cache
def on_mesh(how, classes, *sizes):
    """The jitted augmentation of a batch on a mesh of these sizes."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    run = functools.partial(augment, augmentation=how, fill=FILL, classes=classes, mesh=mesh)
    return jax.jit(run, compiler_options=AS_USED)


DISTORTING = Augmentation(**vars(EVERYTHING) | {"mixup": 0.0, "cutmix": 0.0})
MIXING = Augmentation(mixup=0.8, cutmix=1.0, label_smoothing=0.1)


@pytest.mark.parametrize("how", [DISTORTING, MIXING])
def test_a_mesh_gives_what_one_device_does(batch, how):
    found, expected = (on_mesh(how, 5, *sizes)(*batch) for sizes in ((2, 4), (1, 1)))
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_mixing_sends_one_clip_from_each_device(batch):
    compiled = on_mesh(MIXING, 5, 2, 4).lower(*batch).compile()
    clip, target = 4 * 3 * 24 * 24 * 3, 4 * 5
    assert sorted(
        (c.kind, c.num_bytes, c.count) for c in collectives(compiled, make_mesh(2, 4))
    ) == [
        ("collective-permute", target, 1),
        ("collective-permute", clip, 1),
    ]


def test_a_clips_distortion_is_its_draws_wherever_it_lies(batch):
    order = np.random.default_rng(0).permutation(16)
    run = on_mesh(DISTORTING, 5, 2, 4)
    straight, labels = map(np.asarray, run(*batch))
    shuffled, others = run(*(x[order] for x in batch))
    assert np.array_equal(shuffled, straight[order])
    assert np.array_equal(others, labels[order])
    for i in (0, 7, 15):
        np.testing.assert_allclose(distorted(batch[0][i], batch[2][i]), straight[i], atol=1e-5)
    assert len({clip.tobytes() for clip in straight}) == 16


def test_one_clip_of_one_frame_is_its_own_partner(batch):
    clips, labels, draws = (x[:1] for x in batch)
    found, targets = on_mesh(MIXING, 5, 1, 1)(clips[:, :1], labels, draws)
    np.testing.assert_allclose(found, clips[:, :1], atol=1e-6)
    np.testing.assert_allclose(targets, [[0.92, 0.02, 0.02, 0.02, 0.02]], atol=1e-6)


def mixed(how, count=512, side=20):
    """Clips of two frames, each of its own number, mixed; and their targets, a class each."""
    numbers = np.arange(count, dtype=np.float32)
    clips = np.broadcast_to(numbers[:, None, None, None, None], (count, 2, side, side, 3))
    arguments = clips, numbers.astype(np.int32), numbers.astype(np.uint32)
    return map(np.asarray, on_mesh(how, count, 1, 1)(*arguments))


def own_pixels(found):
    numbers = np.arange(len(found))[:, None, None, None, None]
    assert np.isin(found - numbers, [0, -1, len(found) - 1]).all()
    return found == numbers


def test_cutmix_gives_each_label_the_share_of_its_pixels():
    found, targets = mixed(Augmentation(cutmix=1.0))
    own = own_pixels(found)
    shares = own[:, 0, :, :, 0].mean((1, 2), dtype=np.float32)
    numbers = np.arange(len(found))
    expected = np.zeros_like(targets)
    expected[numbers, numbers] = shares
    expected[numbers, numbers - 1] = 1 - shares
    np.testing.assert_allclose(targets, expected, atol=1.2e-7)  # of float32's last digit
    assert np.array_equal(own, np.broadcast_to(own[:, :1, :, :, :1], own.shape))
    for frame in ~own[:, 0, :, :, 0]:
        rows, columns = frame.any(1), frame.any(0)
        assert np.array_equal(frame, rows[:, None] & columns)  # a box
        for side in (rows, columns):
            assert np.count_nonzero(np.diff(side.astype(int), prepend=0, append=0)) in (0, 2)
    # The paper's draw in numpy: lambda uniform for alpha 1, a centre anywhere.
    random = np.random.default_rng(0)
    half = np.sqrt(random.random((2000, 1))) / 2
    centre = random.random((2000, 2))
    seen = np.minimum(centre + half, 1) - np.maximum(centre - half, 0)
    assert scipy.stats.ks_2samp(shares, 1 - seen.prod(-1)).pvalue > 0.01


def test_mixup_keeps_a_share_drawn_from_beta():
    found, targets = mixed(Augmentation(mixup=0.2))
    count = len(found)
    own = targets[np.arange(count), np.arange(count)]
    partner = targets[np.arange(count), np.arange(count) - 1]
    np.testing.assert_allclose(own + partner, 1, atol=1e-6)
    numbers = np.arange(count)
    expected = own * numbers + partner * np.roll(numbers, 1)
    everywhere = np.broadcast_to(expected[:, None, None, None, None], found.shape)
    np.testing.assert_allclose(found, everywhere, rtol=1e-5, atol=1e-4)
    assert scipy.stats.kstest(own, scipy.stats.beta(0.2, 0.2).cdf).pvalue > 0.01


def test_with_both_half_of_the_clips_get_each():
    found, targets = mixed(Augmentation(mixup=1.0, cutmix=1.0, label_smoothing=0.2))
    constant = (found == found[:, :1, :1, :1, :1]).all((1, 2, 3, 4))
    whole = (found[:, 0, 0, 0, 0] % 1 == 0) & constant  # too small a box to be seen
    assert 0.4 < (constant & ~whole).mean() < 0.6
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(targets.min(-1), 0.2 / len(found), rtol=1e-5)


def test_erasing_fills_one_box_in_all_frames():
    clip, side = jnp.ones((2, 64, 64, 3)), 64
    keys = jax.random.split(jax.random.key(0), 400)
    one = jax.jit(jax.vmap(lambda key: operations.erase(key, clip, 0.25, FILL)))
    found = np.asarray(one(keys))
    erased = (found == np.float32(FILL)).all(-1)
    assert np.array_equal(erased | (found == 1).all(-1), np.ones_like(erased))
    assert np.array_equal(erased[:, 0], erased[:, 1])
    boxes = erased[erased.any((1, 2, 3))][:, 0]
    assert 0.18 < len(boxes) / len(found) < 0.32
    for box in boxes:
        assert np.array_equal(box, box.any(1)[:, None] & box.any(0))
        rows, columns = box.any(1).sum(), box.any(0).sum()
        assert abs(np.log(rows / columns)) < np.log(1 / 0.3) + 0.15  # rounded to pixels
        room = (rows + columns + 1) / 2
        assert ERASED_AREA[0] * side**2 - room < box.sum() < ERASED_AREA[1] * side**2 + room
    for edge in (boxes[:, 0], boxes[:, -1], boxes[..., 0], boxes[..., -1]):
        assert edge.any()


def test_grayscale_at_its_probability(photographs):
    clip = photographs[:, ::24, ::24].astype(np.float32) / 255
    how = Augmentation(grayscale=0.3)
    one = jax.jit(jax.vmap(lambda draw: distort(clip, draw, how, FILL)))
    found = np.asarray(one(jnp.arange(500, dtype=jnp.uint32)))
    gray = np.ptp(found, axis=-1).max((1, 2, 3)) < 1e-6
    assert 0.24 < gray.mean() < 0.36
    assert np.array_equal(found[~gray], np.broadcast_to(clip, found[~gray].shape))
    luma = clip @ np.float32([0.299, 0.587, 0.114])
    np.testing.assert_allclose(found[gray][0, ..., 0], luma, atol=1e-3)


@pytest.mark.parametrize(
    "bad",
    [
        {"color_jitter": (0.4, 0.4, 0.4)},
        {"color_jitter": (0.4, 0.4, 0.4, 0.6)},
        {"color_jitter": (-0.1, 0, 0, 0)},
        {"color_jitter": ("a", 0, 0, 0)},
        {"grayscale": 1.1},
        {"randaugment_layers": -1},
        {"randaugment_magnitude": 10.5},
        {"mixup": -0.2},
        {"cutmix": float("nan")},
        {"erasing": 2.0},
        {"label_smoothing": -0.1},
    ],
)
def test_values_out_of_range_are_refused_by_name(bad):
    (name,) = bad
    with pytest.raises(InputError, match=rf"augment\.{name} must be"):
        Augmentation(**bad)


@functools.cache
def tiny_training(how):
    """A step on one device, of a tiny bfloat16 model of one frame, and its state on the host."""
    model = TimeSformerConfig(
        num_classes=5, image_size=16, num_frames=1, patch_size=8, hidden_size=8, depth=1,
        num_heads=1, attention="space", dtype="bfloat16",
    )  # fmt: skip
    mesh, schedule = make_mesh(devices=jax.devices()[:1]), optax.constant_schedule(0.01)
    optimizer = optax.sgd(schedule)
    target = abstract_state(model, optimizer, mesh)
    clip = ClipSpec(frames=1, crop=16)
    step = make_train_step(model, clip, optimizer, schedule, target, mesh, 0, how)
    first = init_state(parameters(TimeSformer(model, rngs=nnx.Rngs(0))), optimizer, target)
    return mesh, step, jax.device_get(first)


def steps(how, batches, state=None):
    """Losses and the last state, from a state on the host."""
    mesh, step, first = tiny_training(how)
    with jax.set_mesh(mesh):
        state = jax.device_put(state or first, NamedSharding(mesh, P()))
        losses = []
        for batch in batches:
            state, metrics = step(state, put_batch(mesh, batch))
            losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state)


@pytest.fixture(scope="module")
def batches(photographs):
    random = np.random.default_rng(0)
    return [
        {
            "frames": np.stack([photographs[:1, i : i + 20, i : i + 20] for i in range(8)]),
            "crop_boxes": np.tile(np.float32([1, 2, 17]), (8, 1)),
            "flip": random.random(8) < 0.5,
            "label": np.arange(8, dtype=np.int32) % 5,
            "augment_seed": random.integers(2**32, size=8, dtype=np.uint32),
        }
        for _ in range(4)
    ]


def test_training_goes_on_bit_for_bit(batches):
    losses, state = steps(EVERYTHING, batches)
    first, half = steps(EVERYTHING, batches[:2])
    second, again = steps(EVERYTHING, batches[2:], half)
    assert np.isfinite(losses).all()
    assert losses == first + second
    jax.tree.map(np.testing.assert_array_equal, state, again)


def test_without_augmentation_the_step_is_the_same_program(batches):
    def program(how, batch):
        mesh, step, state = tiny_training(how)
        with jax.set_mesh(mesh):
            return step.lower(state, batch).as_text()

    plain = {name: x for name, x in batches[0].items() if name != "augment_seed"}
    off = program(Augmentation(), plain)
    assert program(Augmentation(randaugment_magnitude=5.0), batches[0]) == off
    for how in (Augmentation(label_smoothing=0.1), Augmentation(erasing=0.1)):
        assert program(how, batches[0]) != off


def test_the_augmentation_of_a_recipe_and_its_seeds_reach_the_step(
    demo_data, tmp_path, monkeypatch
):
    class Reached(Exception):
        pass

    def make(*arguments, **options):
        assert arguments[-1] == Augmentation(erasing=0.5, color_jitter=(0.4, 0.0, 0.0, 0.0))

        def step(state, batch):
            raise Reached(np.asarray(batch["augment_seed"]))

        return step

    monkeypatch.setattr(run, "make_train_step", make)
    config = recipes.demo()
    config.data.directory, config.data.demo = str(demo_data), ""
    config.augment.erasing, config.augment.color_jitter = 0.5, (0.4, 0.0, 0.0, 0.0)
    config.model.depth = 1
    with pytest.raises(Reached) as reached:
        loop.train(config, str(tmp_path / "run"))
    (draws,) = reached.value.args
    assert draws.dtype == np.uint32
    assert len(np.unique(draws)) == config.batch_size


def test_a_recipes_augmentation_is_checked_before_its_data(tmp_path):
    config = recipes.demo()
    config.data.directory, config.data.demo = "/nowhere", ""
    config.augment.mixup = -1.0
    with pytest.raises(InputError, match=r"augment\.mixup must be .*, not -1"):
        loop.train(config, str(tmp_path))
