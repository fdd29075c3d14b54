"""What every training script shares: options, the loop, the run directory, the command line.

Nothing is re-exported. Scripts write `from spg.training import cli, loop, options`, so that a
program that reads options alone does not load Orbax or matplotlib.
"""
