"""Checkpoints as programs that run without this package: ONNX, StableHLO, SavedModel."""
