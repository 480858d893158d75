"""The grouped experts' logic on a CPU, where ``F.grouped_mm`` loops over the groups; its GPU kernels need a GPU.

Uninitialised memory is filled with NaN, so that rows which belong to no expert cannot leak unnoticed.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from switchmamba.ops.expert_feed_forward import EXPERT_FEED_FORWARD
from switchmamba.ops.expert_feed_forward.activations import ACTIVATIONS
from switchmamba.ops.expert_feed_forward.grouped import expert_feed_forward_grouped, unavailable
from switchmamba.ops.expert_feed_forward.reference import expert_feed_forward_reference
from tests.ops.agreement import distance


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def outputs_and_gradients(run, index, activation, dtype, tokens, experts, d_model, d_expert) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(dtype).requires_grad_()

    hidden = 2 * d_expert if activation == "swiglu" else d_expert
    x, w1, w2 = random(tokens, d_model), random(experts, hidden, d_model), random(experts, d_model, d_expert)
    weight = torch.rand(index.shape, generator=generator).to(torch.promote_types(dtype, torch.float32))
    weight.requires_grad_()
    y = run(x, index, weight, w1, w2, activation, dtype)
    y.backward(torch.randn(tokens, d_model, generator=generator).to(dtype))
    return [y.detach(), *(leaf.grad for leaf in (x, weight, w1, w2))]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("index", "d_model", "d_expert"),
    [
        pytest.param(torch.randint(0, 8, (63, 2), generator=torch.Generator().manual_seed(0)), 16, 24, id="mixed"),
        pytest.param(torch.randint(0, 8, (20, 3), generator=torch.Generator().manual_seed(1)), 6, 10, id="odd widths"),
        pytest.param(torch.full((40, 1), 3), 8, 16, id="all to one"),
        pytest.param(torch.full((40, 1), 7), 8, 16, id="all dropped"),
        pytest.param(torch.tensor([[0], [6], [7], [0]]), 8, 8, id="first, last and dropped"),
    ],
)  # fmt: skip
def test_outputs_and_gradients_are_as_accurate_as_the_reference(activation, index, d_model, d_expert):
    shape = (len(index), 7, d_model, d_expert)
    truth = outputs_and_gradients(expert_feed_forward_reference, index, activation, torch.float64, *shape)
    reference = outputs_and_gradients(
        expert_feed_forward_reference, index, activation, torch.bfloat16, *shape
    )
    found = outputs_and_gradients(expert_feed_forward_grouped, index, activation, torch.bfloat16, *shape)
    for name, f, r, t in zip(("y", "x", "weight", "w1", "w2"), found, reference, truth, strict=True):
        allowed = 2 * distance(r, t) + 8 * torch.finfo(torch.bfloat16).eps
        assert distance(f, t) <= allowed, name


def test_a_dropped_assignment_contributes_exactly_zero_whatever_it_holds():
    index = torch.tensor([[2], [0], [2], [1]])
    x = torch.randn(4, 8).bfloat16()
    x[0] = torch.nan
    x.requires_grad_()
    weight = torch.tensor([[torch.inf], [1.0], [torch.nan], [1.0]], requires_grad=True)
    w1, w2 = (torch.randn(2, 8, 8).bfloat16().requires_grad_() for _ in range(2))
    y = expert_feed_forward_grouped(x, index, weight, w1, w2, "relu", torch.bfloat16)
    y.sum().backward()
    for tensor in (y, x.grad, weight.grad):
        assert tensor[[0, 2]].count_nonzero() == 0
    assert all(tensor.isfinite().all() for tensor in (y, x.grad, weight.grad, w1.grad, w2.grad))


def test_it_says_why_it_does_not_serve_a_cpu_and_auto_takes_another():
    cpu = torch.device("cpu")
    assert unavailable(cpu, torch.bfloat16) == "it needs a CUDA device, the inputs are on cpu"
    assert EXPERT_FEED_FORWARD.report(cpu, torch.bfloat16)["eager"] == "chosen"
