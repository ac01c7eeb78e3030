"""Accuracy of a model over a data set, seen from several views."""
