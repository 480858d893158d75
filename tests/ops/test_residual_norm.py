import pytest
import torch
from torch import nn

from switchmamba.errors import ConfigError
from switchmamba.ops import residual_norm


@pytest.mark.parametrize("norm", [nn.LayerNorm(12), nn.RMSNorm(12, eps=1e-6)])
def test_equals_the_sum_and_torchs_norm(norm):
    torch.manual_seed(0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x, branch = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    norm = norm.double()
    total, normed = residual_norm(
        x, branch, norm.weight, getattr(norm, "bias", None), norm.eps, isinstance(norm, nn.LayerNorm)
    )
    assert torch.equal(total, x + branch)
    torch.testing.assert_close(normed, norm(x + branch))


def test_gradcheck():
    x, branch = torch.randn(2, 3, 4, dtype=torch.float64)
    weight, bias = torch.randn(2, 4, dtype=torch.float64)
    inputs = tuple(tensor.clone().requires_grad_() for tensor in (x, branch, weight, bias))
    assert torch.autograd.gradcheck(residual_norm, inputs)


def test_without_a_branch_the_sum_is_x():
    x = torch.randn(3, 4)
    total, normed = residual_norm(x)
    assert torch.equal(total, x)
    torch.testing.assert_close(normed, nn.functional.layer_norm(x, (4,)))


def test_the_sum_keeps_the_dtype_of_x_and_autocast_sets_that_of_the_norm():
    x, branch = torch.randn(3, 4), torch.randn(3, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, normed = residual_norm(x, branch)
    assert (total.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    total, normed = residual_norm(branch, x)
    assert (total.dtype, normed.dtype) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, "x has dtype torch.int64"),
        ({"x": torch.zeros(3, 0)}, r"x has shape \(3, 0\); its last dimension must be at least 1"),
        ({"branch": torch.zeros(3, 5)}, r"branch has shape \(3, 5\); it must be \(…, D\) = \(3, 4\)"),
        ({"weight": torch.zeros(5)}, r"weight has shape \(5,\); it must be \(D,\) = \(4,\)"),
        ({"backend": "cpu"}, "backend='cpu' does not exist; choose auto, triton, reference"),
    ],
)
def test_errors_name_value_and_rule(arguments, message):
    with pytest.raises(ConfigError, match=message):
        residual_norm(**({"x": torch.zeros(3, 4)} | arguments))
