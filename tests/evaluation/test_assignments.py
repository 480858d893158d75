"""Assignments are counted also where experts read something else than one row per token."""

import pytest
import torch

from switchmamba import LanguageModel
from switchmamba.evaluation.specialisation import count_assignments
from tests.layers.contract import model_config


@pytest.mark.parametrize("layer", ["moe-expert-choice", "moe-soft", "moe-top-2"])
def test_assignments_are_counted_for_the_token_that_stands_in_them(layer):
    torch.manual_seed(0)
    model = LanguageModel(model_config(["mamba", layer])).eval()
    tokens, ids = torch.randint(0, 50, (2, 12)), torch.tensor([[0] * 12, [-1] * 2 + [0] * 4 + [1] * 6])
    first, second = count_assignments(model, [(tokens, ids)])
    seen = set(tokens[ids >= 0].tolist())
    for counts in (first, second):
        assert int(counts.sum()) > 0
        assert set(counts.sum(1).nonzero().flatten().tolist()) <= seen
        if layer != "moe-top-2":
            assert counts.sum(0).unique().numel() == 1  # even by construction
