"""Projections with a shorter way back are the projections, forward and backward."""

import pytest
import torch
from torch import nn

from switchmamba.layers.initialization import SCHEMES
from switchmamba.layers.interface import SequenceInfo
from switchmamba.layers.mixers.halves import product, project, project_halves, split_product
from switchmamba.layers.mixers.mamba import MambaConfig


@pytest.mark.parametrize("autocast", [False, True])
def test_the_shorter_way_back_gives_the_gradients_of_autograd(autocast):
    torch.manual_seed(0)
    u = torch.randn(2, 5, 6, requires_grad=True)
    projection = nn.Linear(6, 16, bias=False)
    cotangents = torch.randn(2, 2, 5, 8)
    found = []
    for run in (lambda: project_halves(projection, u), lambda: split_product(u, projection.weight)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            halves = run()
        assert [half.dtype for half in halves] == [torch.bfloat16 if autocast else torch.float32] * 2
        dy = [c.to(half.dtype) for c, half in zip(cotangents, halves, strict=True)]
        found.append((*halves, *torch.autograd.grad(halves, (u, projection.weight), dy)))
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=2e-2 if autocast else 1e-5, atol=2e-2 if autocast else 1e-6
        )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("u_dtype", [torch.float32, torch.bfloat16])
def test_a_product_gives_the_gradients_of_autograd(autocast, u_dtype):
    torch.manual_seed(0)
    if u_dtype == torch.bfloat16 and not autocast:
        pytest.skip("a product of two dtypes needs autocast")
    u = torch.randn(2, 5, 6, dtype=u_dtype, requires_grad=True)
    projection = nn.Linear(6, 7, bias=False)
    dy, found = torch.randn(2, 5, 7), []
    for run in (lambda: project(projection, u), lambda: product(u, projection.weight)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = run()
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        found.append((y, *torch.autograd.grad(y, (u, projection.weight), dy.to(y.dtype))))
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert ours.dtype == theirs.dtype
        tolerance = 2e-2 if autocast else 1e-5
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("run", [project, project_halves])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_on_the_projection_is_called(run, kind):
    calls = []
    u = torch.randn(2, 5, 6, requires_grad=True, device="meta")  # on a CPU every way is autograd's
    projection = nn.Linear(6, 16, bias=False, device="meta")
    getattr(projection, f"register_{kind}_hook")(lambda *_: calls.append(kind))
    y = run(projection, u)
    (y if isinstance(y, torch.Tensor) else torch.cat(y)).sum().backward()
    assert calls == [kind]


def test_gradcheck():
    u, weight = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    for run in (product, split_product):
        assert torch.autograd.gradcheck(run, (u.requires_grad_(), weight.requires_grad_()))


def test_channels_that_pad_a_mamba_layer_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = MambaConfig(expand="4/3", d_state=4).build(16).double()
    layer.initialize(SCHEMES["modern"](num_residual_steps=2))
    x_BLD = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    ids_BL = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    sequence = SequenceInfo(ids_BL, None, torch.zeros(2, dtype=torch.int64), ids_BL[:, -1])

    def outcome(extra: int) -> list[torch.Tensor]:
        monkeypatch.setattr(layer, "_extra_channels", lambda x: extra)
        y, state, _ = layer(x_BLD, sequence)
        gradients = torch.autograd.grad(y.square().sum(), [x_BLD, *layer.parameters()])
        return [y, *state.tensors().values(), *gradients]

    for plain, padded in zip(outcome(0), outcome(-21 % 16), strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-12, atol=1e-12)


def test_a_layer_with_an_adapter_is_not_padded() -> None:
    layer = MambaConfig(expand="4/3").build(16)
    x = torch.empty(1, 2, 16, device="meta")
    assert layer._extra_channels(x) == -21 % 16
    layer.dt_proj = nn.Sequential(layer.dt_proj)
    assert layer._extra_channels(x) == 0


@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_a_layer_with_a_hook_is_not_padded_so_that_the_hook_is_called(name: str) -> None:
    layer = MambaConfig(expand="4/3").build(16)
    layer.get_submodule(name).register_forward_hook(lambda *_: None)
    assert layer._extra_channels(torch.empty(1, 2, 16, device="meta")) == 0
