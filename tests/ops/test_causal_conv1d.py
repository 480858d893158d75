import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from switchmamba.errors import ConfigError
from switchmamba.ops import causal_conv1d, causal_conv1d_step, causal_conv1d_twice
from tests.ops.agreement import assert_as_accurate_as_the_reference, distance

BACKENDS = ["cpu", "reference"]


def example(
    batch: int, length: int, channels: int, width: int = 4, seed: int = 0, dtype=torch.float64
) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": random(batch, length, channels),
        "weight": random(channels, width),
        "bias": random(channels),
        "initial_state": random(batch, width - 1, channels),
    }


def documents(*lengths: int) -> Tensor:
    """One row of document ids, with documents of these lengths."""
    return torch.repeat_interleave(torch.arange(len(lengths)) * 3, torch.tensor(lengths))[None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 2, 4, 5])
def test_equals_torchs_convolution(backend, width):
    e = example(3, 17, 6, width)
    history = torch.cat([e["initial_state"], e["x"]], dim=1).transpose(1, 2)
    expected = F.silu(F.conv1d(history, e["weight"][:, None], e["bias"], groups=6)).transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(**e, activation="silu", backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 7), (3, 63, 33), (2, 1000, 65)])
@pytest.mark.parametrize("with_documents", [False, True])
def test_cpu_outputs_state_and_gradients_are_as_accurate_as_the_reference(shape, dtype, with_documents):
    e = example(*shape) | {"activation": "silu", "return_final_state": True}
    if with_documents:
        changes = torch.rand(shape[:2], generator=torch.Generator().manual_seed(1)) < 0.2
        e["document_ids"] = changes.cumsum(1)
    assert_as_accurate_as_the_reference(causal_conv1d, e, "cpu", dtype)


def test_cpu_is_accurate_on_shapes_that_are_cut_into_pieces():
    e = example(2, 300, 700) | {"activation": "silu"}
    assert_as_accurate_as_the_reference(causal_conv1d, e, "cpu")
    assert_as_accurate_as_the_reference(causal_conv1d, example(1, 700, 200), "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck_of_all_inputs_through_output_and_final_state(backend, activation):
    e = {name: value.requires_grad_() for name, value in example(2, 5, 3).items()}
    ids = torch.tensor([[0, 0, 0, 0, 1], [4, 4, 5, 5, 5]])

    def run(x, weight, bias, initial_state):
        return causal_conv1d(
            x, weight, bias, activation, initial_state, ids, return_final_state=True, backend=backend
        )

    assert torch.autograd.gradcheck(run, tuple(e.values()))
    assert torch.autograd.gradcheck(lambda x, w: causal_conv1d(x, w, backend=backend), (e["x"], e["weight"]))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 5))
def test_pieces_of_any_length_equal_the_whole(backend, lengths, width):
    e = example(2, sum(lengths), 3, width)
    whole, final = causal_conv1d(**e, activation="silu", return_final_state=True, backend=backend)
    state, outputs = e["initial_state"], []
    for piece in e["x"].split(lengths, dim=1):
        y, state = causal_conv1d(
            piece, e["weight"], e["bias"], "silu", state, return_final_state=True, backend=backend
        )
        outputs.append(y)
    assert distance(torch.cat(outputs, dim=1), whole) < 1e-14
    assert torch.equal(state, final)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from([None, "silu"]))
def test_step_by_step_equals_the_whole(length, width, activation):
    e = example(2, length, 3, width)
    whole, final = causal_conv1d(**e, activation=activation, return_final_state=True)
    state = e["initial_state"]
    for t in range(length):
        before = state.clone()
        y, new_state = causal_conv1d_step(state, e["x"][:, t], e["weight"], e["bias"], activation)
        assert torch.equal(state, before)
        assert distance(y, whole[:, t]) < 1e-14
        state = new_state
    assert torch.equal(state, final)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_that_goes_two_ways_has_the_sum_of_both_gradients(backend):
    e = example(2, 9, 3)
    once = {name: tensor.clone().requires_grad_() for name, tensor in e.items()}
    split = {name: tensor.clone().requires_grad_() for name, tensor in e.items()}
    y, state = causal_conv1d(**once, activation="silu", return_final_state=True, backend=backend)
    one, other, same_state = causal_conv1d_twice(**split, activation="silu", backend=backend)
    assert torch.equal(one, y) and torch.equal(other, y) and torch.equal(same_state, state)
    dy, more = torch.randn_like(y), torch.randn_like(y)
    torch.autograd.backward([y], [dy + more])
    torch.autograd.backward([one, other], [dy, more])
    for name in e:
        assert distance(split[name].grad, once[name].grad) < 1e-14, name


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_packed_documents_equal_separate_ones(backend, lengths):
    e = example(1, sum(lengths), 3)
    x, state = e.pop("x"), e.pop("initial_state")
    packed, final = causal_conv1d(
        x,
        **e,
        initial_state=state,
        document_ids=documents(*lengths),
        return_final_state=True,
        backend=backend,
    )
    for number, document in enumerate(x.split(lengths, dim=1)):
        first_state = state if number == 0 else torch.zeros_like(state)
        alone, alone_final = causal_conv1d(
            document, **e, initial_state=first_state, return_final_state=True, backend=backend
        )
        assert torch.equal(packed.split(lengths, dim=1)[number], alone)
    assert torch.equal(final, alone_final)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_reaches_another_document_or_the_future(backend):
    e = {name: value.requires_grad_() for name, value in example(1, 9, 3).items()}
    y, _ = causal_conv1d(**e, document_ids=documents(4, 5), return_final_state=True, backend=backend)
    y[:, 4:7].sum().backward(retain_graph=True)
    assert e["x"].grad[:, :4].count_nonzero() == 0
    assert e["x"].grad[:, 7:].count_nonzero() == 0
    assert e["x"].grad[:, 4:7].count_nonzero() == 9
    assert e["initial_state"].grad.count_nonzero() == 0
    y[:, :4].sum().backward()
    assert e["initial_state"].grad.count_nonzero() == 9


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_documents_nan_does_not_leak_and_ones_own_propagates(backend):
    e = example(1, 8, 3)
    e["initial_state"][:] = torch.nan
    e["x"][0, 3] = torch.nan
    y, final = causal_conv1d(
        **e, activation="silu", document_ids=documents(2, 3, 3), return_final_state=True, backend=backend
    )
    assert y[0, :, 0].isnan().tolist() == [True, True, False, True, True, False, False, False]
    assert final.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_inputs_saturate_like_the_reference(dtype):
    x = (
        torch.tensor([-1e30, -200.0, -80.0, 0.0, 80.0, 200.0, 1e30], dtype=dtype)
        .view(1, 7, 1)
        .requires_grad_()
    )
    weight = torch.ones(1, 1, dtype=dtype)
    found, expected = (causal_conv1d(x, weight, activation="silu", backend=name) for name in BACKENDS)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * 1e30 * 1e-30)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-5)


def test_a_slice_of_a_wider_tensor_and_any_other_strides_give_the_same_numbers():
    e = example(3, 20, 8, dtype=torch.float32)
    wide = torch.randn(3, 20, 24)
    wide[..., 8:16] = e["x"]
    views = [wide[..., 8:16], e["x"].transpose(1, 2).contiguous().transpose(1, 2), e["x"].flip(1).flip(1)]
    views.append(e["x"].transpose(0, 1).contiguous().transpose(0, 1))
    expected = causal_conv1d(**e, backend="cpu")
    for view in views:
        assert torch.equal(causal_conv1d(**e | {"x": view}, backend="cpu"), expected)
    row = e["x"][:1]
    expanded = causal_conv1d(**e | {"x": row.expand(3, -1, -1)}, backend="cpu")
    assert torch.equal(expanded, causal_conv1d(**e | {"x": row.repeat(3, 1, 1)}, backend="cpu"))


def test_bits_do_not_depend_on_the_number_of_threads():
    e = {name: value.requires_grad_() for name, value in example(2, 300, 640, dtype=torch.float32).items()}
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            y = causal_conv1d(**e, activation="silu", backend="cpu")
            found.append((y, *torch.autograd.grad(y.square().sum(), tuple(e.values()))))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_final_state_does_not_keep_the_inputs_alive():
    e = example(1, 500, 4)
    _, final = causal_conv1d(**e, return_final_state=True)
    assert final.untyped_storage().nbytes() == 3 * 4 * 8


@pytest.mark.parametrize("batch", [0, 3])
def test_an_empty_batch_is_no_error(batch):
    e = example(batch, 4, 5)
    y, final = causal_conv1d(**e, return_final_state=True)
    assert (y.shape, final.shape) == ((batch, 4, 5), (batch, 3, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 3)}, r"x has shape \(4, 3\); it must be \(B, L, I\)"),
        ({"x": torch.zeros(2, 0, 3)}, "pass at least one time step"),
        (
            {"x": torch.zeros(2, 4, 3, dtype=torch.int64)},
            "x has dtype torch.int64; it must be floating point",
        ),
        ({"weight": torch.zeros(2, 4)}, r"weight has shape \(2, 4\); it must be \(I, W\) = \(3, 4\)"),
        ({"weight": torch.zeros(3, 0)}, r"weight has shape \(3, 0\); it must be \(I, W\) = \(3, 1\)"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\); it must be \(I,\) = \(3,\)"),
        (
            {"initial_state": torch.zeros(2, 4, 3)},
            r"initial_state has shape \(2, 4, 3\); it must be \(B, W-1, I\) = \(2, 3, 3\)",
        ),
        ({"document_ids": torch.zeros(4, dtype=torch.int64)}, r"must be \(B, L\) = \(2, 4\)"),
        (
            {"document_ids": torch.zeros(2, 4)},
            "document_ids has dtype torch.float32; it must be an integer type",
        ),
        ({"activation": "relu"}, "activation='relu' does not exist; choose None or 'silu'"),
        ({"backend": "cuda"}, "backend='cuda' does not exist; choose auto, triton, cpu, reference"),
    ],
)
def test_errors_name_value_and_rule(change, message):
    with pytest.raises(ConfigError, match=message):
        causal_conv1d(**(example(2, 4, 3) | change))


def test_the_steps_errors_name_value_and_rule():
    e = example(2, 4, 3)
    with pytest.raises(
        ConfigError, match=r"step: state has shape \(2, 2, 3\); it must be \(B, W-1, I\) = \(2, 3, 3\)"
    ):
        causal_conv1d_step(e["x"][:, :2], e["x"][:, 0], e["weight"])
    with pytest.raises(ConfigError, match=r"step: x has shape \(2, 4, 3\); it must be \(B, I\)"):
        causal_conv1d_step(e["initial_state"], e["x"], e["weight"])


def test_an_explicit_backend_refuses_what_it_cannot_serve():
    e = {name: value.to("meta") for name, value in example(2, 4, 3).items()}
    with pytest.raises(
        ConfigError, match="backend='cpu' cannot run here: it serves the CPU, the inputs are on meta"
    ):
        causal_conv1d(**e, backend="cpu")
    assert causal_conv1d(**e).shape == (2, 4, 3)
