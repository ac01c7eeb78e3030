"""Checks of videos and of prepared directories."""
