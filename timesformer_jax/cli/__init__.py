"""The command line: `timesformer <command>`."""
