"""The training recipes as ml_collections configs; the files in configs/ are thin calls of these.

Every function returns a new config that can be changed further. The command line refuses names
that are not in it.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.models.presets import preset
from timesformer_jax.transforms.augmentation import OFF

# The release's base model.
K400_WEIGHTS = "TimeSformer_divST_8x32_224_K400.pyth"


def recipe(model: str = "timesformer_base", *, frame_stride: int = 32) -> ConfigDict:
    """What all recipes share: the authors' training of one epoch count, optimizer and views.

    Args:
      model: a preset; `config.model` holds all its fields.
      frame_stride: distance of a clip's frames, in frames of a 30 fps video.
    """
    config = ConfigDict()
    config.name = model.removeprefix("timesformer_")  # of the recipe, for the results
    config.seed = 0
    config.epochs = 15
    config.batch_size = 64  # of all devices together; the paper says 16, the release uses 64
    config.pretrained = ""  # a checkpoint to start from
    config.log_every_steps = 50
    config.accumulate_steps = 1  # parts in which a batch goes through the model
    config.ema_decay = 0.0  # the moving average of the weights keeps this much a step; 0: none

    fields = dataclasses.asdict(preset(model))
    clip = dataclasses.asdict(
        ClipSpec(frames=fields["num_frames"], crop=fields["image_size"], frame_stride=frame_stride)
    )
    del clip["short_side"]  # the data says it
    config.clip = ConfigDict(clip)
    config.model = ConfigDict(fields)
    # Say a clip's length and size once: the model is made for the clips.
    config.model.num_frames = config.clip.get_ref("frames")
    config.model.image_size = config.clip.get_ref("crop")

    config.data = ConfigDict()
    config.data.directory = ""
    config.data.demo = False  # make the embedded data set there if it is not there yet
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.fps = 0.0  # of records that do not say theirs
    config.data.short_side_range = (256, 320)  # random short side, in pixels
    config.data.flip = True
    config.data.train_fraction = 1.0  # of each class's training videos

    config.augment = ConfigDict(dataclasses.asdict(OFF))  # the paper has none

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.005
    config.optimizer.reference_batch_size = 64  # the learning rate is scaled from it to batch_size
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "step"
    config.optimizer.decay_epochs = (11.0, 14.0)
    config.optimizer.decay_factors = (0.1, 0.01)
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.epochs = config.get_ref("epochs")
    config.optimizer.clip_norm = 0.0  # the largest norm of the gradient; 0: any
    config.optimizer.layer_decay = 1.0  # of the learning rate, for each layer from the head down
    config.optimizer.trainable = "all"  # or "head"

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1})

    config.eval = ConfigDict()
    config.eval.every_epochs = 5
    config.eval.batch_size = config.get_oneway_ref("batch_size")
    config.eval.views = 1
    config.eval.crops = 3

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 0  # 0: once an epoch
    config.checkpoint.keep = 3  # the newest
    config.checkpoint.keep_best = 1  # by validation top-1, besides

    # A trace of these steps, counted from 1, in the workdir's profile/; none by default.
    config.profile = ConfigDict({"start_step": 10, "steps": 0})
    return config


def kinetics400(model: str = "timesformer_base", *, attention: str = "divided") -> ConfigDict:
    """K400 as the authors train it, for their three models."""
    config = _authors(model)
    if attention != "divided":
        config.name = config.model.attention = attention
    return _on(config, "k400", classes=400)


def kinetics600(model: str = "timesformer_base") -> ConfigDict:
    """K600: the authors released weights and no config; everything as for K400."""
    return _on(_authors(model), "k600", classes=600)


def something_v2(model: str = "timesformer_base") -> ConfigDict:
    """SSv2: a frame from each equal part of the video, never mirrored; L sees 64 frames."""
    config = _authors(model)
    config.clip.sampling = "segments"
    if model == "timesformer_l":
        config.clip.frames = 64
    config.data.flip = False  # some classes differ in left and right alone
    return _on(config, "ssv2", classes=174)


def diving48(model: str = "timesformer_base") -> ConfigDict:
    """Diving-48, with the frames of K400's models; that they span the dive is our choice."""
    config = _authors(model)
    config.clip.sampling = "segments"
    config.data.eval_split = "test"
    return _on(config, "diving48", classes=48)


def howto100m(frames: int = 8) -> ConfigDict:
    """HowTo100M's tasks: the base model from K400's weights, on pieces as long as a clip."""
    config = _authors("timesformer_base")
    config.name = f"{frames}"
    config.clip.frames = frames
    config.pretrained = K400_WEIGHTS
    config.data.eval_split = "test"
    _on(config, "howto100m", classes=1059)
    config.data.directory = f"data/{config.name}"  # the pieces are those of this clip
    return config


def _authors(model: str) -> ConfigDict:
    """What the authors' recipes share for each of their three models."""
    frame_stride = {"timesformer_base": 32, "timesformer_hr": 16, "timesformer_l": 4}[model]
    config = recipe(model, frame_stride=frame_stride)
    config.pretrained = image_vit()
    if model == "timesformer_hr":
        config.data.short_side_range = (448, 512)
    return config


def _on(config: ConfigDict, data: str, classes: int) -> ConfigDict:
    config.name = f"{data}_{config.name}"
    config.data.directory = f"data/{data}"
    config.model.num_classes = classes
    return config


def image_vit(size: str = "base", patch_size: int = 16, images: str = "in21k") -> str:
    """What an image ViT's file is called, from which a video model starts."""
    return f"vit_{size}_patch{patch_size}_224_{images}.pth"


def finetune(model: str = "timesformer_base") -> ConfigDict:
    """A pretrained model on a folder of one's own videos: AdamW, small steps, any class count."""
    config = recipe(model)
    config.name = "finetune"
    config.pretrained = K400_WEIGHTS
    config.model.num_classes = 0  # as many as the data has
    config.batch_size = 8
    config.log_every_steps = 10
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.reference_batch_size = 8
    config.optimizer.weight_decay = 0.05
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = config.get_ref("epochs").to_float() / 15
    config.eval.every_epochs = 1
    return config


def demo() -> ConfigDict:
    """A tiny model from scratch on the embedded data set: minutes on two CPU cores."""
    config = recipe("timesformer_tiny", frame_stride=2)
    config.name = "demo"
    config.model.num_classes = 0
    config.epochs = 6
    config.batch_size = 32
    config.data.directory = "data/demo"
    config.data.demo = True
    config.data.short_side_range = (32, 40)
    config.data.flip = False  # a mirrored video moves the other way
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.reference_batch_size = 32
    config.optimizer.weight_decay = 0.05
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = config.get_ref("epochs").to_float() / 6
    config.eval.every_epochs = 1
    config.eval.batch_size = 80
    return config
