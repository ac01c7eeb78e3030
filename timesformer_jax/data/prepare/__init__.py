"""Prepares data sets: video files become TFRecord shards."""
