"""`timesformer benchmark`: measures speed and memory on this machine."""
