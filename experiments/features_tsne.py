"""Features of space-only and divided attention on the embedded data set: the paper's figure 8.

    .venv/bin/python experiments/features_tsne.py [--workdir=runs/demo_motion]

Takes the runs of experiments/demo_motion.py with seed 0, or trains them. The features are the class
token after the final norm, of the middle clip and its centre crop. Draws a t-SNE of the features of
the validation videos, docs/features_tsne.png. Two neighbours of such a map need not be neighbours
among the features, so two probes stand beside it, trained on the features of the training videos
and measured on those of the validation videos: 20 nearest neighbours by cosine, and a logistic
regression. Writes docs/features_tsne.json. Needs the extra `experiments`.
"""

from __future__ import annotations

import json
import time

import matplotlib.pyplot as plt
import numpy as np
from absl import app
from demo_motion import DOCS, run, workdir
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from timesformer_jax import recipes
from timesformer_jax.inference.predictor import Predictor
from timesformer_jax.inference.sources import Source, of_annotations

SCHEMES = ("space", "divided")
NEIGHBOURS = 20

# Directions as they turn, so that neighbours on the colour wheel are neighbours in motion.
DIRECTIONS = (
    *("right", "down-right", "down", "down-left"),
    *("left", "up-left", "up", "up-right"),
)


def main(_):
    top1, maps = {}, {}
    for scheme in SCHEMES:
        trained = run(scheme, 0)
        videos = recipes.demo().data.directory + "/videos"
        clips = of_annotations(videos, f"{videos}/annotations.csv")
        features = extract(scheme, clips)
        training = np.array([clip.split == "train" for clip in clips])
        labels = np.array([clip.label for clip in clips])
        splits = features[training], labels[training], features[~training], labels[~training]
        top1[scheme] = {"head": trained["top1"], **probe(*splits)}
        tsne = TSNE(init="pca", perplexity=30, random_state=0)
        maps[scheme] = tsne.fit_transform(features[~training]), labels[~training]
        print(f"{scheme:>8}", *(f"{name} {value:.1%}" for name, value in top1[scheme].items()))
    about = {
        "top1": top1,
        "neighbours": NEIGHBOURS,
        "videos": {"train": int(training.sum()), "validation": int((~training).sum())},
    }
    (DOCS / "features_tsne.json").write_text(json.dumps(about, indent=2) + "\n")
    draw(maps, top1).savefig(DOCS / "features_tsne.png", dpi=110)
    print(f"written: {DOCS / 'features_tsne.json'} and {DOCS / 'features_tsne.png'}")


def extract(scheme: str, clips: list[Source]) -> np.ndarray:
    """(n, D) features of the clips."""
    predictor = Predictor(workdir(scheme, 0), crops=1, batch_size=32)
    begin = time.monotonic()
    found = predictor.features([clip.path for clip in clips])
    print(f"{scheme:>8} {len(found)} videos in {time.monotonic() - begin:.0f} s")
    return np.stack([features.video for features in found])


def probe(x: np.ndarray, y: np.ndarray, new_x: np.ndarray, new_y: np.ndarray) -> dict[str, float]:
    """Validation top-1 of a nearest-neighbour and a linear classifier of frozen features."""
    probes = {
        "knn": KNeighborsClassifier(NEIGHBOURS, metric="cosine"),
        "linear": make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
    }
    return {name: float(probe.fit(x, y).score(new_x, new_y)) for name, probe in probes.items()}


def draw(
    maps: dict[str, tuple[np.ndarray, np.ndarray]], top1: dict[str, dict[str, float]]
) -> Figure:
    figure, axes = plt.subplots(1, len(maps), figsize=(11, 5), layout="constrained")
    colours = plt.get_cmap("hsv")(np.arange(len(DIRECTIONS)) / len(DIRECTIONS))
    for axis, (scheme, (points, labels)) in zip(axes, maps.items()):
        for direction, colour in zip(DIRECTIONS, colours):
            of_class = points[labels == direction]
            axis.scatter(*of_class.T, s=10, color=colour, label=direction)
        found = top1[scheme]
        axis.set(
            xticks=[],
            yticks=[],
            title=f"{scheme} attention: nearest neighbours {found['knn']:.1%}, "
            f"linear probe {found['linear']:.1%}",
        )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    return figure


if __name__ == "__main__":
    app.run(main)
