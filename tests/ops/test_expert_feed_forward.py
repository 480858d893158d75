import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from switchmamba.errors import ConfigError
from switchmamba.ops import expert_feed_forward
from switchmamba.ops.expert_feed_forward.activations import ACTIVATIONS, activate
from tests.ops.agreement import assert_as_accurate_as_the_reference, distance, results

BACKENDS = ["eager", "reference"]


def example(
    tokens: int,
    experts: int,
    choices: int = 1,
    d_model: int = 6,
    d_expert: int = 10,
    activation: str = "relu",
    index: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    d_out: int | None = None,
) -> dict:
    """Random inputs; every ninth or so assignment is dropped unless ``index`` says who goes where."""
    generator = torch.Generator().manual_seed(tokens + experts)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if index is None:
        index = torch.randint(0, experts + 1, (tokens, choices), generator=generator)
    return {
        "x": random(tokens, d_model),
        "expert_index": index,
        "expert_weight": random(*index.shape),
        "w1": random(experts, 2 * d_expert if activation == "swiglu" else d_expert, d_model) / d_model**0.5,
        "w2": random(experts, d_out or d_model, d_expert) / d_expert**0.5,
        "activation": activation,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [3, 40])
def test_each_token_gets_the_weighted_sum_of_its_experts(backend, tokens):
    e = example(tokens, experts=3, choices=2, activation="swiglu")
    found = expert_feed_forward(**e, backend=backend)
    for token in range(tokens):
        expected = torch.zeros(6, dtype=torch.float64)
        for expert, weight in zip(e["expert_index"][token], e["expert_weight"][token], strict=True):
            if expert < 3:
                expected += weight * (e["w2"][expert] @ activate(e["w1"][expert] @ e["x"][token], "swiglu"))
        torch.testing.assert_close(found[token], expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "experts", "choices"), [(1, 4, 1), (63, 5, 3), (1000, 7, 2), (200, 256, 1)]
)
def test_eager_outputs_and_gradients_are_as_accurate_as_the_reference(
    activation, dtype, tokens, experts, choices
):
    e = example(tokens, experts, choices, activation=activation)
    assert_as_accurate_as_the_reference(expert_feed_forward, e, "eager", dtype)


@pytest.mark.parametrize(
    ("tokens", "d_in", "d_expert", "d_out", "choices", "activation"),
    [
        (200, 512, 352, 1024, 1, "relu"),  # inner MoE at d_model 512: into d_inner,
        (200, 1024, 352, 512, 1, "relu"),  # and out of it
        (63, 7, 5, 13, 2, "swiglu"),
        (40, 13, 9, 1, 3, "gelu"),
        (1, 3, 4, 11, 1, "silu"),
    ],
)
def test_the_output_may_have_a_width_of_its_own(tokens, d_in, d_expert, d_out, choices, activation):
    e = example(tokens, 5, choices, d_in, d_expert, activation, d_out=d_out)
    found, truth = (results(expert_feed_forward, e, torch.float64, backend) for backend in BACKENDS)
    assert found["output 0"].shape == (tokens, d_out)
    for name in truth:
        assert distance(found[name], truth[name]) < 1e-12, name
    assert_as_accurate_as_the_reference(expert_feed_forward, e, "eager", torch.bfloat16)
    few = {name: e[name][:2] for name in ("x", "expert_index", "expert_weight")}
    with torch.no_grad():  # without sorting
        torch.testing.assert_close(expert_feed_forward(**(e | few)), truth["output 0"][:2])


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize(
    "index",
    [
        pytest.param(torch.full((50, 2), 3), id="all to one"),
        pytest.param(torch.full((50, 2), 5), id="all dropped"),
        pytest.param(torch.tensor([[0, 4]] * 49 + [[5, 4]]), id="first, last and dropped"),
        pytest.param(torch.zeros(0, 2, dtype=torch.int64), id="no tokens"),
    ],
)
def test_lopsided_routing_equals_the_reference(index, activation):
    e = example(index.shape[0], experts=5, index=index, activation=activation)
    found, truth = (results(expert_feed_forward, e, torch.float64, backend) for backend in BACKENDS)
    for name in truth:
        assert distance(found[name], truth[name]) < 1e-12, name
    idle = sorted(set(range(5)) - set(index.flatten().tolist()))
    assert found["gradient of w1"][idle].count_nonzero() == 0
    assert found["gradient of w2"][idle].count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [4, 30])
def test_a_dropped_assignment_contributes_exactly_zero_whatever_it_holds(backend, tokens):
    e = example(tokens, experts=3, choices=2)
    e["expert_index"][0] = 3
    e["expert_index"][1] = torch.tensor([3, 1])
    clean = expert_feed_forward(**e, backend=backend)
    e["x"][0] = torch.nan
    e["expert_weight"][0] = torch.inf
    e["expert_weight"][1, 0] = torch.nan
    inputs = {
        n: v.requires_grad_() if v.is_floating_point() else v for n, v in e.items() if n != "activation"
    }
    y = expert_feed_forward(**inputs, backend=backend)
    assert y[0].tolist() == [0.0] * 6
    assert distance(y.detach()[1:], clean[1:]) < 1e-14
    y.sum().backward()
    assert e["x"].grad[0].count_nonzero() == 0
    assert e["expert_weight"].grad[0].count_nonzero() == 0
    assert e["expert_weight"].grad[1, 0] == 0
    assert all(inputs[name].grad.isfinite().all() for name in ("x", "expert_weight", "w1", "w2"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(backend, activation):
    e = example(9, experts=3, choices=2, d_model=3, d_expert=4, activation=activation, d_out=5)
    index = e.pop("expert_index")
    e.pop("activation")
    inputs = tuple(value.requires_grad_() for value in e.values())

    def run(x, expert_weight, w1, w2):
        return expert_feed_forward(x, index, expert_weight, w1, w2, activation, backend)

    assert torch.autograd.gradcheck(run, inputs)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_few_tokens_without_gradients_equal_the_sorted_path(tokens, experts, choices, swiglu):
    e = example(tokens, experts, choices, activation="swiglu" if swiglu else "silu")
    with torch.no_grad():
        few = expert_feed_forward(**e)
    e["x"].requires_grad_()
    torch.testing.assert_close(few, expert_feed_forward(**e).detach())


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(11)))
def test_permuting_tokens_permutes_outputs(order):
    e = example(11, experts=3, choices=2)
    permuted = {n: e[n][order] for n in ("x", "expert_index", "expert_weight")}
    torch.testing.assert_close(expert_feed_forward(**(e | permuted)), expert_feed_forward(**e)[order])


def test_non_contiguous_inputs_give_the_same_numbers():
    e = example(40, experts=4, choices=2)
    scattered = {
        "x": e["x"].t().contiguous().t(),
        "expert_index": e["expert_index"].t().contiguous().t(),
        "expert_weight": e["expert_weight"].repeat_interleave(2, dim=1)[:, ::2],
        "w1": e["w1"].transpose(1, 2).contiguous().transpose(1, 2),
        "w2": e["w2"].transpose(0, 2).contiguous().transpose(0, 2),
    }
    found, truth = (
        results(expert_feed_forward, e | change, torch.float64, "eager") for change in (scattered, {})
    )
    for name in truth:
        assert distance(found[name], truth[name]) < 1e-13, name


def test_the_same_inputs_give_the_same_bits():
    e = example(500, experts=8, choices=2, d_model=32, d_expert=48, activation="swiglu")
    first, second = (results(expert_feed_forward, e, torch.float32, "eager") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [3, 20])
def test_nan_reaches_its_own_token_only_and_huge_values_stay_finite(backend, tokens):
    e = example(
        tokens, experts=3, dtype=torch.float32, activation="swiglu", index=torch.arange(tokens)[:, None] % 3
    )
    e["x"][0, 2] = torch.nan
    e["x"][1] *= 1e10
    y = expert_feed_forward(**e, backend=backend)
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [2, 50])
def test_autocast_multiplies_in_bf16_and_keeps_fp32_inputs_outputs_and_gradients(backend, tokens):
    e = example(
        tokens, experts=4, choices=2, d_model=32, d_expert=48, dtype=torch.float32, activation="swiglu"
    )
    exact = results(expert_feed_forward, e, torch.float64, "reference")
    inputs = {n: v.requires_grad_() if n in ("x", "expert_weight", "w1", "w2") else v for n, v in e.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = expert_feed_forward(**inputs, backend=backend)
        with torch.no_grad():
            assert distance(expert_feed_forward(**inputs, backend=backend), exact["output 0"]) < 1e-2
    assert y.dtype == torch.float32
    assert 1e-4 < distance(y.detach(), exact["output 0"]) < 1e-2
    generator = torch.Generator().manual_seed(0)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).float())
    for name in ("x", "expert_weight", "w1", "w2"):
        assert inputs[name].grad.dtype == torch.float32
        assert distance(inputs[name].grad, exact[f"gradient of {name}"]) < 2e-2, name


def test_activation_recompute_gives_the_same_gradients():
    e = example(30, experts=4, choices=2)
    inputs = [e[name].requires_grad_() for name in ("x", "expert_weight", "w1", "w2")]

    def run(x, expert_weight, w1, w2):
        return expert_feed_forward(x, e["expert_index"], expert_weight, w1, w2)

    plain = torch.autograd.grad(run(*inputs).square().sum(), inputs)
    recomputed = torch.autograd.grad(checkpoint(run, *inputs, use_reentrant=False).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("trained", ["x", "expert_weight", "w1", "w2"])
def test_gradients_are_right_when_only_one_input_is_trained(trained):
    e = example(30, experts=4, choices=2)
    everything = results(expert_feed_forward, e, torch.float64, "eager")[f"gradient of {trained}"]
    e[trained].requires_grad_()
    y = expert_feed_forward(**e)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert torch.equal(e[trained].grad, everything)


def test_training_keeps_the_hidden_layer_and_no_sorted_copies():
    e = example(1000, experts=4, d_model=32, d_expert=48, dtype=torch.float32, activation="swiglu")
    inputs = [e[name].requires_grad_() for name in ("x", "expert_weight", "w1", "w2")]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        expert_feed_forward(inputs[0], e["expert_index"], *inputs[1:], "swiglu")
    inputs_bytes = sum(tensor.untyped_storage().nbytes() for tensor in inputs)
    assert sum(kept.values()) - inputs_bytes == 1000 * (2 * 48 * 4 + 3 * 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5)}, r"x has shape \(5,\); it must be \(T, D\)"),
        ({"x": torch.zeros(5, 6, dtype=torch.int64)}, "x has dtype torch.int64; it must be floating point"),
        (
            {"expert_index": torch.zeros(5, 1)},
            "expert_index has dtype torch.float32; it must be an integer type",
        ),
        ({"expert_index": torch.zeros(4, 1, dtype=torch.int64)}, r"it must be \(T, K\) = \(5, 1\)"),
        ({"expert_index": torch.zeros(5, 0, dtype=torch.int64)}, r"it must be \(T, K\) = \(5, 1\)"),
        (
            {"expert_index": torch.full((5, 1), 4)},
            "expert_index spans 4 … 4; it must lie in 0 … 3, and 3 drops",
        ),
        ({"expert_index": torch.full((5, 1), -1)}, "expert_index spans -1 … -1"),
        (
            {"expert_weight": torch.zeros(5, 2)},
            r"expert_weight has shape \(5, 2\); it must be \(T, K\) = \(5, 1\)",
        ),
        ({"w1": torch.zeros(3, 20, 6)}, r"w1 has shape \(3, 20, 6\); it must be \(E, F, D\) = \(3, 10, 6\)"),
        ({"w2": torch.zeros(3, 6)}, r"w2 has shape \(3, 6\); it must be \(E, O, F\)"),
        ({"activation": "swiglu"}, r"it must be \(E, 2F, D\) = \(3, 20, 6\)"),
        ({"activation": "tanh"}, "activation='tanh' does not exist; choose relu, gelu, silu, swiglu"),
        (
            {"w1": torch.zeros(3, 10, 6, dtype=torch.bfloat16)},
            "give them one dtype, or use torch.autocast",
        ),
        ({"backend": "cuda"}, "backend='cuda' does not exist; choose auto, triton, eager, reference"),
        (
            {"backend": "triton"},
            "backend='triton' cannot run here: it needs a CUDA device, the inputs are on cpu",
        ),
    ],
)
def test_errors_name_value_and_rule(change, message):
    with pytest.raises(ConfigError, match=message):
        expert_feed_forward(**(example(5, experts=3, dtype=torch.float32) | change))
