"""Eight bits: an entry is off by half a scale at most, and every backend computes what the definition says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchmamba.errors import ConfigError
from switchmamba.ops.int8_linear import INT8_LINEAR, int8_linear, quantize_rows

BACKENDS = [name for name in INT8_LINEAR.backends if name != "reference"]


def some(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(
    rows=st.integers(0, 20),
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 70),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_every_backend_computes_the_product_with_the_weight_that_is_meant(
    rows, outputs, inputs, backend, seed
):
    weight, scale = quantize_rows(some(outputs, inputs, seed=seed))
    x = some(rows, inputs, seed=seed + 1)
    expected = int8_linear(x.double(), weight, scale.double(), backend="reference")
    y = int8_linear(x, weight, scale, backend=backend)
    assert y.dtype == torch.float32
    assert (y - expected).norm() <= 1e-6 * expected.norm() + 1e-12


@pytest.mark.parametrize("threads", [1, 2])
def test_large_weights_on_any_number_of_threads_have_the_same_bits(threads):
    weight, scale = quantize_rows(some(5000, 300))
    x = some(3, 300, seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = int8_linear(x, weight, scale, backend="cpu")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, torch.cat([int8_linear(row[None], weight, scale, backend="cpu") for row in x]))


@given(
    weight=st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=5)
)
def test_an_entry_is_off_by_half_a_scale_at_most_and_the_largest_one_is_exact(weight):
    weight = torch.tensor(weight)
    quantized, scale = quantize_rows(weight)
    meant = quantized.double() * scale.double()[:, None]
    assert ((meant - weight).abs() <= 0.5 * scale[:, None] * (1 + 1e-5) + 1e-37).all()
    largest = weight.double().abs().amax(1)
    assert torch.allclose(meant.abs().amax(1), largest, rtol=1e-6, atol=1e-37)


def test_a_row_of_zeros_stays_zero():
    weight, scale = quantize_rows(torch.zeros(2, 4))
    assert torch.equal(int8_linear(some(3, 4), weight, scale), torch.zeros(3, 2))


def test_experts_are_quantised_row_by_row_each():
    weights = some(3, 5, 7)
    quantized, scale = quantize_rows(weights)
    for expert in range(3):
        alone, alone_scale = quantize_rows(weights[expert])
        assert torch.equal(quantized[expert], alone)
        assert torch.equal(scale[expert], alone_scale)


def test_the_gradient_of_x_is_that_of_the_weight_that_is_meant():
    weight, scale = quantize_rows(some(6, 5))
    x = some(4, 5, seed=1).requires_grad_()
    dy = some(4, 6, seed=2)
    int8_linear(x, weight, scale).backward(dy)
    assert torch.allclose(x.grad, dy @ (weight * scale[:, None]), rtol=1e-5)


def test_bf16_keeps_its_dtype():
    weight, scale = quantize_rows(some(6, 5))
    y = int8_linear(some(4, 5).bfloat16(), weight, scale)
    expected = int8_linear(some(4, 5).bfloat16(), weight, scale, backend="reference")
    assert y.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(y.float(), expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(6, 5)}, "must be int8"),
        ({"scale": torch.ones(5)}, "must be (O,) = (6,)"),
        ({"x": torch.zeros(4, 6)}, "must be weight's, 5"),
        ({"x": torch.zeros(4, 5, dtype=torch.int64)}, "must be floating"),
        ({"x": torch.zeros(4, 5).double(), "backend": "cpu"}, "computes in fp32"),
        ({"backend": "nonesuch"}, "does not exist"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    weight, scale = quantize_rows(some(6, 5))
    with pytest.raises(ConfigError) as refusal:
        int8_linear(**({"x": some(4, 5), "weight": weight, "scale": scale} | change))
    assert message in str(refusal.value)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ConfigError, match="not finite"):
        quantize_rows(torch.tensor([[1.0, float("nan")]]))
