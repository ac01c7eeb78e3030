"""From decoded frames to what the model takes, on the device: crop, normalise, augment."""
