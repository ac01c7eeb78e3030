"""Multi-view evaluation of a model on a data set."""
