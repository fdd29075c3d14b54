"""Training: configuration, loop, records, checkpoints, plots, command line."""
