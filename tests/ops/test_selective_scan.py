"""Laws of the selective scan and its step, for every backend that runs on a CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from switchmamba.errors import ConfigError
from switchmamba.ops import selective_scan, selective_step
from switchmamba.ops.selective_scan import SELECTIVE_SCAN, SELECTIVE_STEP
from tests.ops.agreement import assert_as_accurate_as_the_reference, distance, results

BACKENDS = ["cpu", "reference"]


def example(
    batch: int, length: int, channels: int, states: int, groups: int = 1, seed: int = 0, dtype=torch.float64
) -> dict:
    """Every argument, with decays as a trained model has them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": random(batch, length, channels),
        "dt": random(batch, length, channels) - 2,
        "A": -torch.exp(random(channels, states)),
        "B": random(batch, length, groups, states),
        "C": random(batch, length, groups, states),
        "D": random(channels),
        "z": random(batch, length, channels),
        "dt_bias": random(channels) / 4,
        "dt_softplus": True,
        "initial_state": random(batch, channels, states),
    }


def random_documents(batch: int, length: int, seed: int = 1) -> Tensor:
    changes = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.1
    return changes.cumsum(1)


def along_time(example: dict, part: slice) -> dict:
    """The arguments with x, dt, B, C, z cut to a part of the time axis."""
    return example | {name: example[name][:, part] for name in ("x", "dt", "B", "C", "z")}


def at_step(example: dict, t: int) -> dict:
    """The arguments of ``selective_step`` at time t."""
    rest = {name: value for name, value in example.items() if name != "initial_state"}
    return rest | {name: example[name][:, t] for name in ("x", "dt", "B", "C", "z")}


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_unrolled_recurrence(backend):
    e = example(2, 7, 3, 4)
    delta_BLI = F.softplus(e["dt"] + e["dt_bias"])
    elapsed_BLI = delta_BLI.cumsum(1)
    y = torch.zeros_like(e["x"])
    for t in range(7):
        state = torch.exp(elapsed_BLI[:, t, :, None] * e["A"]) * e["initial_state"]
        for s in range(t + 1):
            decay_BIN = torch.exp((elapsed_BLI[:, t] - elapsed_BLI[:, s])[..., None] * e["A"])
            state = state + decay_BIN * (delta_BLI * e["x"])[:, s, :, None] * e["B"][:, s]
        y[:, t] = ((state * e["C"][:, t]).sum(-1) + e["D"] * e["x"][:, t]) * F.silu(e["z"][:, t])
    found, final_state = selective_scan(**e, return_final_state=True, backend=backend)
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(final_state, state)


SHAPES = [  # batch, length, channels, states, groups
    (1, 1, 1, 1, 1),
    (2, 2, 3, 8, 1),
    (2, 63, 48, 16, 2),
    (3, 64, 16, 17, 1),
    (2, 65, 341, 16, 1),
    (1, 33, 130, 8, 2),
    (1, 1000, 48, 16, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_outputs_state_and_gradients_are_as_accurate_as_the_reference(shape, dtype):
    e = example(*shape) | {"document_ids": random_documents(*shape[:2]), "return_final_state": True}
    assert_as_accurate_as_the_reference(selective_scan, e, "cpu", dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_equals_the_reference_in_fp64(shape):
    e = example(*shape) | {"document_ids": random_documents(*shape[:2]), "return_final_state": True}
    truth = results(selective_scan, e, torch.float64, "reference")
    for name, found in results(selective_scan, e, torch.float64, "cpu").items():
        assert distance(found, truth[name]) < 1e-12, name


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 20),
    st.sets(st.sampled_from(["D", "z", "dt_bias", "initial_state"])),
    st.booleans(),
)
def test_any_shape_and_any_set_of_options_equals_the_reference(
    batch, length, groups, width, states, absent, softplus
):
    e = example(batch, length, groups * width, states, groups)
    e = {name: value for name, value in e.items() if name not in absent} | {"dt_softplus": softplus}
    if not softplus:
        e["dt"] = F.softplus(e["dt"])
    truth = results(selective_scan, e, torch.float64, "reference")
    for name, found in results(selective_scan, e, torch.float64, "cpu").items():
        assert distance(found, truth[name]) < 1e-12, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck_of_all_inputs_through_output_and_final_state(backend, groups):
    e = example(2, 5, 4, 3, groups)
    names = [name for name, value in e.items() if isinstance(value, Tensor)]
    ids = torch.tensor([[0, 0, 0, 0, 1], [4, 4, 5, 5, 5]])

    def run(*values):
        return selective_scan(
            **dict(zip(names, values, strict=True)),
            dt_softplus=True,
            document_ids=ids,
            return_final_state=True,
            backend=backend,
        )

    assert torch.autograd.gradcheck(run, [e[name].requires_grad_() for name in names])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_without_options(backend):
    e = example(1, 4, 2, 2)
    inputs = [F.softplus(e["dt"]), e["x"], e["A"], e["B"][:, :, 0], e["C"][:, :, 0]]

    def run(dt, x, A, B, C):
        return selective_scan(x, dt, A, B, C, backend=backend)

    assert torch.autograd.gradcheck(run, [value.clone().requires_grad_() for value in inputs])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_and_right_from_no_decay_to_total_decay(backend, dtype):
    e = example(1, 20, 26, 1) | {"dt_softplus": False, "dt_bias": None, "return_final_state": True}
    e["dt"] = torch.logspace(-8, 4, 26, dtype=torch.float64).expand(1, 20, 26).clone()
    e["A"] = -torch.ones(26, 1, dtype=torch.float64)
    e["x"] = e["x"] / e["dt"].clamp(min=1)
    truth = results(selective_scan, e, torch.float64, "reference")
    for name, found in results(selective_scan, e, dtype, backend).items():
        assert found.isfinite().all(), name
        assert distance(found, truth[name]) < 100 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_pieces_of_any_length_have_the_bits_of_the_whole(backend, lengths):
    e = example(2, sum(lengths), 18, 5, 2, dtype=torch.float32)
    whole, final_state = selective_scan(**e, return_final_state=True, backend=backend)
    state, start, pieces = e["initial_state"], 0, []
    for length in lengths:
        piece = along_time(e, slice(start, start + length)) | {"initial_state": state}
        y, state = selective_scan(**piece, return_final_state=True, backend=backend)
        pieces.append(y)
        start += length
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert torch.equal(state, final_state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 9, 48, 16, 1), (1, 5, 20, 3, 2)])
def test_step_by_step_has_the_bits_of_the_scan(backend, shape):
    e = example(*shape, dtype=torch.float32)
    y, final_state = selective_scan(**e, return_final_state=True, backend=backend)
    state = e["initial_state"]
    for t in range(shape[1]):
        before = state.clone()
        y_t, next_state = selective_step(state, **at_step(e, t), backend=backend)
        assert torch.equal(y_t, y[:, t])
        assert torch.equal(state, before)
        state = next_state
    assert torch.equal(state, final_state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_the_step(backend):
    e = at_step(example(2, 1, 4, 3, 2), 0)
    state = example(2, 1, 4, 3)["initial_state"]
    names = [name for name, value in e.items() if isinstance(value, Tensor)]

    def run(state, *values):
        return selective_step(
            state, **dict(zip(names, values, strict=True)), dt_softplus=True, backend=backend
        )

    inputs = [state, *(e[name].clone() for name in names)]
    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in inputs])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=4))
def test_packed_documents_are_separate_documents_and_the_state_belongs_to_the_first(backend, lengths):
    e = example(1, sum(lengths), 17, 4, dtype=torch.float32)
    ids = torch.repeat_interleave(torch.arange(len(lengths)) * 3, torch.tensor(lengths))[None]
    packed, final_state = selective_scan(**e, document_ids=ids, return_final_state=True, backend=backend)
    start, state = 0, None
    for number, length in enumerate(lengths):
        alone = along_time(e, slice(start, start + length))
        if number > 0:
            alone["initial_state"] = None
        y, state = selective_scan(**alone, return_final_state=True, backend=backend)
        assert torch.equal(packed[:, start : start + length], y)
        start += length
    assert torch.equal(final_state, state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 31, 32, 33, 63])
def test_no_gradient_reaches_another_document(backend, cut):
    e = example(2, 64, 20, 4, dtype=torch.float32)
    ids = (torch.arange(64) >= cut).long().expand(2, 64)
    inputs = {name: value.requires_grad_() for name, value in e.items() if isinstance(value, Tensor)}
    y, final_state = selective_scan(
        **inputs, dt_softplus=True, document_ids=ids, return_final_state=True, backend=backend
    )
    (y[:, cut:].square().sum() + final_state.square().sum()).backward()
    for name in ("x", "dt", "B", "C", "z"):
        gradient = inputs[name].grad
        assert torch.count_nonzero(gradient[:, :cut]) == 0, name
        assert torch.count_nonzero(gradient[:, cut:]) > 0, name
    assert torch.count_nonzero(inputs["initial_state"].grad) == 0
    grads = torch.autograd.grad(
        selective_scan(**inputs, dt_softplus=True, document_ids=ids, backend=backend)[:, :cut].sum(),
        [inputs["x"], inputs["dt"], inputs["B"]],
    )
    assert all(torch.count_nonzero(gradient[:, cut:]) == 0 for gradient in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_future_step_changes_a_past_output(backend):
    e = example(1, 50, 17, 4, dtype=torch.float32)
    changed = {name: value.clone() if isinstance(value, Tensor) else value for name, value in e.items()}
    for name in ("x", "dt", "B", "C", "z"):
        changed[name][:, 30:] = 7.0
    past = slice(0, 30)
    assert torch.equal(
        selective_scan(**e, backend=backend)[:, past], selective_scan(**changed, backend=backend)[:, past]
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z"])
def test_nan_stays_nan_and_inside_its_document(backend, name):
    e = example(1, 12, 18, 4, dtype=torch.float32)
    e[name][:, 4] = torch.nan
    ids = (torch.arange(12) >= 8).long()[None]
    y, final_state = selective_scan(**e, document_ids=ids, return_final_state=True, backend=backend)
    until = 8 if name in ("x", "dt", "B") else 5
    assert y[:, 4:until].isnan().all()
    assert y[:, :4].isfinite().all()
    assert y[:, until:].isfinite().all()
    assert final_state.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["A", "D", "dt_bias", "initial_state"])
def test_nan_in_a_parameter_or_the_state_reaches_the_output(backend, name):
    e = example(2, 3, 18, 4, dtype=torch.float32)
    e[name][...] = torch.nan
    assert selective_scan(**e, backend=backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_is_fp32_and_y_has_the_dtype_of_x(backend):
    e = example(1, 3, 4, 2, dtype=torch.bfloat16)
    y, state = selective_scan(**e, return_final_state=True, backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    y, state = selective_step(state, **at_step(e, 0), backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    y, state = selective_scan(**example(1, 3, 4, 2), return_final_state=True, backend=backend)
    assert (y.dtype, state.dtype) == (torch.float64, torch.float64)
    mixed = example(1, 3, 4, 2, dtype=torch.float32) | {"x": e["x"], "z": e["z"]}
    assert selective_scan(**mixed, backend=backend).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4)}, "x has shape (2, 4); it must be (B, L, I)"),
        ({"dt": torch.zeros(2, 5, 3)}, "dt has shape (2, 5, 3); it must be (B, L, I) = (2, 5, 4)"),
        ({"A": torch.zeros(4)}, "A has shape (4,); it must be (I, N)"),
        ({"A": torch.zeros(3, 6)}, "A has shape (3, 6); it must be (I, N) = (4, 6)"),
        ({"B": torch.zeros(2, 5, 7)}, "B has shape (2, 5, 7); it must be (B, L, N) = (2, 5, 6)"),
        ({"B": torch.zeros(2, 5, 3, 6)}, "B has G=3 groups; choose G ≥ 1 that divides I=4"),
        ({"C": torch.zeros(2, 5, 2, 6)}, "C has shape (2, 5, 2, 6); it must be (B, L, N) = (2, 5, 6)"),
        ({"D": torch.zeros(6)}, "D has shape (6,); it must be (I,) = (4,)"),
        ({"z": torch.zeros(2, 5)}, "z has shape (2, 5); it must be (B, L, I) = (2, 5, 4)"),
        (
            {"dt_bias": torch.zeros(4, dtype=torch.int64)},
            "dt_bias has dtype torch.int64; it must be floating",
        ),
        ({"initial_state": torch.zeros(2, 6, 4)}, "initial_state has shape (2, 6, 4); it must be (B, I, N)"),
        ({"document_ids": torch.zeros(2, 5)}, "document_ids has dtype torch.float32; it must be an integer"),
        ({"document_ids": torch.zeros(2, 4, dtype=torch.int64)}, "document_ids has shape (2, 4); it must be"),
        ({"D": torch.zeros(4, device="meta")}, "D is on meta; move it to x's device, cpu"),
        ({"backend": "fpga"}, "backend='fpga' does not exist; choose auto, "),
    ],
)
def test_a_wrong_argument_is_named_with_its_rule(change, message):
    arguments = {
        "x": torch.zeros(2, 5, 4),
        "dt": torch.zeros(2, 5, 4),
        "A": torch.zeros(4, 6),
        "B": torch.zeros(2, 5, 6),
        "C": torch.zeros(2, 5, 6),
    }
    with pytest.raises(ConfigError) as caught:
        selective_scan(**arguments | change)
    assert message in str(caught.value)
    assert str(caught.value).startswith("selective_scan: ")
    assert "\n" not in str(caught.value)


def test_an_empty_sequence_and_a_wrong_step_are_refused():
    with pytest.raises(
        ConfigError, match=r"x has shape \(1, 0, 4\) and N is 2; every size must be at least 1"
    ):
        selective_scan(
            torch.zeros(1, 0, 4),
            torch.zeros(1, 0, 4),
            *(torch.zeros(s) for s in ((4, 2), (1, 0, 2), (1, 0, 2))),
        )
    e = at_step(example(2, 1, 4, 3), 0)
    with pytest.raises(
        ConfigError, match=r"selective_step: state has shape \(2, 3, 4\); it must be \(B, I, N\)"
    ):
        selective_step(torch.zeros(2, 3, 4), **e)


def test_an_explicit_backend_that_cannot_run_fails_loudly():
    arguments = [torch.zeros(s, device="meta") for s in ((1, 2, 4), (1, 2, 4), (4, 3), (1, 2, 3), (1, 2, 3))]
    with pytest.raises(ConfigError, match=r"backend='cpu' cannot run here: .* the tensors are on meta"):
        selective_scan(*arguments, backend="cpu")
    assert selective_scan(*arguments).shape == (1, 2, 4)


def test_doctor_reports_which_backend_runs_and_why_not():
    for operation in (SELECTIVE_SCAN, SELECTIVE_STEP):
        assert operation.report(torch.device("cpu"))["cpu"] == "chosen"
        assert operation.report(torch.device("cpu"))["reference"] == "available"
        assert "the tensors are on meta" in operation.report(torch.device("meta"))["cpu"]
        assert operation.report(torch.device("cpu"), torch.int64)["cpu"].endswith("not torch.int64")
