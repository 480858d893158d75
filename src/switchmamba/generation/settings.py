"""How the next token is chosen: checked numbers, readable before torch is imported."""

from dataclasses import dataclass
from math import inf

from switchmamba.errors import ConfigError


@dataclass(frozen=True)
class SamplingSettings:
    """What is done to the model's distribution before a token is drawn, in this order.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token (greedy).
        top_k: only the k most probable tokens remain; None: all.
        top_p: of these, the fewest most probable tokens that hold this share of the probability; 1: all.
        min_p: of these, the tokens at least this many times as probable as the most probable one; 0: all.
        seed: row i of a run draws from a stream that is a function of (seed, i).

    Raises :class:`ConfigError` for a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < inf:
            raise ConfigError(f"temperature = {self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k = {self.top_k} must be at least 1; leave it out to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p = {self.min_p} must be from 0 to 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed = {self.seed} must be from 0 to 2^63 - 1")
