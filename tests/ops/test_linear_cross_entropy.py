import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from switchmamba.errors import ConfigError
from switchmamba.ops import linear_cross_entropy
from switchmamba.ops.linear_cross_entropy import CPU_CHUNK
from tests.ops.agreement import assert_as_accurate_as_the_reference, distance, results

BACKENDS = ["eager", "reference"]


def example(tokens: int, vocab_size: int, d_model: int = 8, dtype: torch.dtype = torch.float64) -> dict:
    """Random inputs; a third of the targets is ignored."""
    generator = torch.Generator().manual_seed(tokens)
    target = torch.randint(0, vocab_size, (tokens,), generator=generator)
    target[torch.rand(tokens, generator=generator) < 1 / 3] = -100
    return {
        "x": torch.randn(tokens, d_model, generator=generator, dtype=torch.float64).to(dtype),
        "weight": torch.randn(vocab_size, d_model, generator=generator, dtype=torch.float64).to(dtype),
        "target": target,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torchs_cross_entropy_of_all_logits(backend, reduction):
    e = example(50, 19)
    expected = F.cross_entropy(e["x"] @ e["weight"].t(), e["target"], reduction=reduction)
    torch.testing.assert_close(linear_cross_entropy(**e, reduction=reduction, backend=backend), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("tokens", "chunk_size"), [(1, 1), (63, 64), (63, 10), (1000, None), (64, 64)])
def test_eager_equals_the_reference_in_fp64(tokens, chunk_size, reduction):
    e = example(tokens, 37) | {"chunk_size": chunk_size, "reduction": reduction}
    found, truth = (results(linear_cross_entropy, e, torch.float64, backend) for backend in BACKENDS)
    for name in truth:
        assert distance(found[name], truth[name]) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_eager_is_as_accurate_as_the_reference(dtype, reduction):
    e = example(300, 500, d_model=32) | {"chunk_size": 64, "reduction": reduction}
    assert_as_accurate_as_the_reference(linear_cross_entropy, e, "eager", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(backend, reduction):
    e = example(7, 5, d_model=3)

    def run(x, weight):
        return linear_cross_entropy(
            x, weight, e["target"], reduction=reduction, chunk_size=3, backend=backend
        )

    assert torch.autograd.gradcheck(run, (e["x"].requires_grad_(), e["weight"].requires_grad_()))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.floats(-4, 4))
def test_the_chunk_size_changes_nothing_and_upstream_gradients_scale(tokens, chunk_size, scale):
    e = example(tokens, 11)
    x, weight = e["x"].requires_grad_(), e["weight"].requires_grad_()
    whole = torch.autograd.grad(linear_cross_entropy(**e), (x, weight))
    loss = linear_cross_entropy(**e, chunk_size=chunk_size)
    for _ in range(2):
        chunked = torch.autograd.grad(loss * scale, (x, weight), retain_graph=True)
        for found, expected in zip(chunked, whole, strict=True):
            torch.testing.assert_close(found, expected * scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_without_targets_loss_and_gradients_are_zero(backend, reduction, tokens):
    e = example(tokens, 11)
    e["target"][:] = -100
    x, weight = e["x"].requires_grad_(), e["weight"].requires_grad_()
    loss = linear_cross_entropy(**e, reduction=reduction, backend=backend)
    loss.sum().backward()
    assert loss.count_nonzero() == x.grad.count_nonzero() == weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ignored_tokens_nan_counts_nowhere_and_any_other_propagates(backend):
    e = example(12, 11)
    e["target"][:] = 3
    e["target"][4] = -1
    e["x"][4] = torch.nan
    x, weight = e["x"].requires_grad_(), e["weight"].requires_grad_()
    loss = linear_cross_entropy(**e, ignore_index=-1, backend=backend)
    loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all()
    assert x.grad[4].count_nonzero() == 0
    with torch.no_grad():
        x[5, 0] = torch.nan
    losses = linear_cross_entropy(**e, ignore_index=-1, reduction="none", backend=backend)
    assert losses.isnan().nonzero().tolist() == [[5]]
    assert linear_cross_entropy(**e, ignore_index=-1, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_logits_neither_overflow_nor_lose_the_loss(backend):
    x = torch.tensor([[1e30], [-1e30], [1e4]]).requires_grad_()
    weight = torch.tensor([[1.0], [-1.0]])
    losses = linear_cross_entropy(x, weight, torch.tensor([0, 1, 1]), reduction="none", backend=backend)
    assert losses.tolist() == [0.0, 0.0, 2e4]
    loss = linear_cross_entropy(x, weight, torch.tensor([0, 1, 1]), reduction="sum", backend=backend)
    assert torch.autograd.grad(loss, x)[0].tolist() == [[0.0], [0.0], [2.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_cost_log_v(backend):
    loss = linear_cross_entropy(torch.zeros(3, 4), torch.ones(50, 4), torch.arange(3), backend=backend)
    assert loss.item() == pytest.approx(math.log(50))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bf16_and_autocast_give_an_fp32_loss_and_gradients_in_the_inputs_dtype(backend, reduction):
    e = example(200, 100, d_model=16, dtype=torch.float32)
    exact = results(linear_cross_entropy, e | {"reduction": reduction}, torch.float64, "reference")
    cotangent = torch.randn(
        exact["output 0"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        x, weight = (e[name].to(dtype, copy=True).requires_grad_() for name in ("x", "weight"))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = linear_cross_entropy(x, weight, e["target"], reduction=reduction, backend=backend)
        loss.backward(cotangent.float())
        assert loss.dtype == torch.float32
        assert 1e-7 < distance(loss.detach(), exact["output 0"]) < 1e-2
        for name, value in (("x", x), ("weight", weight)):
            assert value.grad.dtype == dtype
            assert distance(value.grad, exact[f"gradient of {name}"]) < 2e-2, name


def test_no_tensor_of_all_logits_is_made_or_kept():
    e = example(2000, 500, dtype=torch.float32)
    largest = LargestTensor()
    with largest:
        linear_cross_entropy(e["x"].requires_grad_(), e["weight"].requires_grad_(), e["target"]).backward()
    assert largest.numel == CPU_CHUNK * 500


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_without_gradients_none_are_computed():
    e = example(20, 10)
    e["x"].requires_grad_()
    with torch.no_grad():
        assert linear_cross_entropy(**e).grad_fn is None
    frozen_head = linear_cross_entropy(**e)
    frozen_head.backward()
    assert e["weight"].grad is None
    both = results(linear_cross_entropy, e, torch.float64, "reference")
    cotangent = torch.randn((), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(e["x"].grad * cotangent, both["gradient of x"])


def test_the_same_inputs_give_the_same_bits_whatever_their_strides():
    e = example(700, 300, d_model=32)
    first, second = (results(linear_cross_entropy, e, torch.float32, "eager") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    strided = {name: torch.stack([e[name], e[name]], dim=-1)[..., 0] for name in e}
    found = results(linear_cross_entropy, strided, torch.float32, "eager")
    assert all(distance(found[name], first[name]) < 1e-6 for name in first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x has shape \(2, 3, 4\); it must be \(T, D\)"),
        ({"weight": torch.zeros(11, 4)}, r"weight has shape \(11, 4\); it must be \(V, D\) = \(11, 8\)"),
        (
            {"target": torch.zeros(4, dtype=torch.int64)},
            r"target has shape \(4,\); it must be \(T,\) = \(5,\)",
        ),
        ({"target": torch.zeros(5)}, "target has dtype torch.float32; it must be an integer type"),
        ({"target": torch.tensor([0, 1, 11, 2, 3])}, "target 11 is neither in 0 … 10 nor ignore_index=-100"),
        ({"target": torch.tensor([0, 1, -1, 2, 3])}, "target -1 is neither in 0 … 10 nor ignore_index=-100"),
        ({"reduction": "batchmean"}, "reduction='batchmean' does not exist; choose mean, sum, none"),
        ({"chunk_size": 0}, "chunk_size=0; it must be at least 1"),
        ({"weight": torch.zeros(11, 8, dtype=torch.bfloat16)}, "give them one dtype, or use torch.autocast"),
        ({"backend": "liger"}, "backend='liger' does not exist; choose auto, triton, eager, reference"),
    ],
)
def test_errors_name_value_and_rule(change, message):
    with pytest.raises(ConfigError, match=message):
        linear_cross_entropy(**(example(5, 11) | change))
