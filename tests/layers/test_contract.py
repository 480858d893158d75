"""The contract of every layer: laws that hold whatever it computes. All in fp64, so that tolerances can be tight."""

import copy
import itertools
from typing import get_args

import pytest
import torch

from switchmamba.layers.interface import RouterStats
from switchmamba.layers.routing import AnyRouterConfig
from switchmamba.layers.routing.policy_gradient import DrawnStats
from tests.layers.contract import (
    D_MODEL,
    KINDS,
    LAYERS,
    NON_CAUSAL,
    build_layer,
    documents,
    layer_config,
    one_document,
)

LENGTH = 11


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / b.norm().clamp(min=1e-30)).detach())


def random_input(batch: int = 2, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randn(
        batch, length, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def test_every_layer_kind_has_an_example():
    shown = {type(layer_config(name)) for name in LAYERS}
    assert shown == KINDS, "LAYERS in tests/layers/contract.py needs an example of each kind, and of no other"


def test_every_router_kind_has_an_example():
    shown = {type(layer_config(name).router) for name in LAYERS if name.startswith("moe")}
    kinds = set(get_args(get_args(AnyRouterConfig)[0]))
    assert shown == kinds, (
        "LAYERS in tests/layers/contract.py needs an example of each, moe-…, and of no other"
    )


@pytest.fixture(params=LAYERS)
def name(request):
    return request.param


@pytest.fixture(params=sorted(LAYERS.keys() - NON_CAUSAL))
def causal_name(request):
    return request.param


@pytest.mark.parametrize("non_causal_name", sorted(NON_CAUSAL))
def test_a_layer_that_looks_ahead_says_so_and_why(non_causal_name):
    layer, x = build_layer(non_causal_name).eval(), random_input().requires_grad_()
    assert not layer.causal
    assert "later" in layer.why_not_causal
    changed = x.detach().clone()
    changed[:, 6:] *= 3
    before, after = (layer(value, one_document(2)).y[:, :6] for value in (x, changed))
    assert relative(after, before) > 1e-6


def test_no_later_token_reaches_an_earlier_output(causal_name):
    name = causal_name
    # The gradient says exactly whether there is a path. Values agree up to rounding only: an expert's matrix product
    # may round differently when it has another number of rows.
    layer, x = build_layer(name).eval(), random_input().requires_grad_()
    assert layer.causal
    before = layer(x, one_document(2)).y
    before[:, :6].square().sum().backward()
    assert x.grad[:, 6:].eq(0).all()
    assert x.grad[:, :6].ne(0).any()
    changed = x.detach().clone()
    changed[:, 6:] += torch.randn_like(changed[:, 6:])
    after = layer(changed, one_document(2)).y
    assert relative(after[:, :6], before[:, :6]) < 1e-14
    assert relative(after[:, 6:], before[:, 6:]) > 1e-3


@pytest.mark.parametrize("cut", [1, 2, 3, 7, LENGTH - 1])
def test_two_chunks_equal_the_whole(causal_name, cut):
    name = causal_name
    layer, x = build_layer(name).eval(), random_input()
    whole = layer(x, one_document(2))
    first = layer(x[:, :cut], one_document(2))
    second = layer(x[:, cut:], one_document(2, cut), first.state)
    assert relative(torch.cat([first.y, second.y], 1), whole.y) < 1e-12
    if whole.state is not None:
        for field, tensor in whole.state.tensors().items():
            assert relative(second.state.tensors()[field].double(), tensor.double()) < 1e-12, field


@pytest.mark.parametrize("cut", [2, 4, 5, 8])
def test_packed_documents_in_two_chunks_equal_the_whole(causal_name, cut):
    layer, x = build_layer(causal_name).eval(), random_input()
    ids = torch.tensor([[0] * 4 + [1] * 1 + [2] * 6, [5] * 3 + [6] * 8])
    first = layer(x[:, :cut], documents(ids[:, :cut]))
    begins = ids[:, cut] != ids[:, cut - 1]  # the model resets what was kept of another document
    state = None if first.state is None else first.state.reset(begins)
    second = layer(x[:, cut:], documents(ids[:, cut:], cut, ids[:, cut - 1]), state)
    whole = layer(x, documents(ids))
    assert relative(torch.cat([first.y, second.y], 1), whole.y) < 1e-12


def test_step_by_step_equals_the_whole(causal_name):
    name = causal_name
    layer, x = build_layer(name).eval(), random_input()
    state, outputs = None, []
    for t in range(LENGTH):
        output = layer(x[:, t : t + 1], one_document(2, t), state)
        state = output.state
        outputs.append(output.y)
    assert relative(torch.cat(outputs, 1), layer(x, one_document(2)).y) < 1e-12


def test_packed_documents_equal_separate_ones(name):
    layer, x = build_layer(name).eval(), random_input()
    ids = torch.tensor([[0] * 4 + [1] * 1 + [2] * 6, [5] * 3 + [6] * 8])
    packed = layer(x, documents(ids)).y
    for row, bounds in enumerate([(0, 4, 5, 11), (0, 3, 11)]):
        for start, end in itertools.pairwise(bounds):
            alone = layer(x[row : row + 1, start:end], one_document(1)).y
            assert relative(packed[row : row + 1, start:end], alone) < 1e-12


def test_no_gradient_crosses_a_document_boundary(name):
    layer, x = build_layer(name).eval(), random_input().requires_grad_()
    ids = torch.tensor([[0] * 5 + [1] * 6] * 2)
    layer(x, documents(ids)).y[:, 5:].square().sum().backward()
    assert x.grad[:, :5].eq(0).all()
    assert x.grad[:, 5:].ne(0).any()


def test_left_padding_changes_nothing(name):
    layer, x = build_layer(name).eval(), random_input()
    ids = torch.tensor([[-1] * 3 + [0] * (LENGTH - 3)] * 2)
    padded, plain = layer(x, documents(ids)), layer(x[:, 3:], one_document(2))
    assert relative(padded.y[:, 3:], plain.y) < 1e-12
    for a, b in zip(padded.router_stats, plain.router_stats, strict=True):
        assert torch.equal(a.tokens_per_expert_E, b.tokens_per_expert_E)
        assert a.num_tokens == b.num_tokens
        assert relative(a.probability_sum_E, b.probability_sum_E) < 1e-12
        assert relative(a.squared_logsumexp_sum, b.squared_logsumexp_sum) < 1e-12
        assert relative(a.entropy_sum, b.entropy_sum) < 1e-12


def test_a_row_does_not_depend_on_its_batch_mates(name):
    layer, x = build_layer(name).eval(), random_input(batch=3)
    assert layer.batch_invariant
    together = layer(x, one_document(3)).y
    for row in range(3):
        assert relative(together[row : row + 1], layer(x[row : row + 1], one_document(1)).y) < 1e-12


def test_computed_parameter_count_equals_the_built_one(name):
    cost = layer_config(name).cost(D_MODEL)
    with torch.device("meta"):
        built = layer_config(name).build(D_MODEL)
    assert cost.parameters == sum(p.numel() for p in built.parameters())
    assert cost.active_parameters <= cost.parameters


def test_computed_state_size_equals_the_real_one(name):
    cost, layer = layer_config(name).cost(D_MODEL), build_layer(name).eval()
    state = layer(random_input(batch=1), one_document(1)).state
    floats = 0 if state is None else sum(t.numel() for t in state.tensors().values() if t.is_floating_point())
    assert floats == cost.state_values + LENGTH * cost.state_values_per_token


def test_every_parameter_gets_a_gradient(name):
    layer = build_layer(name).train()
    output = layer(random_input(batch=4, length=32), one_document(4))
    losses = [stats.load_balance_loss + stats.z_loss for stats in output.router_stats]
    counts = torch.arange(4 * 32) % 3 > 0
    drawn = [stats for stats in output.router_stats if isinstance(stats, DrawnStats)]
    losses += [stats.policy_loss(torch.rand(4 * 32), counts) for stats in drawn]
    (output.y.square().sum() + sum(losses)).backward()
    for parameter_name, parameter in layer.named_parameters():
        if not parameter.requires_grad:  # the bias that follows the load
            assert parameter_name.endswith("router.bias")
            continue
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.ne(0).any(), parameter_name


def test_initialization_fills_every_parameter(name):
    from switchmamba.layers.initialization import SCHEMES

    for scheme in SCHEMES.values():
        layer = layer_config(name).build(D_MODEL)
        for parameter in layer.parameters():
            parameter.data.fill_(torch.nan)
        layer.initialize(scheme(num_residual_steps=4))
        for parameter_name, parameter in layer.named_parameters():
            assert parameter.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", [name for name in LAYERS if build_layer(name).state_class is not None])
def test_a_selected_row_of_the_state_continues_like_its_row(name):
    layer, x = build_layer(name).eval(), random_input(batch=3)
    first = layer(x[:, :6], one_document(3))
    whole = layer(x[:, 6:], one_document(3, 6), first.state).y
    rows = torch.tensor([2, 0])
    part = layer(x[rows, 6:], one_document(2, 6), first.state.select(rows)).y
    assert relative(part, whole[rows]) < 1e-12
    stacked = type(first.state).stack([first.state.select(rows[:1]), first.state.select(rows[1:])])
    assert relative(layer(x[rows, 6:], one_document(2, 6), stacked).y, whole[rows]) < 1e-12


def test_bfloat16_conversion_keeps_delicate_parameters_in_float32(name):
    layer = build_layer(name, dtype=torch.float32)
    before = copy.deepcopy(dict(layer.named_parameters()))
    layer = layer.to(torch.bfloat16)
    kept = {n for n, p in layer.named_parameters() if p.dtype == torch.float32}
    expected = {
        n
        for n in before
        if n.split(".")[-1] in {"A_log", "D"} or n in {"dt_proj.bias", "dt_bias"} or "router" in n.split(".")
    }
    assert kept == expected
    for parameter_name in kept:
        assert torch.equal(dict(layer.named_parameters())[parameter_name], before[parameter_name])
    output = layer(random_input().bfloat16(), one_document(2))
    assert output.y.dtype == torch.bfloat16
    for state_name in ("ssm_BIN", "ssm_BHPN"):
        if hasattr(output.state, state_name):
            assert getattr(output.state, state_name).dtype == torch.float32


def test_statistics_say_what_the_router_did(name):
    layer = build_layer(name).eval()
    for stats in layer(random_input(), one_document(2)).router_stats:
        assert isinstance(stats, RouterStats)
        if name not in NON_CAUSAL:  # whose experts take what is their share, not what comes
            assert int(stats.tokens_per_expert_E.sum()) == 2 * LENGTH * stats.top_k
        assert float(stats.fraction_E.sum()) == pytest.approx(1)
        assert float(stats.probability_sum_E.detach().sum()) == pytest.approx(2 * LENGTH)
        assert int(stats.num_tokens) == 2 * LENGTH
        assert stats.dropped == 0 or name.endswith("expert-choice")
