"""Checks of raw videos and of prepared data sets."""
