"""Experiments: comparisons described by a file, run, watched, and reported on."""
