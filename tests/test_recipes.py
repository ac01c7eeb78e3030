"""The configs: the published recipes, their commands, the paper's ablations as arguments."""

import dataclasses
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from timesformer_jax import recipes
from timesformer_jax.checkpoints.catalogue import list_pretrained
from timesformer_jax.cli.commands import COMMANDS
from timesformer_jax.cli.config_flag import load
from timesformer_jax.cli.flags import parse
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.annotations import DATASETS
from timesformer_jax.data.input.pipeline import train_side
from timesformer_jax.data.layout import INDEX_DTYPES
from timesformer_jax.data.records.split import Split, take_fraction
from timesformer_jax.distributed.mesh import make_mesh
from timesformer_jax.errors import InputError
from timesformer_jax.models.costs import macs, parameter_count
from timesformer_jax.models.presets import preset
from timesformer_jax.models.timesformer import TimeSformerConfig
from timesformer_jax.recipes import with_arguments
from timesformer_jax.training import loop, resume
from timesformer_jax.training.optimizer import learning_rate, make_optimizer
from timesformer_jax.training.step import abstract_state, make_train_step
from timesformer_jax.transforms.augmentation import Augmentation

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))

# Frames, frame stride (None: segments), crop, classes and parameters of the recipes.
PUBLISHED = {
    "k400_base": (8, 32, 224, 400, 121_566_352),
    "k400_hr": (16, 16, 448, 400, 122_024_080),
    "k400_l": (96, 4, 224, 400, 121_633_936),
    "k400_joint": (8, 32, 224, 400, 86_112_400),
    "k400_space": (8, 32, 224, 400, 86_106_256),
    "k600_base": (8, 32, 224, 600, None),
    "k600_hr": (16, 16, 448, 600, None),
    "k600_l": (96, 4, 224, 600, None),
    "ssv2_base": (8, None, 224, 174, 121_392_558),
    "ssv2_hr": (16, None, 448, 174, None),
    "ssv2_l": (64, None, 224, 174, None),
    "diving48_base": (8, None, 224, 48, None),
    "diving48_hr": (16, None, 448, 48, None),
    "diving48_l": (96, None, 224, 48, None),
    "howto100m_8": (8, 32, 224, 1059, None),
    "howto100m_32": (32, 32, 224, 1059, None),
    "howto100m_64": (64, 32, 224, 1059, None),
    "howto100m_96": (96, 32, 224, 1059, None),
}


def config_of(name, arguments=""):
    return load(f"{ROOT}/configs/{name}.py:{arguments}")


def split_of(labels, video=None, short_side=256):
    """A split whose records have no files."""
    n = len(labels)
    video = np.arange(n) if video is None else np.asarray(video)
    columns = {f.name: np.zeros(n, np.int64) for f in dataclasses.fields(Split)[3:-1]}
    size = np.full(n, short_side)
    columns |= {
        "ids": np.array([f"{v}.mp4#{i}" for i, v in enumerate(video)]),
        "label": np.asarray(labels), "video": video, "height": size, "width": size,
        "num_frames": np.full(n, 300), "stride": np.ones(n, int), "size": np.full(n, 3_000_000),
    }  # fmt: skip
    return Split("train", (), tuple(map(str, range(max(labels) + 1))), **columns)


def check_step(config):
    """Traces the train step with one clip per device, without allocating arrays."""
    mesh = make_mesh(**config.mesh)
    batch_size = mesh.devices.size
    fields = config.model.to_dict() | {"depth": 1}  # all blocks are alike
    model = TimeSformerConfig(**fields | {"num_classes": config.model.num_classes or 7})
    clip = ClipSpec(**config.clip)
    schedule = learning_rate(config.optimizer, batch_size, steps_per_epoch=100)
    optimizer = make_optimizer(config.optimizer, schedule)
    target = abstract_state(model, optimizer, mesh)
    step = make_train_step(
        model, clip, optimizer, schedule, target, mesh, config.seed, Augmentation(**config.augment)
    )
    # Records of the least short side that the short_side_range does not enlarge.
    side = train_side(
        split_of([0], short_side=config.data.short_side_range[0]),
        clip,
        config.data.short_side_range,
    )
    shapes = {
        "frames": ((clip.frames, side, side, 3), np.uint8),
        "crop_boxes": ((3,), np.float32),
        "flip": ((), bool),
        "augment_seed": ((), np.uint32),
        "label": ((), np.int32),
    }
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
        for name, (shape, dtype) in shapes.items()
    }
    state, metrics = jax.eval_shape(step, target, batch)
    before, after = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (target, state))
    assert after == before
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize(
    "name",
    [*CONFIGS, "ssv2_base:attention=axial,frames=4,crop=320,patch_size=32,backbone=vit_s",
     "k400_base:attention=parallel,position_embedding=none,backbone=vit_l,crop=112"],
)  # fmt: skip
def test_every_config_trains_its_model_on_its_clips(name):
    config = config_of(*name.split(":"))
    assert config.name == name
    assert config.clip.crop <= config.data.short_side_range[0]
    check_step(config)


def test_every_recipe_of_the_paper_has_its_file():
    assert set(PUBLISHED) | {"demo", "demo_long", "finetune", "from_scratch_small"} == set(CONFIGS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_recipes(name):
    config = config_of(name)
    frames, stride, crop, classes, count = PUBLISHED[name]
    data = name.partition("_")[0]
    assert (config.clip.frames, config.clip.crop) == (frames, crop)
    assert config.clip.sampling == ("segments" if stride is None else "stride")
    assert stride in (None, config.clip.frame_stride)
    assert config.data.short_side_range == ((448, 512) if crop == 448 else (256, 320))
    assert config.data.flip == (data != "ssv2")
    assert config.data.train_fraction == 1
    assert config.model.num_classes == classes
    assert config.model.attention == {"k400_joint": "joint", "k400_space": "space"}.get(
        name, "divided"
    )
    assert (config.epochs, config.batch_size) == (15, 64)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.momentum) == ("sgd", 0.005, 0.9)
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.warmup_epochs) == (1e-4, 0, 0)
    assert (optimizer.decay_epochs, optimizer.decay_factors) == ((11, 14), (0.1, 0.01))
    assert not Augmentation(**config.augment).on
    assert (config.eval.views, config.eval.crops, config.eval.every_epochs) == (1, 3, 5)
    assert config.clip.mean == (0.45, 0.45, 0.45)
    assert config.clip.std == (0.225, 0.225, 0.225)
    assert config.clip.channel_order == "rgb"
    # What `prepare` calls the split to evaluate on.
    dataset = {"k400": "kinetics400", "k600": "kinetics600", "ssv2": "something_v2"}.get(data, data)
    assert config.data.eval_split in DATASETS[dataset].published_counts
    if count:
        assert parameter_count(TimeSformerConfig(**config.model)) == count


def commands(name):
    """The commands of a config's docstring, as words."""
    doc = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
    doc = doc.replace("\\\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^    timesformer (.*)$", doc, re.MULTILINE)]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_commands_of_a_config_parse_and_name_it(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    trained = []
    for command, *words in commands(name):
        values = COMMANDS[command].define_flags()
        arguments = parse(command, COMMANDS[command], values, words)
        if command == "prepare":
            prepared = arguments["output"]
            assert config_of(name).data.directory == prepared
        else:
            trained.append((command, arguments["workdir"]))
            assert arguments["config"].name == name
            directory = config_of(name).data.directory or "data/mine"
            assert arguments["config"].data.directory == directory
            from_random = name in ("demo", "demo_long", "from_scratch_small")
            assert bool(arguments["config"].pretrained) != from_random
    workdir = {"finetune": "mine", "from_scratch_small": "small"}.get(name, name)
    assert trained == [("train", f"runs/{workdir}")]


def test_pieces_of_howto100m_are_as_long_as_a_clip():
    for frames in (8, 32, 64, 96):
        (_, *words), _ = commands(f"howto100m_{frames}")
        seconds = float(dict(w.split("=") for w in words)["--segment_seconds"])
        clip = config_of(f"howto100m_{frames}").clip
        assert seconds == pytest.approx(clip.frames * clip.frame_stride / 30, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ("attention=axial", {"model.attention": "axial"}),
        ("position_embedding=none", {"model.position_embedding": "none"}),
        ("frames=16", {"clip.frames": 16, "clip.frame_stride": 16, "model.num_frames": 16}),
        ("frames=96,frame_stride=4",
         {"clip.frames": 96, "clip.frame_stride": 4, "model.num_frames": 96}),
        ("crop=448",
         {"clip.crop": 448, "model.image_size": 448, "data.short_side_range": (448, 512)}),
        ("crop=112",
         {"clip.crop": 112, "model.image_size": 112, "data.short_side_range": (128, 160)}),
        ("patch_size=32", {"model.patch_size": 32,
                           "pretrained": "timm/vit_base_patch32_224.augreg_in21k"}),
        ("backbone=vit_l,patch_size=32",
         {"model.patch_size": 32, "model.depth": 24, "model.hidden_size": 1024,
          "model.num_heads": 16, "pretrained": "timm/vit_large_patch32_224.orig_in21k"}),
        ("backbone=vit_s,init=imagenet1k",
         {"model.hidden_size": 384, "model.num_heads": 6,
          "pretrained": "timm/vit_small_patch16_224.augreg_in1k"}),
        ("init=scratch", {"pretrained": ""}),
        ("train_fraction=0.25", {"data.train_fraction": 0.25}),
    ],
)  # fmt: skip
def test_an_argument_changes_only_the_fields_that_depend_on_it(arguments, changed):
    before, after = flat(config_of("k400_base")), flat(config_of("k400_base", arguments))
    assert after == before | changed | {"name": f"k400_base:{arguments}"}


def flat(config: ConfigDict):
    found = {}
    for name, value in config.items():
        inner = flat(value) if isinstance(value, ConfigDict) else None
        found |= {name: value} if inner is None else {f"{name}.{k}": v for k, v in inner.items()}
    return found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("atention=joint", "no argument 'atention'.*did you mean 'attention'"),
        ("attention=joined", "did you mean 'joint'"),
        ("attention", "give attention once, as attention=VALUE"),
        ("frames=8,frames=16", "give frames once"),
        ("frames=many", r"frames must be a number \(int\), not 'many'"),
        ("frames=0", "frames must be a whole number from 1"),
        ("crop=225", "225 is not divisible by patch_size"),
        ("backbone=vit_xl", "backbone must be one of vit_s, vit_b, vit_l"),
        ("init=imagenet", "init must be one of imagenet21k"),
        (",", "no argument ''"),
    ],
)
def test_invalid_arguments_are_refused(arguments, said):
    with pytest.raises(InputError, match=said):
        with_arguments(recipes.kinetics400(), arguments)


@pytest.mark.parametrize(
    ("name", "pretrained"),
    [
        ("k400_base:model=timesformer_vit_l,init=imagenet21k",
         "timm/vit_large_patch16_224.augreg_in21k"),
        ("k400_base:model=timesformer_vit_s,patch_size=32",
         "timm/vit_small_patch32_224.augreg_in21k"),
        ("k400_base:patch_size=8", "timm/vit_base_patch8_224.augreg_in21k"),
        ("demo:patch_size=4", ""),
        ("from_scratch_small:patch_size=16", ""),
        ("from_scratch_small:backbone=vit_s,init=imagenet1k,patch_size=16",
         "timm/vit_small_patch16_224.augreg_in1k"),
    ],
)  # fmt: skip
def test_the_image_vit_has_the_sizes_of_the_model(name, pretrained):
    assert config_of(*name.split(":")).pretrained == pretrained


@pytest.mark.parametrize(
    "name", ["k400_base:backbone=vit_l,init=imagenet1k", "k400_base:patch_size=14",
             "demo:init=imagenet21k"],
)  # fmt: skip
def test_without_an_image_vit_of_its_sizes_an_ablation_is_refused(name):
    with pytest.raises(InputError, match=r"no ViT of \d+ channels, .*: give init=scratch, and"):
        config_of(*name.split(":"))


@pytest.mark.parametrize(
    ("name", "changes", "parameters", "gmacs"),
    [
        # ViTs at 224 x 224 with 1000 classes: parameters as published with their weights.
        ("timesformer_base", {}, 86_567_656, "17.56"),
        ("timesformer_p32", {}, 88_224_232, "4.41"),
        ("timesformer_vit_l", {}, 304_326_632, "61.55"),
        ("timesformer_vit_l", {"patch_size": 32}, 306_535_400, "15.38"),
        ("timesformer_vit_s", {}, 22_050_664, "4.60"),
    ],
)
def test_on_one_frame_a_backbone_is_the_image_vit(name, changes, parameters, gmacs):
    image = {"attention": "space", "num_frames": 1, "num_classes": 1000}
    config = preset(name, **image, **changes)
    assert parameter_count(config) == parameters
    assert f"{macs(config) / 1e9:.2f}" == gmacs


@given(st.data(), st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]))
def test_a_fraction_of_the_data_is_whole_videos_equally_of_every_class(data, fraction):
    pieces = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=30))
    classes = data.draw(st.lists(st.integers(0, 3), min_size=len(pieces), max_size=len(pieces)))
    video = np.repeat(np.arange(len(pieces)), pieces)
    split = split_of(np.repeat(classes, pieces), video)
    part = take_fraction(split, fraction)
    whole, kept = list(split.ids), set(part.ids)
    assert list(part.ids) == [i for i in whole if i in kept]
    assert part.label_names == split.label_names
    # The columns of a record stay together.
    rows = [whole.index(i) for i in part.ids]
    assert np.array_equal(part.label, split.label[rows])
    assert np.array_equal(part.video, video[rows])
    for label in set(classes):
        of = {v for v, c in enumerate(classes) if c == label}
        assert abs(len(of & set(part.video)) - fraction * len(of)) <= 1
        assert of & set(part.video)
    for v in set(part.video):
        assert (part.video == v).sum() == pieces[v]
    # Neither other videos nor the order of records matter, and parts are nested.
    order = data.draw(st.permutations(range(len(classes))))
    shuffled = np.concatenate([np.flatnonzero(video == v) for v in order])
    columns = {c: getattr(split, c)[shuffled] for c in ("ids", *INDEX_DTYPES)}
    assert set(take_fraction(dataclasses.replace(split, **columns), fraction).ids) == kept
    assert kept <= set(take_fraction(split, min(1.0, 2 * fraction)).ids)


@pytest.mark.parametrize("fraction", [0, -0.5, 1.01, float("nan")])
def test_an_invalid_fraction_is_refused(fraction):
    with pytest.raises(InputError, match="above 0 and at most 1"):
        take_fraction(split_of([0, 1]), fraction)


def test_training_takes_its_fraction_of_the_data(demo_data, tmp_path, monkeypatch):
    """Of 64 videos in batches of 8 a quarter makes 2 steps an epoch."""
    monkeypatch.setattr(loop.pipeline, "train_batches", lambda split, *_, **__: seen(split))
    found = []

    def seen(split):
        found.append(split)
        raise InputError("seen")

    config = config_of("demo", "train_fraction=0.25")
    config.data.directory, config.data.demo = str(demo_data), ""
    config.batch_size = config.eval.batch_size = 8
    config.model.depth = 1
    with pytest.raises(InputError, match="seen"):
        loop.train(config, tmp_path / "run")
    (split,) = found
    assert len(split) == 16
    assert sorted(np.bincount(split.label)) == [2] * 8


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("k400_base", r"timm/vit_base_patch16_224\.augreg_in21k: .* cannot be reached"),
        ("finetune", r"facebook/timesformer-base-finetuned-k400: .* cannot be reached"),
        ("finetune:model=timesformer_l", r"TimeSformer_divST_96x4_224_K400\.pyth: .*CC-BY-NC-4\.0"),
    ],
)
def test_without_its_pretrained_model_a_recipe_is_refused(name, said, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=rf"^{said}.*; --config\.pretrained=PATH .*$"):
        resume.open_pretrained(config_of(*name.split(":")))


def test_the_pretrained_models_of_the_recipes_are_listed():
    listed = {known.name for known in list_pretrained()}
    for name in CONFIGS:
        assert config_of(name).pretrained in {*listed, ""}
