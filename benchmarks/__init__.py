"""Benchmarks: measured against peers, never part of the tests."""
