"""The training recipes as ml_collections configs. The files in configs/ call these functions.

Each function returns a new config, which the caller may change. The command line refuses fields
that the config does not have.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.models.presets import preset
from timesformer_jax.recipes import fit
from timesformer_jax.transforms.augmentation import OFF

# The release's models, by their preset: names on the Hugging Face Hub, and a file of the authors.
RELEASED = {
    "timesformer_base": "facebook/timesformer-base-finetuned-k400",
    "timesformer_hr": "facebook/timesformer-hr-finetuned-k400",
    "timesformer_l": "TimeSformer_divST_96x4_224_K400.pyth",
}
K400_WEIGHTS = RELEASED["timesformer_base"]


def recipe(model: str = "timesformer_base", *, frame_stride: int = 32) -> ConfigDict:
    """The values that all recipes start from: the authors' training on Kinetics.

    Args:
      model: name of a preset; `config.model` holds all its fields.
      frame_stride: distance between the frames of a clip, in frames of a 30 fps video.
    """
    config = ConfigDict()
    config.name = model.removeprefix("timesformer_")  # of the recipe, in the results
    config.seed = 0
    config.epochs = 15
    config.batch_size = 64  # global; the paper says 16, the release uses 64
    config.pretrained = ""  # path or name of the checkpoint to start from; "" for random parameters
    config.log_every_steps = 50
    config.accumulate_steps = 1  # microbatches per step
    config.ema_decay = 0.0  # of the moving average of the parameters; 0 for none
    config.attention_kernels = "auto"  # the fastest on the device; "xla", or the name of one
    _set_clip_and_model(config, model, frame_stride)
    config.data = _data()
    config.augment = ConfigDict(dataclasses.asdict(OFF))  # the paper uses none
    config.optimizer = _optimizer()
    config.optimizer.epochs = config.get_ref("epochs")  # length of the schedule
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1})
    config.eval = ConfigDict()
    config.eval.every_epochs = 5
    config.eval.batch_size = config.get_oneway_ref("batch_size")
    config.eval.views = 1  # clips along a video
    config.eval.crops = 3  # squares of each clip
    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 0  # 0: once per epoch
    config.checkpoint.keep_newest = 3  # this many
    config.checkpoint.keep_best = 1  # those best by validation top-1, in addition
    # Writes a trace of these steps, counted from 1, to profile/ in the workdir; 0 steps: no trace.
    config.profile = ConfigDict({"start_step": 10, "steps": 0})
    # Fields that the checkpoint and the data change unless they are set, see `recipes.fit`.
    config.defaults = ConfigDict()
    fit.make_automatic(config, ["batch_size", "log_every_steps"])
    return config


def _set_clip_and_model(config: ConfigDict, model: str, frame_stride: int) -> None:
    fields = dataclasses.asdict(preset(model))
    clip = dataclasses.asdict(
        ClipSpec(frames=fields["num_frames"], crop=fields["image_size"], frame_stride=frame_stride)
    )
    del clip["short_side"]  # follows from the data
    config.clip = ConfigDict(clip)
    config.model = ConfigDict(fields)
    # Length and size are set once, for the clip; the model follows.
    config.model.num_frames = config.clip.get_ref("frames")
    config.model.image_size = config.clip.get_ref("crop")


def _data() -> ConfigDict:
    data = ConfigDict()
    data.directory = ""
    data.demo = ""  # the embedded data set that is made in the directory if it is missing
    data.train_split = "train"
    data.eval_split = "validation"
    data.fps = 0.0  # frame rate of records that do not state one
    data.short_side_range = (256, 320)  # the short side is scaled at random, in pixels
    data.flip = True
    data.train_fraction = 1.0  # of the training videos of each class
    return data


def _optimizer() -> ConfigDict:
    optimizer = ConfigDict()
    optimizer.name = "sgd"
    optimizer.learning_rate = 0.005
    optimizer.reference_batch_size = 64  # learning_rate is for this size, and scales linearly
    optimizer.momentum = 0.9
    optimizer.weight_decay = 1e-4
    optimizer.schedule = "step"
    optimizer.decay_epochs = (11.0, 14.0)
    optimizer.decay_factors = (0.1, 0.01)
    optimizer.warmup_epochs = 0.0
    optimizer.clip_norm = 0.0  # largest norm of the gradient; 0 for no limit
    optimizer.layer_decay = 1.0  # factor of the learning rate from one layer to the one below
    optimizer.trainable = "all"  # or "head"
    return optimizer


def kinetics400(model: str = "timesformer_base", *, attention: str = "divided") -> ConfigDict:
    """Kinetics-400, as the authors train each of their three models."""
    config = _authors(model)
    if attention != "divided":
        config.name = config.model.attention = attention
    return _on_dataset(config, "k400", classes=400)


def kinetics600(model: str = "timesformer_base") -> ConfigDict:
    """Kinetics-600 as Kinetics-400: the authors released weights, but no config."""
    return _on_dataset(_authors(model), "k600", classes=600)


def something_v2(model: str = "timesformer_base") -> ConfigDict:
    """Something-Something V2: one frame per segment, no flips; L has 64 frames."""
    config = _authors(model)
    config.clip.sampling = "segments"
    if model == "timesformer_l":
        config.clip.frames = 64
    config.data.flip = False  # some classes differ only in left and right
    return _on_dataset(config, "ssv2", classes=174)


def diving48(model: str = "timesformer_base") -> ConfigDict:
    """Diving-48 with the frame counts of Kinetics-400, spread over the dive (our choice)."""
    config = _authors(model)
    config.clip.sampling = "segments"
    config.data.eval_split = "test"
    return _on_dataset(config, "diving48", classes=48)


def howto100m(frames: int = 8) -> ConfigDict:
    """The tasks of HowTo100M: the base model, from its K400 weights, on segments of one clip."""
    config = _authors("timesformer_base")
    config.name = f"{frames}"
    config.clip.frames = frames
    config.pretrained = K400_WEIGHTS
    config.data.eval_split = "test"
    _on_dataset(config, "howto100m", classes=1059)
    config.data.directory = f"data/{config.name}"  # the segments are as long as this clip
    return config


def _authors(model: str) -> ConfigDict:
    """The values that the authors use for one of their three models on every data set."""
    frame_stride = {"timesformer_base": 32, "timesformer_hr": 16, "timesformer_l": 4}[model]
    config = recipe(model, frame_stride=frame_stride)
    config.pretrained = image_vit()
    if model == "timesformer_hr":
        config.data.short_side_range = (448, 512)
    return config


def _on_dataset(config: ConfigDict, dataset: str, classes: int) -> ConfigDict:
    config.name = f"{dataset}_{config.name}"
    config.data.directory = f"data/{dataset}"
    if config.clip.crop > 256:  # records of a larger short side
        config.data.directory += "_512"
    config.model.num_classes = classes
    return config


# The patch sizes of timm's image ViTs for 224 x 224 pixels.
_PUBLISHED = {
    ("small", "in21k"): (16, 32),
    ("base", "in21k"): (8, 16, 32),
    ("large", "in21k"): (16, 32),
    ("small", "in1k"): (16,),
    ("base", "in1k"): (16, 32),
}


def image_vit(size: str = "base", patch_size: int = 16, images: str = "in21k") -> str:
    """The name, on the Hugging Face Hub, of the image ViT that a video model starts from.

    Args:
      size: "small", "base" or "large".
      patch_size: side of a patch, in pixels.
      images: "in21k" or "in1k", what it was trained on.

    Returns:
      The name; "" if there is no such ViT.
    """
    if patch_size not in _PUBLISHED.get((size, images), ()):
        return ""
    weights = "orig" if (size, patch_size) == ("large", 32) else "augreg"  # there is no other
    return f"timm/vit_{size}_patch{patch_size}_224.{weights}_{images}"


def finetune(model: str = "timesformer_base") -> ConfigDict:
    """Fine-tunes a pretrained model on your own videos, with any number of classes."""
    config = recipe(model)
    config.name = "finetune"
    config.pretrained = K400_WEIGHTS
    config.model.num_classes = 0  # the number of classes in the data
    config.batch_size = 8
    config.log_every_steps = 10
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.reference_batch_size = 8
    config.optimizer.weight_decay = 0.05
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = config.get_ref("epochs").to_float() / 15
    config.eval.every_epochs = 1
    shape = ("optimizer.learning_rate", "data.short_side_range")
    fit.make_automatic(config, [*fit.OF_VIDEO_MODEL, *fit.OF_DATA, *shape])
    return config


def from_scratch_small() -> ConfigDict:
    """Trains a small model from scratch on your own videos: minutes on a CPU, for a first try."""
    config = finetune("timesformer_small")
    config.name = "from_scratch_small"
    config.pretrained = ""
    config.epochs = 60
    config.data.short_side_range = (64, 80)
    config.optimizer.learning_rate = 1e-3
    config.optimizer.clip_norm = 1.0
    config.augment.color_jitter = (0.3, 0.3, 0.3, 0.0)
    config.augment.label_smoothing = 0.1
    config.eval.every_epochs = 5
    fit.make_automatic(config, [*fit.OF_VIDEO_MODEL, *fit.OF_DATA, "data.short_side_range"])
    return config


def demo() -> ConfigDict:
    """Trains a tiny model from scratch on the embedded data set: minutes on two CPU cores."""
    config = recipe("timesformer_tiny", frame_stride=2)
    config.name = "demo"
    config.model.num_classes = 0  # the number of classes in the data
    config.epochs = 6
    config.batch_size = 32
    config.data.directory = "data/demo"
    config.data.demo = "motion"
    config.data.short_side_range = (32, 40)
    config.data.flip = False  # a flipped video moves in another direction
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.reference_batch_size = 32
    config.optimizer.weight_decay = 0.05
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = config.get_ref("epochs").to_float() / 6
    config.eval.every_epochs = 1
    config.eval.batch_size = 80
    fit.make_automatic(config, ["batch_size", "data.directory"])
    return config


def demo_long() -> ConfigDict:
    """Trains a tiny model on one clip of 64 frames of each of the embedded three-minute videos."""
    config = demo()
    config.name = "demo_long"
    config.clip.sampling = "segments"  # the clip spans the video
    config.clip.frames = 64
    config.clip.std = (0.9, 0.9, 0.9)  # small inputs beside the embeddings: it learns more steadily
    config.model.patch_size = 16
    config.model.hidden_size = 32
    config.model.depth = 2
    config.epochs = 20
    config.data.directory = "data/demo_long"
    config.data.demo = "long"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.clip_norm = 1.0
    config.eval.every_epochs = 5
    fit.make_automatic(config, ["data.directory"])
    return config
