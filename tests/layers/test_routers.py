"""What each router promises beyond the contract of every layer, and what it is refused for."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchmamba import LanguageModel
from switchmamba.config import validate
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import ConfigError, NonFiniteError
from switchmamba.generation.generate import generate
from switchmamba.layers.feed_forward.mlp import MLPConfig
from switchmamba.layers.feed_forward.moe import MoEConfig
from switchmamba.layers.initialization import ModernInitialization
from switchmamba.layers.interface import RouterStats
from switchmamba.layers.routing.bias_balanced import BiasBalancedRouterConfig
from switchmamba.layers.routing.expert_choice import ExpertChoiceRouterConfig, taken
from switchmamba.layers.routing.gumbel import GumbelRouterConfig, gumbel_noise
from switchmamba.layers.routing.policy_gradient import DrawnStats, PolicyGradientRouterConfig
from switchmamba.layers.routing.soft import SoftRouterConfig
from switchmamba.layers.routing.top_k import TopKRouterConfig
from switchmamba.models.config import ModelConfig
from switchmamba.models.loading import load, save_model
from tests.generation.tiny_models import tiny_tokenizer
from tests.layers.contract import LAYERS, NON_CAUSAL, build_layer, documents, model_config, one_document


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


def built(config, experts: int = 4, d_model: int = 8, seed: int = 0):
    torch.manual_seed(seed)
    router = config.build(d_model, experts)
    router.initialize(ModernInitialization(num_residual_steps=1))
    return router.double().eval()


def tokens(count: int, d_model: int = 8, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, d_model, generator=generator, dtype=torch.float64)


# Temperature


def test_temperature_changes_weights_and_no_choice():
    x = tokens(50)
    plain, cold = (built(TopKRouterConfig(temperature=t))(x, None) for t in (1.0, 0.25))
    assert torch.equal(plain.expert_index_TK, cold.expert_index_TK)
    expected = (4 * x @ built(TopKRouterConfig()).weight.T).softmax(-1).max(-1).values
    assert torch.allclose(cold.expert_weight_TK[:, 0], expected)
    assert (cold.expert_weight_TK > plain.expert_weight_TK).all()
    assert cold.stats.entropy < plain.stats.entropy


# Gumbel


def test_gumbel_noise_makes_the_choice_a_draw_from_the_softmax():
    router = built(GumbelRouterConfig(temperature=0.1)).train()
    x = tokens(1).expand(20_000, -1)
    torch.manual_seed(0)
    routing = router(x, None)
    share = torch.bincount(routing.expert_index_TK.flatten(), minlength=4) / 20_000
    expected = (x[0] @ router.weight.T).softmax(-1)
    assert torch.allclose(share.double(), expected, atol=0.012)
    assert torch.allclose(routing.stats.probability_sum_E / 20_000, expected)


@pytest.mark.parametrize("config", [GumbelRouterConfig(top_k=2), PolicyGradientRouterConfig()])
def test_draws_come_from_the_global_generator_in_training_and_not_at_all_in_evaluation(config):
    router, x = built(config), tokens(30)

    def choices() -> torch.Tensor:
        return router(x, None).expert_index_TK

    torch.manual_seed(3)
    router.train()
    first, second = choices(), choices()
    torch.manual_seed(3)
    assert torch.equal(first, choices())
    assert not torch.equal(first, second)
    before = torch.get_rng_state()
    router.eval()
    assert torch.equal(choices(), choices())
    assert torch.equal(torch.get_rng_state(), before)


def test_gumbel_without_noise_is_top_k():
    x = tokens(40)
    one, other = built(GumbelRouterConfig(top_k=2))(x, None), built(TopKRouterConfig(top_k=2))(x, None)
    assert torch.equal(one.expert_index_TK, other.expert_index_TK)
    assert torch.equal(one.expert_weight_TK, other.expert_weight_TK)


def test_gumbel_noise_has_its_mean():
    torch.manual_seed(0)
    assert float(gumbel_noise(torch.empty(100_000)).mean()) == pytest.approx(0.5772, abs=0.02)


# Bias


def test_the_bias_chooses_and_does_not_weigh():
    x, router = tokens(40), built(BiasBalancedRouterConfig())
    plain = router(x, None)
    with torch.no_grad():
        router.bias[2] = 10.0
    biased = router(x, None)
    assert biased.expert_index_TK.eq(2).all()
    scores = (x @ router.weight.T).sigmoid()
    assert torch.allclose(biased.expert_weight_TK[:, 0], scores[:, 2])
    assert torch.equal(biased.stats.probability_sum_E, plain.stats.probability_sum_E)


def test_the_bias_follows_the_load_until_it_is_even():
    x, router = tokens(400), built(BiasBalancedRouterConfig())
    router.weight.data[0] *= 8
    before = router(x, None).stats
    router.follow_load_(before.tokens_per_expert_E, 0.25)
    load = before.tokens_per_expert_E.double()
    assert torch.equal(router.bias.detach(), 0.25 * (load.mean() - load).sign())
    for rate in (0.03,) * 60 + (0.003,) * 100:
        router.follow_load_(router(x, None).stats.tokens_per_expert_E, rate)
    after = router(x, None).stats
    assert float(before.largest_load) > 1.5
    assert float(after.largest_load) < 1.1


def test_bias_scores_are_shares_where_several_are_chosen():
    routing = built(BiasBalancedRouterConfig(top_k=3))(tokens(20), None)
    assert torch.allclose(routing.expert_weight_TK.sum(-1), torch.ones(20, dtype=torch.float64))
    normalised = (tokens(20) @ built(BiasBalancedRouterConfig()).weight.T).sigmoid()
    normalised = normalised / normalised.sum(-1, keepdim=True)
    assert torch.allclose(routing.stats.probability_sum_E, normalised.sum(0))
    entropy = torch.special.entr(normalised).sum(-1).mean()
    assert float(routing.stats.entropy) == pytest.approx(float(entropy.detach()))


def test_the_bias_is_saved_and_loaded(tmp_path, tokenizer):
    model = LanguageModel(model_config(["mamba", "moe-bias"], vocab_size=280)).eval()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data.normal_()
    save_model(tmp_path / "saved", model, tokenizer)
    loaded, _ = load(tmp_path / "saved")
    ours = dict(model.named_parameters())
    assert sum(not p.requires_grad for p in ours.values()) == 2
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, ours[name])
        assert parameter.requires_grad == ours[name].requires_grad
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


# Policy gradient


def test_the_policy_loss_has_the_score_function_gradient():
    router, x = built(PolicyGradientRouterConfig()).train(), tokens(60)
    torch.manual_seed(0)
    routing = router(x, None)
    stats = routing.stats
    assert isinstance(stats, DrawnStats)
    loss_T, counts_T = torch.rand(60).double(), torch.arange(60) % 5 > 0
    (gradient,) = torch.autograd.grad(stats.policy_loss(loss_T, counts_T), router.weight, retain_graph=True)
    # By hand: ∇ log softmax(Wx)_i = (onehot(i) − p) xᵀ, weighted by ℓ − mean ℓ, the baseline being 0 at the start.
    p = (x @ router.weight.detach().T).softmax(-1)
    onehot = torch.nn.functional.one_hot(routing.expert_index_TK[:, 0], 4).double()
    advantage = (loss_T - loss_T[counts_T].mean()) * counts_T
    expected = (advantage[:, None] * (onehot - p)).T @ x / counts_T.sum()
    assert torch.allclose(gradient, expected)


def test_the_policy_learns_which_expert_is_cheaper_and_the_baseline_which_token():
    router, x = built(PolicyGradientRouterConfig(), experts=3).train(), tokens(256)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    torch.manual_seed(0)
    dear = x[:, 0] > 0  # where that holds expert 2 is right, else expert 0; and those tokens cost 3 more
    for _ in range(150):
        routing = router(x, None)
        right = routing.expert_index_TK[:, 0] == torch.where(dear, 2, 0)
        loss_T = 1.0 - right.double() + 3.0 * dear
        optimizer.zero_grad()
        routing.stats.policy_loss(loss_T, torch.ones(256, dtype=torch.bool)).backward()
        optimizer.step()
    chosen = router.eval()(x, None).expert_index_TK[:, 0]
    assert float((chosen == torch.where(dear, 2, 0)).double().mean()) > 0.9
    expected = (x @ router.baseline.weight.T).squeeze(1)
    assert float((expected[dear].mean() - expected[~dear].mean()).detach()) < -1.5


def test_drawn_experts_count_in_full_and_statistics_can_be_added():
    router = built(PolicyGradientRouterConfig()).train()
    first, second = (router(tokens(20, seed=seed), None) for seed in (1, 2))
    assert first.expert_weight_TK.eq(1).all()
    total = first.stats.detach() + second.stats.detach()
    assert type(total) is RouterStats
    assert int(total.num_tokens) == 40
    assert type(router.eval()(tokens(5), None).stats) is RouterStats


# Expert choice


def by_brute_force(probability: torch.Tensor, segment: list[int], factor: float) -> set[tuple[int, int]]:
    experts, pairs = probability.shape[1], set()
    for own in {s for s in segment if s >= 0}:
        members = [t for t, s in enumerate(segment) if s == own]
        capacity = max(1, int(factor * len(members) / experts))
        for e in range(experts):
            best = sorted(members, key=lambda t, e=e: (-float(probability[t, e]), t))
            pairs |= {(e, t) for t in best[:capacity]}
    return pairs


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.integers(0, 3),
    st.integers(1, 5),
    st.floats(0.1, 5),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_each_expert_takes_the_best_of_each_segment(lengths, padding, experts, factor, seed):
    factor = min(factor, float(experts))
    segment = [-1] * padding + [i for i, length in enumerate(lengths) for _ in range(length)]
    probability = torch.rand(
        len(segment), experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    probability = (4 * probability).round() / 4  # many ties
    found = taken(probability, torch.tensor(segment), factor)
    pairs = {(e, int(t)) for e, row in enumerate(found) for t in row}
    assert pairs == by_brute_force(probability, segment, factor)
    assert found.numel() == len(pairs)


def test_expert_choice_is_even_and_counts_whom_nobody_took():
    routing = built(ExpertChoiceRouterConfig(capacity_factor=1.0))(tokens(40), None)
    stats = routing.stats
    assert stats.tokens_per_expert_E.tolist() == [10] * 4
    assert float(stats.largest_load) == 1.0
    assert int(stats.dropped) == 40 - len(set(routing.token_S.tolist())) > 0


def test_expert_choice_sums_what_the_experts_that_took_a_token_make_of_it():
    layer = build_layer("moe-expert-choice").eval()
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    p = (x[0] @ layer.router.weight.detach().T).softmax(-1)
    expected = torch.zeros_like(x[0])
    for e, t in by_brute_force(p, [0] * 9, 1.5):
        gate, up = (layer.w1_EFD[e] @ x[0, t]).chunk(2)
        hidden = torch.nn.functional.silu(gate) * up
        expected[t] += p[t, e] * (layer.w2_EDF[e] @ hidden)
    assert torch.allclose(layer(x, one_document(1)).y[0], expected)


# Soft MoE


def test_soft_moe_mixes_by_its_equations():
    layer = build_layer("moe-soft").eval()
    x = torch.randn(1, 7, 24, dtype=torch.float64)
    logits = x[0] @ layer.router.weight.T
    slots = logits.softmax(0).T @ x[0]
    outputs = []
    for s, slot in enumerate(slots):
        gate, up = (layer.w1_EFD[s // 2] @ slot).chunk(2)
        outputs.append(layer.w2_EDF[s // 2] @ (torch.nn.functional.silu(gate) * up))
    expected = logits.softmax(1) @ torch.stack(outputs)
    assert torch.allclose(layer(x, one_document(1)).y[0], expected)


def test_soft_moe_with_one_slot_reads_a_weighted_mean():
    routing = built(SoftRouterConfig(), experts=1)(tokens(6), None)
    assert routing.x_TD.shape == (1, 8)
    weights = (tokens(6) @ built(SoftRouterConfig(), experts=1).weight.T).softmax(0)
    assert torch.allclose(routing.x_TD[0], (weights * tokens(6)).sum(0))
    assert int(routing.token_S) == int(weights.argmax())


@pytest.mark.parametrize("name", sorted(NON_CAUSAL))
def test_a_batch_of_padding_alone_gives_zeros(name):
    layer = build_layer(name).eval()
    output = layer(torch.randn(1, 4, 24, dtype=torch.float64), documents(torch.full((1, 4), -1)))
    assert output.y.eq(0).all()
    assert int(output.router_stats[0].num_tokens) == 0


@pytest.mark.parametrize("name", sorted(NON_CAUSAL))
def test_gradients_of_a_packed_row_equal_those_of_its_documents(name):
    layer = build_layer(name).train()
    x = torch.randn(1, 11, 24, dtype=torch.float64)
    ids = torch.tensor([[-1, -1] + [0] * 4 + [1] * 5])
    layer(x, documents(ids)).y.sin().sum().backward()
    packed = {n: p.grad.clone() for n, p in layer.named_parameters()}
    layer.zero_grad()
    for start, end in itertools.pairwise((2, 6, 11)):
        layer(x[:, start:end], one_document(1)).y.sin().sum().backward()
    for n, p in layer.named_parameters():
        assert torch.allclose(p.grad, packed[n], rtol=1e-9, atol=1e-12), n


# Shared experts


def test_shared_experts_are_added_to_the_routed_ones():
    layer = build_layer("moe-shared").eval()
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    whole = layer(x, one_document(2)).y
    shared = layer.shared(x, one_document(2)).y
    layer.shared = None
    assert torch.allclose(whole, layer(x, one_document(2)).y + shared)


def test_shared_experts_cost_what_a_feed_forward_of_their_width_does():
    with_shared = validate(MoEConfig, LAYERS["moe-shared"], "x").cost(24)
    without = validate(MoEConfig, {**LAYERS["moe-shared"], "num_shared_experts": 0}, "x").cost(24)
    wide = MLPConfig(d_ff=40).cost(24)
    for field in ("parameters", "active_parameters", "flops_per_token", "activation_values"):
        assert getattr(with_shared, field) - getattr(without, field) == getattr(wide, field)


# Whole models


@pytest.mark.parametrize("layer", ["moe-shared", "moe-gumbel", "moe-bias", "moe-policy", "moe-temperature"])
def test_recurrent_decode_equals_the_forward_pass(layer):
    torch.manual_seed(0)
    model = LanguageModel(model_config(["mamba", layer])).double().eval()
    ids = torch.randint(0, 50, (2, 9))
    with torch.inference_mode():
        expected, state = model(ids).logits, model(ids[:, :5]).state
        for t in range(5, 9):
            logits = model.decode_(ids[:, t], state)
            assert torch.allclose(logits, expected[:, t], atol=1e-10)


@pytest.mark.parametrize("layer", ["moe-gumbel", "moe-policy", "moe-expert-choice", "moe-soft"])
def test_recomputation_draws_the_same_and_gives_the_same_gradients(layer):
    torch.manual_seed(0)
    model = LanguageModel(model_config(["mamba", layer])).double().train()
    ids = torch.randint(0, 50, (2, 9))
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(5)
        model.zero_grad()
        hidden, _, stats = model.hidden_states(ids, recompute=recompute)
        (hidden.sin().sum() + sum(s.load_balance_loss for s in stats)).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize(("layer", "why"), [("moe-expert-choice", "expert choice"), ("moe-soft", "Soft MoE")])
def test_a_model_that_looks_ahead_goes_on_from_a_state_only_when_told_to(layer, why, tokenizer):
    model = LanguageModel(model_config(["mamba", layer], vocab_size=280)).eval()
    assert not model.causal
    ids = torch.arange(6)[None]
    state = model(ids).state
    refusal = rf"not causal \(layers\.1\.{layer}: it routes by {why}.*allow_non_causal"
    with pytest.raises(ConfigError, match=refusal):
        model(ids, state=state)
    with pytest.raises(ConfigError, match=refusal):
        model.decode_(ids[:, 0], state)
    assert model(ids, state=state, allow_non_causal=True).logits.isfinite().all()
    assert model.decode_(ids[:, 0], state, allow_non_causal=True).isfinite().all()
    with pytest.raises(ConfigError, match=refusal):
        generate(model, tokenizer, ["a"])
    allowed = generate(model, tokenizer, ["a", "b c"], max_tokens=3, allow_non_causal=True)
    assert all(row.token_ids or row.finish_reason == "end_of_text" for row in allowed.result.completions)


# Configuration


@pytest.mark.parametrize("kind", ["gumbel", "bias_balanced", "policy_gradient", "expert_choice", "soft"])
def test_nan_raises(kind):
    layer = validate(MoEConfig, {**LAYERS["moe-switch"], "router": {"kind": kind}}, "x").build(24)
    layer.initialize(ModernInitialization(num_residual_steps=1))
    x = torch.randn(1, 5, 24)
    x[0, 3, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="router"):
        layer(x, one_document(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": {"kind": "gumble"}}, r"router\.kind = 'gumble'; did you mean gumbel\?"),
        ({"router": {"kind": "gumbel", "top_k": 9}}, "top_k=9 exceeds num_experts=4; lower top_k"),
        (
            {"router": {"kind": "gumbel", "temperature": 0.0}},
            r"router\.temperature = 0\.0: input should be gre",
        ),
        ({"router": {"top_k": 2, "temperatur": 1.0}}, r"router\.temperatur; did you mean temperature\?"),
        ({"router": {"top_k": 0}}, r"router\.top_k = 0: input should be greater"),
        ({"router": {"kind": "top_k", "top_k": "many"}}, r"router\.top_k = 'many': "),
        ({"router": {"kind": "bias_balanced", "score": "tanh"}}, r"router\.score = 'tanh': "),
        ({"router": {"kind": "soft", "slots_per_expert": 0}}, r"router\.slots_per_expert = 0: "),
        ({"router": {"kind": "soft", "top_k": 1}}, r"unknown key .*router\.top_k"),
        (
            {"router": {"kind": "expert_choice", "capacity_factor": 5.0}},
            r"router\.capacity_factor=5\.0 exceeds num_experts=4",
        ),
        (
            {"router": {"kind": "expert_choice"}, "capacity_factor": 1.0},
            r"capacity_factor=1\.0 has no meaning with router\.kind='expert_choice'",
        ),
        ({"router": {"kind": "soft"}, "capacity_factor": 2.0}, r"no meaning with router\.kind='soft'"),
        ({"num_shared_experts": -1}, r"num_shared_experts = -1: "),
    ],
)
def test_a_router_that_cannot_be_is_refused_in_one_line(changes, message):
    layers = {"moe": {**LAYERS["moe-switch"], **changes}}
    tables = {"vocab_size": 9, "d_model": 8, "num_blocks": 1, "pattern": ["moe"], "layers": layers}
    with pytest.raises(ConfigError, match=message) as refusal:
        validate(ModelConfig, tables, "mine.toml")
    assert "\n" not in str(refusal.value)


def test_a_router_without_a_kind_is_top_k():
    config = validate(MoEConfig, {**LAYERS["moe-switch"], "router": {"top_k": 2}}, "x")
    assert config.router == TopKRouterConfig(top_k=2)


@pytest.mark.parametrize("kind", ["expert_choice", "soft"])
def test_a_layer_whose_router_waits_for_the_device_is_named_before_a_capture(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("switchmamba.layers.feed_forward.moe.waits_for_device", lambda device, dtype: None)
    assert LanguageModel.from_preset("moe-mamba-tiny").why_not_capturable(torch.bfloat16) is None
    model = LanguageModel.from_preset("moe-mamba-tiny", layers__moe__router={"kind": kind})
    assert str(model.why_not_capturable(torch.bfloat16)).startswith("layers.1.moe: its router makes rows")


def test_experts_whose_kernels_do_not_serve_a_device_are_named_before_a_capture() -> None:
    reason = LanguageModel.from_preset("moe-mamba-tiny").why_not_capturable(torch.float32)
    assert reason is not None
    assert reason.startswith("layers.1.moe: ")
    assert LanguageModel.from_preset("mamba-tiny").why_not_capturable(torch.float32) is None
