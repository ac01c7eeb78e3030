"""Does hiding the patches that an attention map names hurt the prediction more than hiding others?

    .venv/bin/python experiments/attention_deletion.py [--checkpoint=runs/demo/best] [--videos=400]

Takes the checkpoint of `make train` and validation videos of its data set. Of every clip some
patches are hidden, which means filled with the clip's mean colour: those with the most relevance by
rollout, or for the predicted class; as many drawn at random; or those with the least. Prints the
mean probability of the class that was predicted for the whole clip, writes the table into
docs/explain.md and the figures to docs/attention_deletion.json.
"""

from __future__ import annotations

import json
import pathlib
import platform

import jax
import numpy as np
from absl import app, flags
from docs_tables import DOCS, markdown_table, replace_table

from timesformer_jax.data.demo.motion import DIRECTIONS
from timesformer_jax.inference.predictor import Predictor
from timesformer_jax.models.rollout import attention_rollout

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
BATCH = 50
DRAWS = 5

CHECKPOINT = flags.DEFINE_string("checkpoint", "runs/demo/best", "of `make train`")
DATA = flags.DEFINE_string("data", "data/demo", "the data set of `make train`")
VIDEOS = flags.DEFINE_integer("videos", 400, "how many validation videos", lower_bound=BATCH)


def main(_):
    predictor = Predictor(CHECKPOINT.value, crops=1)
    folder = pathlib.Path(DATA.value) / "videos" / "validation"
    count = VIDEOS.value // BATCH * BATCH
    clips = [predictor.read(folder / f"{i:05d}.mp4") for i in range(count)]
    videos = np.concatenate([predictor.inputs(c.frames[0], c.crop_boxes) for c in clips])
    classify = jax.jit(lambda video: jax.nn.softmax(predictor.model(video)))
    rng = np.random.default_rng(0)

    whole = run(classify, videos)
    predicted = whole.argmax(axis=1)
    labels = np.arange(count) % len(DIRECTIONS)  # as the demo makes its videos
    correct = np.mean([predictor.labels[p] == DIRECTIONS[i] for p, i in zip(predicted, labels)])
    plain = relevance(predictor.model, videos, None)
    weighted = relevance(predictor.model, videos, predicted)
    orders = {
        "most by rollout": [-plain],
        "most for the class": [-weighted],
        "random": [rng.random(plain.shape) for _ in range(DRAWS)],
        "least by rollout": [plain],
        "least for the class": [weighted],
    }
    table: dict[str, dict[float, float]] = {name: {} for name in orders}
    for name, rankings in orders.items():
        for share in SHARES:
            hidden = [hide(videos, ranking, share, predictor) for ranking in rankings]
            found = [run(classify, video)[np.arange(count), predicted] for video in hidden]
            table[name][share] = float(np.mean(found))
        print(f"{name:>20}", *(f"{p:7.1%}" for p in table[name].values()), flush=True)
    report = {
        "videos": count,
        "top1_of_whole_clips": float(correct),
        "probability_of_whole_clips": float(whole.max(axis=1).mean()),
        "probability_by_share_hidden": table,
        "random_draws": DRAWS,
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "jax": jax.__version__,
    }
    (DOCS / "attention_deletion.json").write_text(json.dumps(report, indent=2) + "\n")
    head = ["patches hidden", *(f"{share:.0%}" for share in SHARES)]
    lines = [[name, *(f"{p:.1%}" for p in found.values())] for name, found in table.items()]
    text = markdown_table(head, lines, words=1)
    page = DOCS / "explain.md"
    page.write_text(replace_table(page.read_text(), "attention_deletion.py", "table", text))


def run(program, videos: np.ndarray) -> np.ndarray:
    batches = np.split(videos, len(videos) // BATCH)
    return np.concatenate([jax.device_get(program(batch)) for batch in batches])


def relevance(model, videos: np.ndarray, targets: np.ndarray | None) -> np.ndarray:
    """(n, T, N)."""
    found = []
    for first in range(0, len(videos), BATCH):
        batch = slice(first, first + BATCH)
        target = None if targets is None else targets[batch]
        found.append(attention_rollout(model, videos[batch], target).patches)
    return np.concatenate(found)


def hide(videos: np.ndarray, ranking: np.ndarray, share: float, predictor: Predictor) -> np.ndarray:
    """The videos with the first patches of each ranking filled with the mean of the clip."""
    patch = predictor.metadata.model.patch_size
    n, t, h, w = videos.shape[:4]
    order = ranking.reshape(n, -1).argsort(axis=1)
    chosen = np.zeros(order.shape, bool)
    np.put_along_axis(chosen, order[:, : round(share * order.shape[1])], True, axis=1)
    chosen = chosen.reshape(n, t, h // patch, w // patch)
    pixels = chosen.repeat(patch, axis=2).repeat(patch, axis=3)[..., None]
    return np.where(pixels, videos.mean(axis=(1, 2, 3), keepdims=True), videos)


if __name__ == "__main__":
    app.run(main)
