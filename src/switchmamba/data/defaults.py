"""Defaults of ``prepare``, apart from it so that the command line can show them without importing anything else."""

MAX_RECORD_BYTES = 64 * 2**20
"""The largest document accepted: novels are megabytes."""

VALIDATION_FRACTION = 0.01

SHARD_TOKENS = 100_000_000

TOKENIZER_SAMPLE_BYTES = 32 * 2**20
"""A vocabulary of 8,000 to 50,000 entries gains little from more text, and this takes seconds."""
