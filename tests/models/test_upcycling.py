"""Upcycling: what the new model computes at first, what learns from there, and what is refused."""

import random
from itertools import combinations

import pytest
import torch
from torch import Tensor

from switchmamba import LanguageModel
from switchmamba.errors import ConfigError
from switchmamba.layers.feed_forward.mlp import MLP
from switchmamba.layers.feed_forward.moe import MoE
from switchmamba.models.config import ModelConfig
from switchmamba.models.upcycling import plan, upcycle
from tests.layers.contract import D_MODEL, LAYERS, one_document
from tests.layers.test_contract import relative

WIDTH = 40
"""Of every dense feed-forward, and of the experts that may replace it."""

NAMED = LAYERS | {
    "moe": {"kind": "moe", "num_experts": 4, "d_expert": WIDTH},
    "moe-relu": {"kind": "moe", "num_experts": 4, "d_expert": WIDTH, "activation": "relu"},
    "moe-2": {"kind": "moe", "num_experts": 5, "d_expert": WIDTH, "router": {"kind": "top_k", "top_k": 2}},
    "moe-2-relu": {
        "kind": "moe",
        "num_experts": 5,
        "d_expert": WIDTH,
        "activation": "relu",
        "router": {"kind": "top_k", "top_k": 2},
    },
    "moe-sigmoid": {
        "kind": "moe",
        "num_experts": 8,
        "d_expert": WIDTH,
        "router": {"kind": "bias_balanced"},
    },
    "moe-gumbel-wide": {"kind": "moe", "num_experts": 8, "d_expert": WIDTH, "router": {"kind": "gumbel"}},
    "moe-drawn": {
        "kind": "moe",
        "num_experts": 4,
        "d_expert": WIDTH,
        "router": {"kind": "policy_gradient"},
    },
    "moe-wide": {"kind": "moe", "num_experts": 4, "d_expert": WIDTH, "num_shared_experts": 1},
    "moe-halves": {"kind": "moe", "num_experts": 4, "d_expert": WIDTH // 2, "num_shared_experts": 2},
    "moe-shared-wider": {"kind": "moe", "num_experts": 4, "d_expert": WIDTH, "num_shared_experts": 2},
    "moe-one": {"kind": "moe", "num_experts": 1, "d_expert": WIDTH},
    "moe-soft-wide": {"kind": "moe", "num_experts": 4, "d_expert": WIDTH, "router": {"kind": "soft"}},
}


def config(pattern: list, num_blocks: int = 2, **fields: object) -> ModelConfig:
    names = {name for entry in pattern for name in ([entry] if isinstance(entry, str) else entry)}
    tables = {
        "vocab_size": 50,
        "d_model": D_MODEL,
        "num_blocks": num_blocks,
        "pattern": pattern,
        "layers": {name: NAMED[name] for name in names},
    }
    return ModelConfig.model_validate(tables | fields)


def trained(pattern: list, num_blocks: int = 2, **fields: object) -> LanguageModel:
    """Return a model whose norms and feed-forwards are no longer those of the start, in ``eval()``, fp64."""
    torch.manual_seed(3)
    model = LanguageModel(config(pattern, num_blocks, **fields)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(1))


INSERTIONS = {
    "a moe behind every mamba": (["mamba"], 4, ["mamba", "moe"], 4),
    "a moe behind every second one": (["mamba"], 4, ["mamba", "mamba", "moe"], 2),
    "a moe before every mamba": (["mamba2"], 2, ["moe-2", "mamba2"], 2),
    "a moe beside every mamba": (["mamba"], 3, [["mamba", "moe"]], 3),
    "a moe that comes first beside it": (["mamba"], 3, [["moe", "mamba"]], 3),
    "shared experts too": (["mamba"], 2, ["mamba", "moe-wide"], 2),
    "any capacity": (["mamba"], 2, ["mamba", "moe-capacity"], 2),
    "one expert": (["mamba"], 2, ["mamba", "moe-one"], 2),
    "a router that looks ahead": (["mamba"], 2, ["mamba", "moe-soft"], 2),
    "beside a feed-forward that stays": (["attention", "mlp-relu"], 2, ["attention", "moe", "mlp-relu"], 2),
    "beside experts that stay": (["mamba", "moe-2"], 2, ["mamba", "moe-2", "moe"], 2),
}


@pytest.mark.parametrize(("old", "blocks", "new", "new_blocks"), INSERTIONS.values(), ids=INSERTIONS)
def test_new_moe_layers_change_no_bit_of_the_logits(old, blocks, new, new_blocks, tokens):
    source = trained(old, blocks)
    model = upcycle(source, config(new, new_blocks))
    assert torch.equal(model(tokens).logits, source(tokens).logits)
    assert torch.equal(model.train()(tokens).logits, source(tokens).logits)


@pytest.mark.parametrize(
    ("mlp", "moe"),
    [
        ("mlp-swiglu", "moe-2"),
        ("mlp-relu", "moe-2-relu"),
        ("mlp-swiglu", "moe-drawn"),
        ("mlp-swiglu", "moe-one"),
    ],
)
def test_copies_whose_weights_sum_to_1_compute_the_feed_forward(mlp, moe, tokens):
    source = trained(["mamba", mlp])
    model = upcycle(source, config(["mamba", moe]))
    assert relative(model(tokens).logits, source(tokens).logits) < 1e-13
    for new, old in layers(model, source):
        assert torch.equal(new.w1_EFD, old.up_proj.weight.expand_as(new.w1_EFD))
        assert torch.equal(new.w2_EDF, old.down_proj.weight.expand_as(new.w2_EDF))


@pytest.mark.parametrize("moe", ["moe", "moe-sigmoid", "moe-gumbel-wide"])
def test_copies_whose_weights_are_below_1_compute_the_feed_forward_in_the_mean(moe):
    source = trained(["mamba", "mlp-swiglu"])
    model = upcycle(source, config(["mamba", moe]))
    x = torch.randn(4, 500, D_MODEL, dtype=torch.float64)
    for (new, old), step in zip(layers(model, source), [1, 3], strict=True):
        assert torch.equal(new.w1_EFD, old.up_proj.weight.expand_as(new.w1_EFD))
        scale = new.w2_EDF / old.down_proj.weight
        assert scale.std() < 1e-12 and 1 < scale.mean() < new.w1_EFD.shape[0]
        normed = model.get_submodule(f"layers.{step}.norm")(x)
        y, dense = (layer(normed, one_document(4)).y.detach() for layer in (new, old))
        assert float((y * dense).sum() / dense.square().sum()) == pytest.approx(1, abs=0.02)
        assert relative(y, dense) < 0.35  # unscaled: 0.5 to 0.8


def layers(model: LanguageModel, source: LanguageModel) -> list[tuple[MoE, MLP]]:
    """Return each layer of experts with the feed-forward that it stands for."""
    pairs = zip(model.iterate_layers(), source.iterate_layers(), strict=True)
    return [(new, old) for new, old in pairs if isinstance(new, MoE) and isinstance(old, MLP)]


@pytest.mark.parametrize("moe", ["moe-wide", "moe-halves"])
def test_shared_experts_take_the_feed_forward_and_the_others_add_nothing(moe, tokens):
    source = trained(["attention", "mlp-swiglu"])
    model = upcycle(source, config(["attention", moe]))
    assert torch.equal(model(tokens).logits, source(tokens).logits)


def test_fresh_experts_forget_the_feed_forward(tokens):
    source = trained(["mamba", "mlp-relu"])
    model = upcycle(source, config(["mamba", "moe"]), experts="fresh")
    for layer in source.iterate_layers():
        if isinstance(layer, MLP):
            torch.nn.init.zeros_(layer.down_proj.weight)
    assert torch.equal(model(tokens).logits, source(tokens).logits)


def test_branches_side_by_side_keep_their_norm(tokens):
    source = trained([["mamba", "mlp-swiglu"]])
    model = upcycle(source, config([["mamba", "moe-2"]]))
    assert relative(model(tokens).logits, source(tokens).logits) < 1e-13


def test_norms_of_branches_go_with_them_and_one_of_all_serves_each(tokens):
    apart = {"norm_per_branch": True}
    for old, new in (({}, apart), (apart, apart)):
        source = trained([["mamba", "mlp-swiglu"]], **old)
        model = upcycle(source, config([["mamba", "mlp-swiglu", "moe"]], **new))
        assert torch.equal(model(tokens).logits, source(tokens).logits)
    with pytest.raises(ConfigError, match=r"model.norm_per_branch .True → False"):
        plan(config([["mamba", "mlp-relu"]], **apart), config([["mamba", "mlp-relu"]]))


@pytest.mark.parametrize("experts", ["copy", "fresh"])
def test_a_gradient_reaches_everything_from_the_second_step_on(experts):
    model = upcycle(trained(["mamba", "mlp-swiglu"]), config(["mamba", "moe", "moe-wide"]), experts).train()
    tokens = torch.randint(0, 50, (8, 40))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens).logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None]).mean().neg().backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still
    for layer in model.iterate_layers():
        if isinstance(layer, MoE):
            flat = layer.w2_EDF.flatten(1)
            assert torch.pdist(flat).min() > 0, "experts part"


def test_the_source_stays_and_the_target_is_like_a_new_one():
    source = trained(["mamba"], tie_embeddings=True)
    before = {name: p.clone() for name, p in source.named_parameters()}
    model = upcycle(source, config(["mamba", "moe"], tie_embeddings=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(p, before[name]) for name, p in source.named_parameters())
    assert model.head.weight is model.embedding.weight
    new = LanguageModel(model.config)
    for (name, ours), (other, theirs) in zip(model.named_parameters(), new.named_parameters(), strict=True):
        assert name == other and ours.shape == theirs.shape and ours.requires_grad == theirs.requires_grad
        assert vars(ours) == vars(theirs), name


def test_fresh_weights_follow_the_seed(tokens):
    source = trained(["mamba", "mlp-relu"])

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return upcycle(source, config(["mamba", "moe-relu"]))(tokens).logits

    assert torch.equal(logits(1), logits(1)) and not torch.equal(logits(1), logits(2))


REFUSED = {
    "fewer mixers": (["mamba"], 4, ["mamba", "moe"], 2, {}, "the source's layers.2.mamba has no place left"),
    "more mixers": (["mamba"], 2, ["mamba", "moe"], 3, {}, "layers.4.mamba comes after the last layer"),
    "another mixer": (["mamba"], 2, ["attention", "moe"], 2, {}, "layers.0.attention meets layers.0.mamba"),
    "another state": (["mamba"], 2, ["mamba-one-tap", "moe"], 2, {}, r"expand \(.*d_conv \(4 → 1\)"),
    "another width": (["mamba", "mlp-relu"], 2, ["mamba", "moe-switch"], 2, {}, "d_expert = 20, the mlp .* d_ff = 40"),
    "another activation": (["mamba", "mlp-relu"], 2, ["mamba", "moe"], 2, {}, "activation = 'swiglu', .* 'relu'"),
    "shared of another width": (
        ["mamba", "mlp-swiglu"], 2, ["mamba", "moe-shared-wider"], 2, {}, "num_shared_experts · d_expert = 80, .* 40",
    ),
    "experts made dense": (["mamba", "moe-relu"], 2, ["mamba", "mlp-relu"], 2, {}, "layers.1.mlp-relu meets layers.1"),
    "more experts": (["mamba", "moe-relu"], 2, ["mamba", "moe-2-relu"], 2, {}, r"num_experts \(4 → 5\)"),
    "mixtures of tokens": (["mamba", "mlp-swiglu"], 2, ["mamba", "moe-soft-wide"], 2, {}, "do not read each token"),
    "one step made two": (["mamba", "mlp-swiglu"], 2, [["mamba", "moe"]], 2, {}, "mamba . moe meets layers.1.mlp"),
    "other norms": (["mamba"], 2, ["mamba", "moe"], 2, {"norm": "layernorm"}, "model.norm .'rmsnorm' → 'layernorm'"),
    "no final norm": (["mamba"], 2, ["mamba", "moe"], 2, {"final_norm": False}, "model.final_norm"),
    "other words": (["mamba"], 2, ["mamba", "moe"], 2, {"vocab_size": 60}, r"model.vocab_size \(50 → 60\)"),
    "a tied head": (["mamba"], 2, ["mamba", "moe"], 2, {"tie_embeddings": True}, "model.tie_embeddings"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("old", "blocks", "new", "new_blocks", "fields", "message"), REFUSED.values(), ids=REFUSED
)
def test_what_has_no_counterpart_is_refused_by_name(old, blocks, new, new_blocks, fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        plan(config(old, blocks), config(new, new_blocks, **fields))
    if not fields:
        for pattern in (old, new):
            assert "".join(pattern[0]) in str(error.value).replace(" + ", "")


def test_an_unknown_way_to_begin_is_refused():
    with pytest.raises(ConfigError, match="experts = 'copies' is neither"):
        plan(config(["mamba"]), config(["mamba", "moe"]), experts="copies")


def test_experts_of_any_width_may_forget_a_feed_forward():
    origins = plan(config(["mamba", "mlp-relu"]), config(["mamba", "moe-switch"]), experts="fresh")
    assert [origin.step for origin in origins] == [0, 1, 2, 3]


def test_a_plan_is_found_whenever_there_is_one():
    """Against all ways to choose which steps of the target are new."""
    draw = random.Random(0)
    letters = {"a": "mamba", "b": "attention", "m": "mlp-swiglu", "e": "moe"}
    becomes = {("a", "a"), ("b", "b"), ("m", "m"), ("m", "e"), ("e", "e")}
    found = 0
    for _ in range(300):
        old = draw.choices("abmme", k=draw.randint(1, 4))
        new = [letter for o in old for letter in [*"ee"[: draw.randint(0, 2)], "e" if o == "m" else o]]
        new[draw.randrange(len(new))] = draw.choice("abme")
        ways = [
            kept
            for kept in combinations(range(len(new)), len(old))
            if all((o, new[j]) in becomes for o, j in zip(old, kept, strict=True))
            and all(letter == "e" for j, letter in enumerate(new) if j not in kept)
        ]
        source, target = (config([letters[letter] for letter in word], 1) for word in (old, new))
        try:
            steps = [origin.step for origin in plan(source, target)]
        except ConfigError:
            steps = None
        expected = min(ways, default=None)  # the earliest
        kept = None if steps is None else tuple(j for j, step in enumerate(steps) if step is not None)
        assert kept == expected, (old, new)
        assert steps is None or [step for step in steps if step is not None] == list(range(len(old)))
        found += expected is not None
    assert 50 < found < 250


def test_the_models_share_no_memory():
    source = trained(["mamba", "mlp-relu"])
    model = upcycle(source, config(["mamba", "moe-relu"]))
    own = {p.data_ptr() for p in source.parameters()}
    assert not own & {p.data_ptr() for p in model.parameters()}
