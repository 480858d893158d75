"""Layers that mix tokens along the sequence."""
