"""Capacity by one stable sort: the truth that other backends are tested against."""

import torch
from torch import Tensor


def expert_capacity_reference(expert_index_TK: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Return the index (T, K) with ``num_experts`` for what :func:`expert_capacity` drops."""
    tokens, choices = expert_index_TK.shape
    expert_M = expert_index_TK.T.flatten()
    few_bits = (
        torch.int16 if num_experts < torch.iinfo(torch.int16).max else torch.int64
    )  # a radix sort's passes
    sorted_M, order_M = expert_M.to(few_bits).sort(stable=True)
    counts_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_M.device)
    counts_E.scatter_add_(0, expert_M, torch.ones_like(expert_M))
    first_E = counts_E.cumsum(0) - counts_E
    place_M = torch.empty_like(expert_M)
    place_M[order_M] = torch.arange(expert_M.numel(), device=expert_M.device) - first_E[sorted_M.long()]
    over_TK = (place_M >= capacity).view(choices, tokens).T
    return expert_index_TK.masked_fill(over_TK, num_experts)
