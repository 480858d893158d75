"""The router of ``docs/routing.md`` is one."""

from pathlib import Path
from typing import Any

import torch

from tests.docs.blocks import run_by_a_test

PAGE = Path(__file__).parent.parent / "docs" / "routing.md"


def test_the_router_of_the_page_sends_each_token_to_the_nearest_expert_and_padding_to_none() -> None:
    (block,) = run_by_a_test(PAGE, "python")
    names: dict[str, Any] = {}
    exec(block, names)
    config = names["CosineRouterConfig"]()
    router = config.build(8, 4)
    assert sum(p.numel() for p in router.parameters()) == config.parameters(8, 4)
    torch.nn.init.orthogonal_(router.weight)
    x_TD = 3 * router.weight.detach()[[2, 0, 1, 3]] + 0.01
    routing = router(x_TD, torch.tensor([False, False, True, False]))
    assert routing.expert_index_TK.flatten().tolist() == [2, 0, 4, 3]
    assert routing.stats.tokens_per_expert_E.tolist() == [1, 0, 1, 1]
    routing.expert_weight_TK.sum().backward()
    assert router.weight.grad is not None and router.weight.grad.any()
