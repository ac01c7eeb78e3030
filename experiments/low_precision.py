"""What int8 would change: accuracy, logits, time on this machine and cycles of a TPU.

    python experiments/low_precision.py accuracy RUN      # a run of configs/demo.py, and its data
    python experiments/low_precision.py logits            # base, random parameters, photographs
    python experiments/low_precision.py time              # base, forward, in turns
    python experiments/low_precision.py plan FORM ...     # `timesformer plan ...` with FORM

Two forms of every product of tokens with parameters are compared with float32. "weights": int8
kernels with a scale for each output, multiplied as float32. "both": inputs are int8 too, by one
scale a layer, the largest value over clips that the model was calibrated on; products are int32.
Attention's own products, norms and the head stay as they are.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import timesformer_jax as tsf
from timesformer_jax.checkpoints.load import load
from timesformer_jax.models import embedding
from timesformer_jax.models.ops import linear as linear_ops
from timesformer_jax.models.timesformer import parameters, with_parameters

FORMS = ("weights", "both")


def quantised(kernel):
    """int8 (inputs, outputs) of a kernel (inputs, *outputs), and the scale of each output."""
    matrix = kernel.reshape(kernel.shape[0], -1)
    scale = jnp.maximum(jnp.abs(matrix).max(axis=0), 1e-12) / 127
    return jnp.round(matrix / scale).astype(jnp.int8), scale


class Products:
    """Replaces the model's linear layers, in the order of their calls in the forward pass.

    Args:
      form: "float32", "weights" or "both".
      ranges: the largest input of each layer; None to note them in `noted`.
    """

    def __init__(self, form, ranges=None):
        self.form, self.ranges, self.noted, self.calls = form, ranges, [], 0

    def __call__(self, x, kernel, bias, rule):
        call, self.calls = self.calls, self.calls + 1
        leaves = jax.tree.leaves(x)
        if self.ranges is None:
            self.noted.append(jnp.stack([jnp.abs(leaf).max() for leaf in leaves]).max())
        if self.form == "float32" or rule.startswith("head"):
            return linear_ops.reference(x, kernel, bias, rule)
        matrix, scale = quantised(kernel)
        outputs = kernel.shape[1:]

        def apply(x):
            rows = x.reshape(-1, x.shape[-1])
            if self.form == "weights":
                y = rows @ (matrix.astype(x.dtype) * scale.astype(x.dtype))
            else:
                step = self.ranges[call % len(self.ranges)] / 127
                rows = jnp.clip(jnp.round(rows / step), -127, 127).astype(jnp.int8)
                y = jax.lax.dot(rows, matrix, preferred_element_type=jnp.int32)
                y = (y * (scale * step)).astype(x.dtype)
            return y.reshape(*x.shape[:-1], *outputs) + bias.astype(x.dtype)

        return jax.tree.map(apply, x)


@contextlib.contextmanager
def products(form, ranges=None):
    before = linear_ops.linear
    linear_ops.linear = embedding.linear = replaced = Products(form, ranges)
    try:
        yield replaced
    finally:
        linear_ops.linear = embedding.linear = before


def calibrate(config, params, clips):
    """The largest input of each layer over clips (B, T, H, W, 3)."""
    with products("float32") as taken:

        @jax.jit
        def forward(params, video):
            taken.noted, taken.calls = [], 0
            return with_parameters(config, params)(video), taken.noted

        found = np.max([jax.device_get(forward(params, clip[None])[1]) for clip in clips], axis=0)
    return [float(value) for value in found]


def new_forward(config):
    """A program of its own each time: what `products` says is decided while it is traced."""
    return jax.jit(lambda params, video: with_parameters(config, params)(video))


def accuracy(run):
    from timesformer_jax.data.input.pipeline import eval_batches
    from timesformer_jax.data.records.open import open_split
    from timesformer_jax.transforms.preprocess import preprocess

    metadata, params = load(run)
    data, spec, config = metadata.config["data"]["directory"], metadata.clip, metadata.model
    prepare = jax.jit(lambda frames, boxes: preprocess(frames, boxes, spec))

    def batches(split):
        for batch in eval_batches(split, spec, batch_size=100):
            video = prepare(batch["frames"][:, 0], batch["crop_boxes"][:, 0])
            yield video, batch["label"], batch["valid"]

    train = next(batches(open_split(data, "train", None)))[0]
    ranges = calibrate(config, params, train)
    logits = {}
    for form in ("float32", *FORMS):
        with products(form, ranges):
            forward = new_forward(config)
            found = [
                (np.asarray(forward(params, video))[valid], label[valid])
                for video, label, valid in batches(open_split(data, "validation", None))
            ]
        logits[form] = np.concatenate([x for x, _ in found])
        truth = np.concatenate([label for _, label in found])
        top1 = (logits[form].argmax(axis=1) == truth).mean()
        largest = np.abs(logits[form] - logits["float32"]).max()
        same = (logits[form].argmax(axis=1) == logits["float32"].argmax(axis=1)).mean()
        print(f"{form:8} top-1 {top1:.2%}  same class {same:.2%}  largest change {largest:.3f}")


def base():
    """The base model with random parameters, each layer of which changes the clip; and a clip."""
    from skimage import data, transform

    config = tsf.preset("timesformer_base", num_classes=400, init="width_scaled")
    params = parameters(tsf.TimeSformer(config, rngs=nnx.Rngs(0)))
    pictures = (data.astronaut(), data.chelsea(), data.coffee())
    clips = []
    for picture in pictures:  # a window that moves over a photograph
        picture = transform.resize(picture, (300, 300))
        clips.append([picture[i : i + 224, 3 * i : 3 * i + 224] for i in range(8)])
    return config, params, (np.asarray(clips, np.float32) - 0.45) / 0.225


def logits():
    config, params, clips = base()
    ranges = calibrate(config, params, clips[:2])
    found = {}
    for form in ("float32", *FORMS):
        with products(form, ranges):
            forward = new_forward(config)
            found[form] = np.asarray(forward(params, clips[2:]))
        largest = np.abs(found[form] - found["float32"]).max()
        spread = found["float32"].std()
        print(f"{form:8} largest change {largest:.4f} of logits with std {spread:.4f}")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    with products("float32", ranges):
        forward = new_forward(config)
        change = np.abs(np.asarray(forward(half, clips[2:])) - found["float32"]).max()
    print(f"bfloat16 parameters, float32 products: largest change {change:.4f}")


def times(turns=5):
    """One product of the model's shape, and the whole forward pass; medians of turns."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1568, 768), (768, 3072)))
    x8, w8 = ((10 * y).astype(jnp.int8) for y in (x, w))
    x16, w16 = (y.astype(jnp.bfloat16) for y in (x, w))
    dot = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=None))
    dot8 = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.int32))
    _race({
        "float32 product": lambda: dot(x, w),
        "bfloat16 product": lambda: dot(x16, w16),
        "int8 product": lambda: dot8(x8, w8),
    }, turns)  # fmt: skip
    config, params, clips = base()
    ranges = calibrate(config, params, clips[:1])
    programs = {}
    for form in ("float32", *FORMS):
        with products(form, ranges):
            forward = new_forward(config)
            programs[f"{form} forward"] = forward.lower(params, clips[:1]).compile()
    as_used = new_forward(config)
    programs["as used forward"] = as_used.lower(params, clips[:1]).compile()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    config16 = tsf.preset("timesformer_base", num_classes=400, dtype="bfloat16")
    in_half = new_forward(config16)
    runs = {name: (lambda p=p: p(params, clips[:1])) for name, p in programs.items()}
    compiled = in_half.lower(half, clips[:1]).compile()
    _race(runs | {"bfloat16 forward": lambda: compiled(half, clips[:1])}, 3)


def _race(runs, turns):
    seconds = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            start = time.process_time()
            jax.block_until_ready(run())
            if turn:
                seconds[name].append(time.process_time() - start)
    print(json.dumps({name: round(statistics.median(x), 4) for name, x in seconds.items()}))


def plan(form, arguments):
    from timesformer_jax.cli.main import main

    with products(form, [4.0]):
        main(["timesformer", "plan", *arguments])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("accuracy", "logits", "time", "plan"))
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if given.what == "plan":
        plan(given.arguments[0], given.arguments[1:])
    else:
        {"accuracy": accuracy, "logits": logits, "time": times}[given.what](*given.arguments)
    sys.stdout.flush()
