"""How a recipe fits itself to a checkpoint, to the data, and to what an earlier run decided."""

import copy
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timesformer_jax import recipes
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input.sampling import clip_indices
from timesformer_jax.models.timesformer import TimeSformerConfig
from timesformer_jax.recipes import fit, with_arguments

SMALL = TimeSformerConfig(
    num_classes=7, image_size=32, num_frames=4, patch_size=8, hidden_size=48, depth=2, num_heads=3,
    mlp_ratio=2.0, attention="joint", position_embedding="space", position_resize="bicubic",
    init="width_scaled",
)  # fmt: skip
CLIP = ClipSpec(
    frames=4, frame_stride=8, crop=32, mean=(0.5,) * 3, std=(0.5,) * 3, channel_order="bgr"
)


def clips(seconds, fps=30.0):
    frames = np.round(np.asarray(seconds, float) * fps).astype(np.int32)
    return fit.Clips(frames, np.full(len(frames), fps, np.float32))


def changed(changes):
    return {name: value for change in changes for name, value in change.fields.items()}


def fitted(config, *args, **more):
    """The config after `to_data`, and what was changed."""
    config = copy.deepcopy(config)
    changes = fit.to_data(config, *args, **more)
    fit.apply(config, changes)
    return config, changed(changes)


# ---- to a checkpoint


def test_a_checkpoint_gives_its_whole_shape():
    config = recipes.finetune()
    fit.apply(config, fit.to_checkpoint(config, "x.pth", SMALL, CLIP, is_image_model=False))
    model = TimeSformerConfig(**config.model.to_dict() | {"num_classes": 7})
    kept = ("drop_path", "dtype", "remat", "scan_layers")
    assert model == dataclasses.replace(SMALL, **{k: getattr(model, k) for k in kept})
    assert ClipSpec(**config.clip) == CLIP
    assert config.data.short_side_range == (37, 46)  # 256 and 320 for a crop of 224
    assert recipes.finetune().model.hidden_size == 768


def test_an_image_model_leaves_the_time_to_the_recipe():
    config = recipes.finetune()
    space = dataclasses.replace(SMALL, attention="space")
    taken = changed(fit.to_checkpoint(config, "x.pth", space, CLIP, is_image_model=True))
    assert taken["model.hidden_size"] == 48
    assert not {"model.attention", "clip.frames", "clip.frame_stride"} & set(taken)


def test_the_changes_are_one_sentence():
    config = recipes.finetune()
    [change] = fit.to_checkpoint(config, "x.pth", SMALL, CLIP, is_image_model=False)
    assert change.reason.startswith("as the checkpoint x.pth: model.patch_size 8, ")
    assert "model.num_heads 3" in change.reason
    assert "\n" not in change.reason


@settings(max_examples=30)
@given(st.sets(st.sampled_from(fit.OF_VIDEO_MODEL)))
def test_what_somebody_set_is_kept(names):
    config = recipes.finetune()
    before = fit.flatten(config)
    fit.decide(config, names)
    taken = changed(fit.to_checkpoint(config, "x.pth", SMALL, CLIP, is_image_model=False))
    assert not names & set(taken) - {"clip.frame_stride"}
    found = fit.flatten(config)
    assert all(found[name] == before[name] for name in names)


def test_another_value_in_a_persons_own_config_is_kept_too():
    config = recipes.finetune()
    config.model.attention, config.clip.frames = "axial", 16
    taken = changed(fit.to_checkpoint(config, "x.pth", SMALL, CLIP, is_image_model=False))
    assert not {"model.attention", "clip.frames"} & set(taken)
    assert taken["clip.frame_stride"] == 2  # 16 frames over the time of 4 x 8


def test_arguments_decide():
    config = with_arguments(recipes.finetune(), "model=timesformer_tiny,attention=joint")
    assert config.pretrained == ""
    assert (config.model.hidden_size, config.clip.crop, config.model.image_size) == (64, 32, 32)
    assert config.model.attention == "joint"
    assert config.data.short_side_range == (37, 46)
    taken = changed(fit.to_checkpoint(config, "x.pth", SMALL, CLIP, is_image_model=False))
    assert not [name for name in taken if name.startswith("model.")]
    assert not {"clip.frames", "clip.crop", "data.short_side_range"} & set(taken)


@pytest.mark.parametrize(
    ("recipe", "model", "pretrained"),
    [
        (recipes.finetune, "timesformer_hr", "facebook/timesformer-hr-finetuned-k400"),
        (recipes.finetune, "timesformer_l", "TimeSformer_divST_96x4_224_K400.pyth"),
        (recipes.kinetics400, "timesformer_vit_s", "timm/vit_small_patch16_224.augreg_in21k"),
        (recipes.kinetics400, "timesformer_p32", "timm/vit_base_patch32_224.augreg_in21k"),
        (recipes.kinetics400, "timesformer_tiny", ""),
    ],
)
def test_a_preset_brings_the_checkpoint_of_its_size(recipe, model, pretrained):
    config = with_arguments(recipe(), f"model={model}")
    assert config.pretrained == pretrained
    assert config.model.num_classes == recipe().model.num_classes


@pytest.mark.parametrize(
    ("recipe", "arguments", "clip"),
    [
        (recipes.kinetics400("timesformer_base"), "model=timesformer_l", (96, 3)),
        (recipes.kinetics400("timesformer_l"), "model=timesformer_base", (8, 48)),
        (recipes.kinetics400("timesformer_base"), "model=timesformer_hr", (16, 16)),
        (recipes.kinetics400("timesformer_base"), "model=timesformer_l,frames=32", (32, 8)),
        (recipes.demo(), "model=timesformer_base", (8, 2)),
    ],
)
def test_the_clips_of_a_preset_span_the_time_of_the_recipes(recipe, arguments, clip):
    config = with_arguments(recipe, arguments)
    assert (config.clip.frames, config.clip.frame_stride) == clip


def test_the_checkpoint_and_the_data_still_decide_on_the_stride_of_a_preset():
    config = with_arguments(recipes.finetune(), "model=timesformer_l")
    model, clip = TimeSformerConfig(num_frames=96), ClipSpec(frames=96, frame_stride=4)
    assert changed(fit.to_checkpoint(config, "x.pth", model, clip, is_image_model=False)) == {
        "clip.frame_stride": 4
    }
    assert fitted(config, clips([4.0] * 40), ("a",))[1]["clip.frame_stride"] == 1


def test_a_checkpoint_changes_no_field_of_the_papers_recipes():
    config = recipes.kinetics400()
    assert fit.to_checkpoint(config, "x.pth", SMALL, CLIP, is_image_model=False) == []
    assert fit.without_checkpoint(config) == []


def test_without_a_checkpoint_the_learning_rate_is_higher():
    config = recipes.finetune()
    assert changed(fit.without_checkpoint(config)) == {"optimizer.learning_rate": 1e-3}
    config.optimizer.learning_rate = 2e-4
    assert fit.without_checkpoint(config) == []


# ---- to the data


def test_the_frame_stride_of_videos_of_three_seconds():
    """48 videos, 38 of them of 3 s, the others of 10 s: 8 frames, 11 of 30 fps apart, are 2.9 s."""
    _, taken = fitted(recipes.finetune(), clips([3.0] * 38 + [10.0] * 10), ("a",))
    assert taken["clip.frame_stride"] == 11
    [stride, *_] = fit.to_data(recipes.finetune(), clips([3.0] * 38 + [10.0] * 10), ("a",))
    assert stride.reason.startswith("38 of 48 videos are shorter than a clip of 8.5 s: clip.frame_")
    assert "--config.clip.frame_stride=32 keeps" in stride.reason
    _, taken = fitted(recipes.finetune(), clips([9.0] * 48), ("a",))
    assert "clip.frame_stride" not in taken


@settings(max_examples=30)
@given(
    st.lists(st.floats(0.1, 20), min_size=1, max_size=40),
    st.sampled_from([12.0, 25.0, 29.97, 60.0]),
    st.sampled_from([2, 8, 16]),
)
def test_the_fitted_stride_is_the_largest_that_fits_nine_of_ten_videos(seconds, fps, frames):
    default = recipes.finetune()
    default.clip.frames = frames
    data = clips(seconds, fps=fps)
    config, _ = fitted(default, data, ("a",))
    stride = config.clip.frame_stride
    assert 1 <= stride <= 32

    def repeated(stride):
        """Videos that end before the last frame of a clip from their beginning."""
        last = clip_indices(10**6, fps, frames, stride, 0.0)[-1]
        return sum(n < last for n in data.num_frames)

    if stride > 1:
        assert repeated(stride) <= len(seconds) // 10
    if stride < 32:
        assert data.shorter_than(frames, stride + 1) > len(seconds) // 10
    # The same in any order, and nothing more to do afterwards.
    [again, *_] = fit.to_data(default, clips(seconds[::-1], fps=fps), ("a",)) or [None]
    assert stride == (again.fields.get("clip.frame_stride", 32) if again else 32)
    assert fit.to_data(config, data, ("a",)) == []


@pytest.mark.parametrize(
    ("label", "sided"),
    [
        ("left", True), ("turn_left", True), ("turnRight", True), ("Swiping Right", True),
        ("Pushing something from left to right", True), ("rightward", True),
        ("clockwise", True), ("counter-clockwise", True), ("anticlockwise", True),
        ("bright", False), ("copyright", False), ("cleft lip", False), ("righteous", False),
        ("upright", False), ("up", False), ("clock", False),
    ],
)  # fmt: skip
def test_words_that_a_mirror_changes(label, sided):
    assert bool(fit.sided_labels([label])) == sided


def test_classes_named_left_or_right_are_not_mirrored_by_default():
    labels, data = ("turn left", "turn right", "stop"), clips([10.0] * 40)
    _, taken = fitted(recipes.finetune(), data, labels)
    assert taken["data.flip"] is False
    assert "data.flip" not in fitted(recipes.finetune(), data, ("jump", "run"))[1]
    config = recipes.finetune()
    fit.decide(config, ["data.flip"])
    config, taken = fitted(config, data, labels)
    assert "data.flip" not in taken
    assert any("but clips are mirrored" in w for w in fit.warnings(config, data, labels))


def test_a_batch_larger_than_the_data_is_made_smaller():
    # In the paper's recipes too; a size that somebody set is kept, and refused with what to set.
    for recipe in (recipes.kinetics400, recipes.diving48, recipes.demo):
        config, taken = fitted(recipe(), clips([10.0] * 5), ("a",))
        assert taken["batch_size"] == config.batch_size == 5
        [warning] = [c for c in fit.to_data(recipe(), clips([10.0] * 5), ("a",)) if c.is_warning]
        assert warning.reason.startswith("there are 5 clips: batch_size 5, not ")
    config, taken = fitted(recipes.finetune(), clips([10.0] * 5), ("a",))
    assert taken["batch_size"] == config.batch_size == config.eval.batch_size == 5
    assert fitted(recipes.finetune(), clips([10.0] * 5), ("a",), 4)[1]["batch_size"] == 4
    # Fewer clips than devices: the run is refused with the reason, as for a size that was set.
    assert "batch_size" not in fitted(recipes.finetune(), clips([10.0] * 5), ("a",), 8)[1]


@settings(max_examples=30)
@given(st.integers(8, 2000), st.integers(1, 30))
def test_a_short_run_has_a_curve(videos, epochs):
    config = recipes.finetune()
    config.epochs = epochs
    config, _ = fitted(config, clips([10.0] * videos), ("a",))
    steps = epochs * (videos // config.batch_size)
    assert 1 <= config.log_every_steps <= 10
    assert steps // config.log_every_steps >= min(steps, fit.REPORTS)


def test_a_recipe_that_does_not_fit_is_told():
    config = recipes.finetune()
    config.clip.frame_stride = 31
    assert fit.warnings(config, clips([1.0] * 4), ("a", "b")) == [
        "4 of 4 videos are shorter than a clip of 8.3 s: their last frame is repeated; a smaller "
        "--config.clip.frame_stride makes clips shorter",
    ]
    assert fit.warnings(config, clips([10.0] * 20), ("a", "b")) == []


# ---- to a run that goes on


def test_a_run_that_goes_on_decides_as_it_did():
    config, _ = fitted(recipes.finetune(), clips([3.0] * 20), ("left", "right"))
    saved = {k: v for k, v in fit.flatten(config).items() if not k.startswith("defaults.")}
    saved = {k: list(v) if isinstance(v, tuple) else v for k, v in saved.items()}  # as JSON
    again = recipes.finetune()
    fit.apply(again, fit.to_saved_run(again, saved))
    assert again.to_dict() == config.to_dict()
    # What is set now wins, and is then told as a change.
    other = recipes.finetune()
    other.clip.frame_stride = 5
    assert "clip.frame_stride" not in changed(fit.to_saved_run(other, saved))
