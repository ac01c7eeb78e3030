"""Checkpoints: our own store, and conversion from and to other formats."""
