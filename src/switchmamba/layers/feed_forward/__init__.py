"""Layers that map each token by itself."""
