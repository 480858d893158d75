"""Laws of routing: who goes where, who is dropped, and what the balance loss says."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchmamba.errors import NonFiniteError
from switchmamba.layers.initialization import ModernInitialization
from switchmamba.layers.interface import RouterStats
from switchmamba.layers.routing import limit_capacity
from switchmamba.layers.routing.top_k import TopKRouterConfig, largest
from tests.layers.contract import build_layer, documents, one_document


def router(experts: int, top_k: int = 1, d_model: int = 8, seed: int = 0):
    torch.manual_seed(seed)
    built = TopKRouterConfig(top_k=top_k).build(d_model, experts)
    built.initialize(ModernInitialization(num_residual_steps=1))
    return built


def tokens(count: int, d_model: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, d_model, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_chosen_experts_are_distinct_and_the_best(experts, top_k, seed):
    top_k = min(top_k, experts)
    routing = router(experts, top_k)(tokens(30, seed=seed), None)
    probabilities = (tokens(30, seed=seed) @ router(experts, top_k).weight.T).softmax(-1)
    for row, chosen in zip(probabilities, routing.expert_index_TK, strict=True):
        assert len(set(chosen.tolist())) == top_k
        assert sorted(row[chosen].tolist()) == sorted(row.topk(top_k).values.tolist())


def test_ties_go_to_the_lower_index():
    assert largest(torch.tensor([[0.2, 0.4, 0.4, 0.0], [0.25, 0.25, 0.25, 0.25]]), 3).tolist() == [
        [1, 2, 0],
        [0, 1, 2],
    ]


def test_one_choice_weighs_by_its_raw_probability_and_more_by_the_renormalised():
    x = tokens(20)
    one, two = router(4, 1)(x, None), router(4, 2)(x, None)
    probabilities = (x @ router(4).weight.T).softmax(-1)
    assert torch.allclose(one.expert_weight_TK[:, 0], probabilities.max(-1).values)
    assert torch.allclose(two.expert_weight_TK.sum(-1), torch.ones(20))


def test_without_renormalisation_more_choices_weigh_by_their_raw_probabilities_too():
    x = tokens(20)
    raw = TopKRouterConfig(top_k=2, renormalize=False).build(8, 4)
    raw.load_state_dict(router(4).state_dict())
    probabilities = (x @ router(4).weight.T).softmax(-1)
    assert torch.allclose(raw(x, None).expert_weight_TK, probabilities.topk(2).values)


def test_nan_raises():
    x = tokens(5)
    x[3, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="router"):
        router(4)(x, None)


def test_uniform_routing_has_balance_loss_one():
    built = router(4, d_model=4)
    built.weight.data = torch.eye(4)
    stats = built(torch.eye(4).repeat(5, 1), None).stats
    assert float(stats.load_balance_loss.detach()) == pytest.approx(1, abs=1e-6)
    assert float(stats.largest_load) == pytest.approx(1)
    assert int(stats.dead_experts) == 0


@given(st.integers(2, 10), st.integers(1, 50), st.integers(0, 99), st.floats(0.1, 30))
@settings(deadline=None, max_examples=40)
def test_balance_loss_lies_between_sum_of_squares_and_number_of_experts(experts, count, seed, scale):
    stats = router(experts, seed=seed)(scale * tokens(count, seed=seed), None).stats
    fractions = stats.fraction_E
    assert float(fractions.square().sum()) - 1e-5 <= float(stats.load_balance_loss.detach()) <= experts + 1e-5


def test_balance_loss_pulls_the_router():
    built = router(4)
    built(tokens(20), None).stats.load_balance_loss.backward()
    assert built.weight.grad.norm() > 0


def test_collapse_shows_in_the_statistics():
    built = router(4)
    built.weight.data = torch.tensor([[10.0] * 8] + [[-10.0] * 8] * 3)
    stats = built(tokens(20).abs(), None).stats
    assert int(stats.dead_experts) == 3
    assert float(stats.largest_load) == pytest.approx(4)
    assert float(stats.entropy) == pytest.approx(0, abs=1e-4)
    assert float(stats.load_balance_loss.detach()) == pytest.approx(4, abs=1e-4)


def test_every_statistic_of_stacked_routers_is_that_of_each():
    each = [router(4)(tokens(count), None).stats for count in (2, 20)]
    names = [f.name for f in fields(RouterStats) if f.name != "top_k"]
    stacked = replace(each[0], **{n: torch.stack([getattr(s, n) for s in each]) for n in names})
    properties = [n for n, member in vars(RouterStats).items() if isinstance(member, property)]
    for name in set(properties) - {"num_experts"}:
        expected = torch.stack([getattr(s, name) for s in each])
        torch.testing.assert_close(getattr(stacked, name), expected, rtol=1e-6, atol=0, msg=name)
    assert stacked.num_experts == 4


def brute_force_capacity(index_TK: torch.Tensor, experts: int, capacity: int) -> torch.Tensor:
    kept, load = index_TK.clone(), [0] * experts
    for k in range(index_TK.shape[1]):
        for t in range(index_TK.shape[0]):
            expert = int(index_TK[t, k])
            if load[expert] == capacity:
                kept[t, k] = experts
            else:
                load[expert] += 1
    return kept


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 40), st.floats(0.1, 3), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_capacity_keeps_first_choices_then_earlier_tokens(experts, top_k, count, factor, seed):
    top_k = min(top_k, experts)
    routing = router(experts, top_k)(tokens(count, seed=seed), None)
    limited = limit_capacity(routing, factor)
    capacity = max(1, int(factor * top_k * count / experts))
    expected = brute_force_capacity(routing.expert_index_TK, experts, capacity)
    assert torch.equal(limited.expert_index_TK, expected)
    assert int(limited.stats.dropped) == int((expected == experts).sum())
    assert torch.equal(limited.stats.tokens_per_expert_E, routing.stats.tokens_per_expert_E)


def test_infinite_capacity_equals_dropless():
    torch.manual_seed(0)
    layer = build_layer("moe-capacity").train()
    x = torch.randn(2, 16, 24, dtype=torch.float64)
    layer.capacity_factor = 1e9
    roomy = layer(x, one_document(2)).y
    layer.capacity_factor = None
    assert torch.equal(roomy, layer(x, one_document(2)).y)


def test_evaluation_never_drops_and_training_does():
    torch.manual_seed(0)
    layer = build_layer("moe-capacity")
    layer.capacity_factor = 0.5
    x = torch.randn(2, 16, 24, dtype=torch.float64)
    assert layer.train()(x, one_document(2)).router_stats[0].dropped > 0
    assert layer.eval()(x, one_document(2)).router_stats[0].dropped == 0


def test_a_dropped_token_gets_zero_from_the_layer():
    torch.manual_seed(0)
    layer = build_layer("moe-capacity").train()
    layer.capacity_factor = 1e-9
    y = layer(torch.randn(1, 16, 24, dtype=torch.float64), one_document(1)).y[0]
    assert int((y.abs().sum(-1) > 0).sum()) <= 4
    assert int((y.abs().sum(-1) > 0).sum()) >= 1


def test_padding_takes_no_capacity():
    torch.manual_seed(0)
    layer = build_layer("moe-capacity").train()
    layer.capacity_factor = 4.0
    x = torch.randn(1, 8, 24, dtype=torch.float64)
    ids = torch.tensor([[-1] * 4 + [0] * 4])
    stats = layer(x, documents(ids)).router_stats[0]
    assert int(stats.num_tokens) == 4
    assert int(stats.tokens_per_expert_E.sum()) == 4
    assert stats.dropped == 0


def test_entropy_and_z_loss_equal_their_definitions():
    built = router(5).double()
    x = 3 * tokens(20).double()
    logits = x @ built.weight.T
    stats = built(x, None).stats
    assert float(stats.z_loss.detach()) == pytest.approx(
        float(logits.logsumexp(-1).square().mean().detach()), rel=1e-12
    )
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1).mean()
    assert float(stats.entropy) == pytest.approx(float(entropy.detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(stats.z_loss, built.weight)
    (expected,) = torch.autograd.grad(logits.logsumexp(-1).square().mean(), built.weight)
    assert torch.allclose(gradient, expected, rtol=1e-10)


def test_two_passes_add_up():
    built = router(4)
    x = tokens(20)
    whole, parts = built(x, None).stats, built(x[:7], None).stats + built(x[7:], None).stats
    assert torch.equal(whole.tokens_per_expert_E, parts.tokens_per_expert_E)
    assert float(whole.load_balance_loss.detach()) == pytest.approx(
        float(parts.load_balance_loss.detach()), rel=1e-5
    )
