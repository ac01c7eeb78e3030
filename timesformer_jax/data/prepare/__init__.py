"""From video files to TFRecord shards."""
