"""The model card of a checkpoint: README.md, with what the Hugging Face Hub reads at its head.

The text is a Jinja2 template, `card.md`. Names and class names may be anybody's: they are escaped,
so that they are text in Markdown and in YAML.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import os
import re
from typing import Any

import jinja2
from etils import epath

from timesformer_jax import storage
from timesformer_jax.checkpoints import run_files
from timesformer_jax.checkpoints.catalogue import NON_COMMERCIAL
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.run_files import RunFiles
from timesformer_jax.models.costs import parameter_count

# The licenses that the Hub has names for, among those of models and of code; SPDX in lower case.
HUB_LICENSES = frozenset(
    ("apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-4.0",
     "cc0-1.0", "gpl-3.0", "mit", "openrail")
)  # fmt: skip
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@.+)?")
# Of a recipe, in the order of the card.
_RECIPE = {
    "epochs": "epochs",
    "batch_size": "batch size",
    "optimizer.name": "optimizer",
    "optimizer.learning_rate": "learning rate",
    "optimizer.reference_batch_size": "at batch size",
    "optimizer.schedule": "schedule",
    "optimizer.warmup_epochs": "warm-up epochs",
    "optimizer.weight_decay": "weight decay",
    "optimizer.trainable": "trained parameters",
    "augment.label_smoothing": "label smoothing",
    "augment.mixup": "mixup",
    "augment.cutmix": "CutMix",
    "augment.randaugment_layers": "RandAugment layers",
    "model.drop_path": "drop path",
    "ema_decay": "moving average",
    "model.dtype": "dtype",
    "seed": "seed",
}


def write_card(
    folder: epath.Path,
    metadata: CheckpointMetadata,
    name: str,
    about: RunFiles,
    *,
    for_transformers: bool,
) -> None:
    """Writes README.md into the folder of a checkpoint, and the files that it shows.

    Args:
      folder: of the checkpoint, or of the run.
      metadata: of the checkpoint.
      name: of the repository on the Hub, or of the folder.
      about: what the run says of the checkpoint.
      for_transformers: whether transformers loads it too, or this package alone.
    """
    for picture, content in about.pictures.items():
        if not (folder / picture).exists():
            storage.write_atomically(folder / picture, content)
    if metadata.config and not (folder / run_files.RECIPE).exists():
        recipe = json.dumps(run_files.public_recipe(metadata.config), indent=2) + "\n"
        storage.write_atomically(folder / run_files.RECIPE, recipe.encode())
    card = model_card(metadata, name, about, for_transformers=for_transformers)
    storage.write_atomically(folder / run_files.CARD, card.encode())


def model_card(
    metadata: CheckpointMetadata, name: str, about: RunFiles, *, for_transformers: bool
) -> str:
    """The text of README.md; the arguments are those of `write_card`."""
    config = run_files.public_recipe(metadata.config)
    pretrained, license = config["pretrained"], metadata.license.lower()
    return _template().render(
        name=name,
        title=os.path.basename(name),
        model=metadata.model,
        clip=metadata.clip,
        labels=metadata.labels,
        multilabel=metadata.multilabel,
        license=metadata.license,
        hub_license=license if license in HUB_LICENSES else "other" if license else "",
        license_note=metadata.license_note,
        non_commercial=metadata.license == NON_COMMERCIAL,
        parameters=parameter_count(metadata.model),
        for_transformers=for_transformers,
        evaluations=about.evaluations,
        curves=run_files.CURVES if run_files.CURVES in about.pictures else "",
        recipe=run_files.RECIPE if metadata.config else "",
        data=os.path.basename(config["data"]["directory"]),
        pretrained=os.path.basename(pretrained.rstrip("/")),
        base_model=pretrained.partition("@")[0] if _HUB_NAME.fullmatch(pretrained) else "",
        settings=_settings(metadata.config),
    )


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe the card shows, by its name there; what is off is left out."""
    found = {}
    for field, shown in _RECIPE.items():
        value: Any = config
        for part in field.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value or (field == "seed" and value is not None):
            found[shown] = value
    return found


def _in_markdown(value: Any) -> str:
    """A value as text in Markdown: one line, and no markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", " ".join(str(value).split()))


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["md"] = _in_markdown
    environment.filters["percent"] = lambda value: f"{100 * value:.1f}"
    text = importlib.resources.files(__name__).joinpath("card.md").read_text(encoding="utf-8")
    return environment.from_string(text)
