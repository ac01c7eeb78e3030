"""Prediction of the classes of video files. Needs no TensorFlow."""
