"""Who is dropped where an expert is full; test_routing.py holds the laws of whole routings."""

import pytest
import torch

from switchmamba.errors import ConfigError
from switchmamba.ops import expert_capacity


def test_first_choices_come_before_second_ones_and_earlier_tokens_before_later_ones():
    index = torch.tensor([[0, 1], [1, 0], [0, 1], [2, 3], [0, 2]])
    assert expert_capacity(index, 3, 2).tolist() == [[0, 1], [1, 3], [0, 3], [2, 3], [3, 2]]


def test_no_expert_stays_no_expert_however_many_tokens_have_none():
    index = torch.full((50, 1), 3)
    assert torch.equal(expert_capacity(index, 3, 1), index)


def test_a_large_capacity_drops_nothing():
    index = torch.randint(0, 5, (40, 2), generator=torch.Generator().manual_seed(0))
    assert torch.equal(expert_capacity(index, 4, 80), index)


@pytest.mark.parametrize(
    ("index", "capacity", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), 1, r"expert_index has shape \(5,\); it must be \(T, K\)"),
        (torch.zeros(5, 1), 1, "expert_index has dtype torch.float32"),
        (torch.zeros(5, 1, dtype=torch.int64), 0, "capacity=0; it must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(index, capacity, message):
    with pytest.raises(ConfigError, match=message):
        expert_capacity(index, 3, capacity)


def test_a_cpu_has_no_kernels_for_it():
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        expert_capacity(torch.zeros(5, 1, dtype=torch.int64), 3, 1, backend="triton")
