"""From logits to the next token: temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024).

Pure functions, row by row: what is drawn for a row depends on its logits and its own generator alone. Among
equal logits the lower token id counts as the more probable. Suffixes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from math import log

import numpy as np
import torch
from torch import Tensor

from switchmamba.errors import NonFiniteError
from switchmamba.generation.settings import SamplingSettings


def choose(logits_BV: Tensor, settings: SamplingSettings, generators: Sequence[torch.Generator]) -> Tensor:
    """Return the next token of each row, (B,) int64; greedy choice leaves the generators alone."""
    if settings.temperature == 0:
        _refuse_non_finite(logits_BV.amax(dim=-1))
        return logits_BV.argmax(dim=-1)  # the first of equal maxima
    return draw(probabilities(logits_BV, settings), generators)


def probabilities(logits_BV: Tensor, settings: SamplingSettings) -> Tensor:
    """Return the distribution that the settings leave, (B, V) fp32; a logit of −∞ cannot come.

    Raises NonFiniteError if a row holds NaN or +∞, or nothing but −∞.
    """
    logits_BV = logits_BV.float()
    maximum_B1 = logits_BV.amax(dim=-1, keepdim=True)
    _refuse_non_finite(maximum_B1)
    if settings.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(-1, logits_BV.argmax(dim=-1, keepdim=True), 1)
    # With the maximum at 0 a small temperature cannot overflow, and min-p is a bound on the logit.
    scaled_BV = (logits_BV - maximum_B1) / settings.temperature
    if settings.top_k is not None or settings.top_p < 1:
        scaled_BV = scaled_BV.masked_fill(~_most_probable(logits_BV, maximum_B1, settings), -torch.inf)
    if settings.min_p > 0:
        scaled_BV = scaled_BV.masked_fill(scaled_BV < log(settings.min_p), -torch.inf)
    return scaled_BV.softmax(dim=-1)


def _most_probable(logits_BV: Tensor, maximum_B1: Tensor, settings: SamplingSettings) -> Tensor:
    """Return (B, V) bool: the tokens that top-k and top-p leave, no more of them for equal logits."""
    descending_BK = _sorted_descending(logits_BV)[:, : settings.top_k]
    share_BK = ((descending_BK - maximum_B1) / settings.temperature).softmax(dim=-1, dtype=torch.float64)
    share_before_BK = share_BK.cumsum(dim=-1) - share_BK
    # A token stays if those before it do not make up top_p yet: the first one always does.
    top_p = settings.top_p if settings.top_p < 1 else torch.inf  # a sum of shares may round up to 1
    kept_B1 = (share_before_BK < top_p).sum(dim=-1, keepdim=True)
    threshold_B1 = descending_BK.gather(-1, kept_B1 - 1)
    above_BV = logits_BV > threshold_B1
    level_BV = logits_BV == threshold_B1
    room_B1 = kept_B1 - above_BV.sum(dim=-1, keepdim=True)
    return above_BV | (level_BV & (level_BV.cumsum(dim=-1) <= room_B1))


def _sorted_descending(values_BV: Tensor) -> Tensor:
    if values_BV.device.type == "cpu":
        # numpy sorts 50,000 floats in 0.2 ms, torch in 7 ms: that would bound the decoding speed.
        return torch.from_numpy(-np.sort(-values_BV.numpy(), axis=-1))
    return values_BV.sort(dim=-1, descending=True).values


def draw(probabilities_BV: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw a token for each row by inverting its distribution function, (B,) int64.

    One number is taken from each row's generator (they live on the CPU, so that every device draws the same).
    """
    cumulative_BV = probabilities_BV.double().cumsum(dim=-1)
    total_B1 = cumulative_BV[:, -1:]
    uniform = [torch.rand((), generator=generator, dtype=torch.float64).item() for generator in generators]
    point_B1 = torch.tensor(uniform, dtype=torch.float64, device=total_B1.device)[:, None] * total_B1
    # Rounding must not carry the point to the total, where no token is.
    point_B1 = torch.minimum(point_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BV, point_B1, right=True).squeeze(-1)


def row_generator(seed: int, row: int) -> torch.Generator:
    """Return the random numbers of row ``row`` under ``seed``; different pairs give unrelated streams."""
    word = int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(word >> 1)


def _refuse_non_finite(maximum: Tensor) -> None:
    if not torch.isfinite(maximum).all():
        row = int((~torch.isfinite(maximum.flatten())).nonzero()[0])
        raise NonFiniteError(
            f"the logits of row {row} have the maximum {float(maximum.flatten()[row])}: no token can be drawn; "
            f"the weights are damaged or overflow in this dtype"
        )
