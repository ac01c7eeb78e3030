"""A scheme of your own: attention within windows of 2 x 2 patches through time, then within frames.

    python examples/custom_scheme.py

Nothing in the package has to change. The layer states one thing, its partition of the clip's
patches into sequences; attention, drop path, costs and sharding follow from it.
"""

import jax.numpy as jnp
import numpy as np

import timesformer_jax as tsf
from timesformer_jax.models import costs, schemes
from timesformer_jax.models.schemes import AttentionLayer, Scheme


def by_window(frames: int, grid: tuple[int, int]) -> np.ndarray:
    """The number of each patch's window, (frames, patches): 2 x 2 patches, in all frames."""
    _, y, x = np.indices((frames, *grid))
    return (y // 2 * -(-grid[1] // 2) + x // 2).reshape(frames, -1)


WINDOWS = AttentionLayer("window", by_window, has_temporal_fc=True)
schemes.register_scheme("window", Scheme((WINDOWS, schemes.SPATIAL)))


def main() -> None:
    model = tsf.create("timesformer_tiny", attention="window", num_classes=8)
    logits = model(jnp.zeros((2, 8, 32, 32, 3)))
    print("logits", logits.shape)
    for scheme in ("divided", "window", "joint"):
        config = tsf.preset("timesformer_base", attention=scheme)
        print(
            f"{scheme:8} {costs.comparisons(config):6.0f} comparisons a patch, "
            f"{costs.macs(config) / 1e9:6.1f} GMACs a clip"
        )


if __name__ == "__main__":
    main()
