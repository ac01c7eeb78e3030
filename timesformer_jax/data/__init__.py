"""From video files to batches: annotations -> prepare -> records -> pipeline."""
