"""From records to batches of decoded clips."""
