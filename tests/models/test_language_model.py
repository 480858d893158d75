"""Laws of whole models, over every pattern of layers, in fp64."""

import pytest
import torch

from switchmamba import LanguageModel, presets
from switchmamba.config import validate
from switchmamba.errors import ConfigError
from switchmamba.layers.routing import Router
from switchmamba.models.config import ModelConfig
from switchmamba.models.state import ModelState
from tests.layers.contract import PATTERNS, example_model, model_config
from tests.layers.test_contract import relative

LENGTH = 13


@pytest.fixture(params=PATTERNS)
def model(request) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(example_model(request.param)).double().eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def test_no_future_token_changes_a_past_logit(model, tokens):
    assert model.causal and model.batch_invariant
    embedded = []
    model.embedding.register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    before = model(tokens).logits
    (gradient,) = torch.autograd.grad(before[:, :7].square().sum(), embedded[0])
    assert gradient[:, 7:].eq(0).all() and gradient[:, :7].ne(0).any()
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    assert relative(model(changed).logits[:, :7], before[:, :7]) < 1e-14


@pytest.mark.parametrize("cuts", [[1], [2, 3], [6], [1, 2, 3, 4, 5], [12], list(range(1, LENGTH))])
def test_any_split_into_chunks_equals_the_whole(model, tokens, cuts):
    whole, state, pieces = model(tokens), None, []
    for start, end in zip([0, *cuts], [*cuts, LENGTH], strict=True):
        out = model(tokens[:, start:end], state=state)
        state = out.state
        pieces.append(out.logits)
    assert relative(torch.cat(pieces, 1), whole.logits) < 1e-12
    for name, tensor in whole.state.tensors().items():
        assert relative(state.tensors()[name].double(), tensor.double()) < 1e-12, name


@pytest.mark.parametrize("cut", [2, 4, 5, 9])
def test_packed_documents_equal_separate_ones_across_any_chunk_boundary(model, tokens, cut):
    ids = torch.tensor([[0] * 4 + [1] * 9, [3] * 9 + [7] * 4])
    first = model(tokens[:, :cut], ids[:, :cut])
    second = model(tokens[:, cut:], ids[:, cut:], state=first.state)
    packed = torch.cat([first.logits, second.logits], 1)
    for row, boundary in ((0, 4), (1, 9)):
        for piece in (slice(0, boundary), slice(boundary, LENGTH)):
            alone = model(tokens[row : row + 1, piece]).logits
            assert relative(packed[row : row + 1, piece], alone) < 1e-12


def test_a_left_padded_row_equals_the_row_alone_and_decodes_on(model, tokens):
    ids = torch.tensor([[-1] * 5 + [0] * 8, [0] * 13])
    padded = model(tokens, ids)
    alone = model(tokens[:1, 5:])
    assert relative(padded.logits[:1, 5:], alone.logits) < 1e-12
    following = torch.tensor([[3], [4]])
    assert relative(model(following, state=padded.state).logits[:1],
                    model(following[:1], state=alone.state).logits) < 1e-12  # fmt: skip


def test_a_chunk_that_is_all_padding_leaves_no_trace(model, tokens):
    padding = model(tokens[:, :4], torch.full((2, 4), -1))
    after = model(tokens, torch.zeros_like(tokens), state=padding.state)
    assert relative(after.logits, model(tokens).logits) < 1e-12


def test_state_survives_select_stack_and_tensors(model, tokens):
    state = model(tokens[:, :6]).state
    rebuilt = model.state_from_tensors(state.tensors())
    flipped = ModelState.stack([rebuilt.select(torch.tensor([1])), rebuilt.select(torch.tensor([0]))])
    expected = model(tokens[:, 6:], state=state).logits
    assert relative(model(tokens[:, 6:].flip(0), state=flipped).logits, expected.flip(0)) < 1e-12


def test_state_from_incomplete_tensors_is_refused(model, tokens):
    tensors = model(tokens).state.tensors()
    tensors.pop(next(name for name in tensors if name.startswith("layers.")))
    with pytest.raises((KeyError, TypeError)):
        model.state_from_tensors(tensors)


def test_recompute_changes_neither_gradients_nor_routing(model, tokens):
    model.train()
    results = []
    for recompute in (False, True):
        model.zero_grad()
        hidden, _, stats = model.hidden_states(tokens, recompute=recompute)
        hidden.square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((gradients, [s.tokens_per_expert_E for s in stats]))
    assert len(results[0][0]) == len(results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_gradient_flows_through_the_state(model, tokens):
    first = model(tokens[:, :6])
    model(tokens[:, 6:], state=first.state).logits.square().sum().backward()
    gradient = model.embedding.weight.grad
    only_first = set(tokens[:, :6].flatten().tolist()) - set(tokens[:, 6:].flatten().tolist())
    assert only_first and all(gradient[i].norm() > 0 for i in only_first)


def test_router_stats_come_one_per_router_in_order(model, tokens):
    routers = [module for module in model.modules() if isinstance(module, Router)]
    seen = []
    for router in routers:
        router.register_forward_hook(lambda module, _inputs, _output: seen.append(module))
    assert len(model(tokens).router_stats) == len(routers)
    assert [id(router) for router in seen] == [id(router) for router in routers]


def test_tied_head_shares_the_embedding():
    model = LanguageModel(model_config(["mamba"], tie_embeddings=True))
    assert model.head.weight is model.embedding.weight


def test_routers_may_go_unobserved():
    model = LanguageModel.from_preset("moe-mamba-tiny").eval()
    tokens = torch.randint(0, model.config.vocab_size, (2, 9))
    observed, unobserved = model(tokens), model(tokens, observe_routers=False)
    assert torch.equal(observed.logits, unobserved.logits)
    assert observed.router_stats
    assert unobserved.router_stats == ()


def test_parallel_branches_share_one_norm():
    torch.manual_seed(0)
    model = LanguageModel(model_config([["mamba", "moe-switch"]], num_blocks=1)).double().eval()
    step = next(model.steps())
    tokens = torch.arange(5)[None]
    sequence, _ = model._begin(tokens, None, None)
    x = model.embedding(tokens)
    mamba, moe = (layer(step.norm(x), sequence).y for layer in step.branches())
    assert torch.allclose(model.hidden_states(tokens).hidden, model.final_norm(x + mamba + moe), atol=1e-12)


def test_parallel_branches_may_have_a_norm_each():
    torch.manual_seed(0)
    pattern = [["mamba", "moe-switch"]]
    model = LanguageModel(model_config(pattern, num_blocks=1, norm_per_branch=True)).double().eval()
    step = next(model.steps())
    for norm in step.branch_norms():
        torch.nn.init.normal_(norm.weight)
    tokens = torch.arange(5)[None]
    sequence, _ = model._begin(tokens, None, None)
    x = model.embedding(tokens)
    mamba, moe = (
        layer(norm(x), sequence).y for layer, norm in zip(step.branches(), step.norms.values(), strict=True)
    )
    assert torch.allclose(model.hidden_states(tokens).hidden, model.final_norm(x + mamba + moe), atol=1e-12)
    assert {name for name, _ in step.named_parameters() if "norm" in name} == {
        "norms.mamba.weight",
        "norms.moe-switch.weight",
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(3, dtype=torch.int64)), r"\(B, L\) int64"),
        (lambda m: m(torch.zeros(1, 0, dtype=torch.int64)), "L ≥ 1"),
        (lambda m: m(torch.zeros(1, 3)), "int64"),
        (lambda m: m(torch.full((1, 3), 50)), r"token id 50 is outside \[0, 50\)"),
        (lambda m: m(torch.full((1, 3), -2)), "token id -2"),
        (lambda m: m(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[1, 0, 0]])), "decrease"),
        (lambda m: m(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)), "shape"),
        (
            lambda m: m(
                torch.zeros(1, 3, dtype=torch.int64), state=m(torch.zeros(2, 3, dtype=torch.int64)).state
            ),
            "rows",
        ),
    ],
)
def test_wrong_input_is_refused_with_the_rule(call, message):
    model = LanguageModel(model_config(["mamba"]))
    with pytest.raises(ConfigError, match=message):
        call(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_modle": 4}, "unknown key d_modle; did you mean d_model?"),
        ({"pattern": ["mambo"]}, "did you mean mamba?"),
        ({"pattern": []}, "empty"),
        ({"layers": {"mamba": {"kind": "mamba", "d_stat": 3}}}, "did you mean d_state?"),
        ({"layers": {"mamba": {"kind": "mambo"}}}, "mambo"),
        ({"layers": {"mamba": {"kind": "mamba", "expand": "1/100"}}}, "larger expand"),
        ({"layers": {"mamba": {"kind": "mamba", "expand": 0}}}, "greater than 0"),
        ({"num_blocks": 0}, "num_blocks = 0"),
        ({"num_blocks": "2"}, "num_blocks = '2'"),
    ],
)
def test_wrong_configuration_names_field_value_and_rule(change, message):
    tables = presets["mamba-tiny"]["model"] | change
    with pytest.raises(ConfigError) as error:
        validate(ModelConfig, tables, source="somewhere.toml")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("somewhere.toml: ")


def test_what_is_no_state_is_refused_and_a_state_prints_in_a_line():
    model = LanguageModel.from_preset("mamba-tiny").eval()
    out = model(torch.zeros(2, 3, dtype=torch.int64))
    assert repr(out.state) == (
        f"ModelState(2 rows, {len(out.state.layers)} layers, {out.state.num_bytes:,} bytes, cpu)"
    )
    for wrong in (3, out):
        with pytest.raises(ConfigError, match=r"state must be the \.state of an earlier output, or None"):
            model(torch.zeros(2, 3, dtype=torch.int64), state=wrong)


def test_the_package_lists_what_it_offers():
    import switchmamba

    assert dir(switchmamba) == ["LanguageModel", "__version__", "load", "presets"]
