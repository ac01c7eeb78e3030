"""The published checkpoints that are known by name: what they are, and where they are."""

from __future__ import annotations

import dataclasses
import operator

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.models.config import TimeSformerConfig

NON_COMMERCIAL = "CC-BY-NC-4.0"  # the license of the authors' weights

_HUB = "https://huggingface.co/"
_RELEASE = "https://github.com/facebookresearch/TimeSformer"
_VITS = "https://github.com/google-research/vision_transformer"
_APACHE = "Apache-2.0"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A published checkpoint.

    Attributes:
      name: what to give as a checkpoint; or a file name, if it must be downloaded by hand.
      dataset: that it was trained on.
      classes: of its head; 0 for none.
      clip: the clips of a video model; None for an image model.
      license: of the weights.
      page: where it is published.
      top1, top5: published accuracy in percent, of three crops of one clip; None if not published
        for this use. HowTo100M's is of clips that cover the video.
      downloads: whether the name is enough; otherwise the file must be downloaded from the page.
    """

    name: str
    dataset: str
    classes: int
    clip: ClipSpec | None
    license: str
    page: str
    top1: float | None = None
    top5: float | None = None
    downloads: bool = True

    @property
    def model(self) -> TimeSformerConfig | None:
        """The config of a video model; None for an image model."""
        if self.clip is None:
            return None
        return TimeSformerConfig(
            num_classes=self.classes, num_frames=self.clip.frames, image_size=self.clip.crop
        )

    def __str__(self) -> str:
        """One line for a table."""
        clip = "image" if self.clip is None else _clip_text(self.clip)
        found = "" if self.top1 is None else f"{self.top1} / {self.top5 or '-'}"
        return f"{self.classes:>7}  {clip:<15}  {found:<11}  {self.license:<12}  {self.name}"


def list_pretrained() -> tuple[Pretrained, ...]:
    """The published checkpoints that are known, with classes, clip, license and accuracy.

    Other repositories of the Hugging Face Hub with a TimeSformer or a ViT are loaded by name too.
    """
    return _VIDEO_MODELS + _IMAGE_MODELS


def print_pretrained() -> None:
    """Prints `list_pretrained` as a table."""
    print(f"{'classes':>7}  {'clip':<15}  {'top-1 / 5':<11}  {'license':<12}  name")
    for known in list_pretrained():
        print(known)
    print(
        "A name with a / is downloaded where a checkpoint is asked for. A .pyth file must be "
        f"downloaded by hand\nfrom {_RELEASE}. Other TimeSformers and ViTs of huggingface.co\n"
        "are loaded by their names too. See docs/checkpoints.md."
    )


def authors_model(config: TimeSformerConfig) -> Pretrained | None:
    """The authors' model of exactly this shape, if there is one.

    Args:
      config: of a video model under the authors' names.
    """
    fields = (
        "patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "attention",
        "num_classes", "num_frames", "image_size",
    )  # fmt: skip
    shape = operator.attrgetter(*fields)
    return next((known for known in _VIDEO_MODELS if shape(known.model) == shape(config)), None)


def by_name(name: str) -> Pretrained | None:
    """The known checkpoint of a name."""
    return next((known for known in list_pretrained() if known.name == name), None)


def where_to_get(file_name: str) -> str:
    """Where a pretrained file of this name is to be had, as a part of a message; "" if unknown."""
    known = by_name(file_name)
    if known is None or known.downloads:
        return ""
    twin = next((k for k in _VIDEO_MODELS if k.downloads and k.clip == known.clip
                 and k.classes == known.classes), None)  # fmt: skip
    if twin:
        return f"give {twin.name} in its place, which is downloaded ({_terms(twin)})"
    return f"download it from the authors' page ({_terms(known)})"


def _terms(known: Pretrained) -> str:
    return f"{known.page}, license {known.license}"


def _clip_text(clip: ClipSpec) -> str:
    step = " segments" if clip.sampling == "segments" else f"x{clip.frame_stride}"
    return f"{clip.frames}{step} {clip.crop}"


def _authors_clip(frames: int, stride: int, crop: int, dataset: str) -> ClipSpec:
    """The clips that the authors trained on, and the one that they test."""
    if dataset.startswith("Something"):
        # Their loader of this data set feeds OpenCV's order of channels.
        return ClipSpec(
            frames=frames, frame_stride=stride, crop=crop, short_side=max(256, crop),
            sampling="segments", channel_order="bgr",
        )  # fmt: skip
    return ClipSpec(frames=frames, frame_stride=stride, crop=crop, short_side=max(256, crop))


def _authors(
    name: str, dataset: str, classes: int, clip: tuple[int, int, int],
    top1: float, top5: float | None,
) -> Pretrained:  # fmt: skip
    """A model of the authors: frames, frame stride and crop of its clips; top-1 and top-5."""
    hub = name.startswith("facebook/")
    return Pretrained(
        name, dataset, classes, _authors_clip(*clip, dataset), NON_COMMERCIAL,
        _HUB + name if hub else _RELEASE, top1, top5, downloads=hub,
    )  # fmt: skip


_K400, _K600, _SSV2 = "Kinetics-400", "Kinetics-600", "Something-Something V2"
_BASE, _HR, _L = (8, 32, 224), (16, 16, 448), (96, 4, 224)
_VIDEO_MODELS = (
    _authors("facebook/timesformer-base-finetuned-k400", _K400, 400, _BASE, 77.9, 93.2),
    _authors("facebook/timesformer-hr-finetuned-k400", _K400, 400, _HR, 79.6, 94.0),
    _authors("facebook/timesformer-base-finetuned-k600", _K600, 600, _BASE, 79.1, 94.4),
    _authors("facebook/timesformer-hr-finetuned-k600", _K600, 600, _HR, 81.8, 95.8),
    _authors("facebook/timesformer-base-finetuned-ssv2", _SSV2, 174, _BASE, 59.1, 85.6),
    _authors("facebook/timesformer-hr-finetuned-ssv2", _SSV2, 174, _HR, 61.8, 86.9),
    _authors("TimeSformer_divST_8x32_224_K400.pyth", _K400, 400, _BASE, 77.9, 93.2),
    _authors("TimeSformer_divST_16x16_448_K400.pyth", _K400, 400, _HR, 79.6, 94.0),
    _authors("TimeSformer_divST_96x4_224_K400.pyth", _K400, 400, _L, 80.6, 94.7),
    _authors("TimeSformer_divST_8x32_224_K600.pyth", _K600, 600, _BASE, 79.1, 94.4),
    _authors("TimeSformer_divST_16x16_448_K600.pyth", _K600, 600, _HR, 81.8, 95.8),
    _authors("TimeSformer_divST_96x4_224_K600.pyth", _K600, 600, _L, 82.2, 95.6),
    _authors("TimeSformer_divST_8_224_SSv2.pyth", _SSV2, 174, _BASE, 59.1, 85.6),
    _authors("TimeSformer_divST_16_448_SSv2.pyth", _SSV2, 174, _HR, 61.8, 86.9),
    _authors("TimeSformer_divST_64_224_SSv2.pyth", _SSV2, 174, (64, 4, 224), 62.0, 87.5),
    _authors("TimeSformer_divST_8x32_224_HowTo100M.pyth", "HowTo100M", 1059, _BASE, 56.8, None),
    _authors("TimeSformer_divST_32x32_224_HowTo100M.pyth", "HowTo100M", 1059, (32, 32, 224),
             61.2, None),
    _authors("TimeSformer_divST_64x32_224_HowTo100M.pyth", "HowTo100M", 1059, (64, 32, 224),
             62.2, None),
    _authors("TimeSformer_divST_96x32_224_HowTo100M.pyth", "HowTo100M", 1059, (96, 32, 224),
             62.6, None),
)  # fmt: skip

_IN21K, _IN1K = "ImageNet-21k", "ImageNet-1k"


def _timm(name: str, dataset: str, classes: int) -> Pretrained:
    name = f"timm/{name}"
    return Pretrained(name, dataset, classes, None, _APACHE, _HUB + name)


def _npz(name: str, dataset: str, classes: int) -> Pretrained:
    return Pretrained(f"gs://vit_models/{name}.npz", dataset, classes, None, _APACHE, _VITS)


_IMAGE_MODELS = (
    _timm("vit_tiny_patch16_224.augreg_in21k", _IN21K, 21843),
    _timm("vit_small_patch16_224.augreg_in21k", _IN21K, 21843),
    _timm("vit_base_patch16_224.augreg_in21k", _IN21K, 21843),
    _timm("vit_base_patch32_224.augreg_in21k", _IN21K, 21843),
    _timm("vit_large_patch16_224.augreg_in21k", _IN21K, 21843),
    _timm("vit_base_patch16_224.augreg_in1k", _IN1K, 1000),
    _timm("vit_base_patch16_224.augreg_in21k_ft_in1k", f"{_IN21K}, {_IN1K}", 1000),
    _npz("augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0", _IN21K, 21843),
    _npz("augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0", _IN21K, 21843),
    _npz("augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0", _IN21K, 21843),
    _npz("augreg/L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0", _IN21K, 21843),
    _npz("imagenet21k/ViT-B_16", _IN21K, 21843),
    _npz("imagenet21k/ViT-L_16", _IN21K, 21843),
)
