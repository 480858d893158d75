"""Laws of state space duality's scan and step, for every backend that runs on a CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from switchmamba.errors import ConfigError
from switchmamba.ops import ssd_scan, ssd_step
from switchmamba.ops.ssd import SSD_SCAN, SSD_STEP, eager
from tests.ops.agreement import assert_as_accurate_as_the_reference, distance, results

BACKENDS = ["eager", "reference"]
ALONG_TIME = ("x", "dt", "B", "C")


def example(
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    states: int,
    groups: int = 1,
    seed: int = 0,
    dtype=torch.float64,
) -> dict:
    """Every argument, with decays as a trained model has them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": random(batch, length, heads, head_dim),
        "dt": random(batch, length, heads) - 2,
        "A": -torch.exp(random(heads)),
        "B": random(batch, length, groups, states),
        "C": random(batch, length, groups, states),
        "D": random(heads),
        "dt_bias": random(heads) / 4,
        "dt_softplus": True,
        "initial_state": random(batch, heads, head_dim, states),
    }


def random_documents(batch: int, length: int, seed: int = 1) -> Tensor:
    changes = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.1
    return changes.cumsum(1)


def along_time(example: dict, part: slice) -> dict:
    """The arguments with x, dt, B, C cut to a part of the time axis."""
    return example | {name: example[name][:, part] for name in ALONG_TIME}


def at_step(example: dict, t: int) -> dict:
    """The arguments of ``ssd_step`` at time t."""
    rest = {name: value for name, value in example.items() if name != "initial_state"}
    return rest | {name: example[name][:, t] for name in ALONG_TIME}


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_unrolled_recurrence(backend):
    e = example(2, 7, 4, 3, 5, groups=2)
    delta_BLH = F.softplus(e["dt"] + e["dt_bias"])
    elapsed_BLH = delta_BLH.cumsum(1)
    B_BLHN, C_BLHN = e["B"].repeat_interleave(2, 2), e["C"].repeat_interleave(2, 2)
    y = torch.zeros_like(e["x"])
    for t in range(7):
        state = torch.exp(elapsed_BLH[:, t] * e["A"])[..., None, None] * e["initial_state"]
        for s in range(t + 1):
            decay_BH = torch.exp((elapsed_BLH[:, t] - elapsed_BLH[:, s]) * e["A"])
            drive_BHP = (decay_BH * delta_BLH[:, s])[..., None] * e["x"][:, s]
            state = state + drive_BHP[..., None] * B_BLHN[:, s, :, None, :]
        y[:, t] = (state * C_BLHN[:, t, :, None, :]).sum(-1) + e["D"][:, None] * e["x"][:, t]
    found, final_state = ssd_scan(**e, return_final_state=True, backend=backend)
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(final_state, state)


SHAPES = [  # batch, length, heads, head_dim, states, groups
    (1, 1, 1, 1, 1, 1),
    (2, 2, 3, 8, 4, 1),
    (2, 63, 4, 12, 16, 2),
    (3, 64, 2, 16, 17, 1),
    (2, 65, 3, 5, 16, 3),
    (1, 130, 2, 32, 8, 1),
    (1, 1000, 2, 8, 16, 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_are_as_accurate_as_the_reference(shape, dtype):
    e = example(*shape) | {"document_ids": random_documents(*shape[:2]), "return_final_state": True}
    assert_as_accurate_as_the_reference(ssd_scan, e, "eager", dtype)


@pytest.mark.parametrize("decay", [1e2, 1e4, 1e6])
def test_chunks_stay_accurate_under_extreme_decay(decay):
    e = example(2, 150, 4, 8, 6) | {"return_final_state": True}
    e["A"] = e["A"] * torch.tensor([1.0, decay, 1e-3, decay])
    assert_as_accurate_as_the_reference(ssd_scan, e, "eager")


def test_a_step_of_strong_decay_leaves_what_follows_exact():
    # After it, sums of decays are around −10⁵: their differences would have no digits left in fp32.
    e = example(1, 60, 2, 4, 3) | {"return_final_state": True}
    e["dt"][:, 5] = 1e5
    assert_as_accurate_as_the_reference(ssd_scan, e, "eager")


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_equal_the_reference_in_fp64(shape):
    e = example(*shape) | {"document_ids": random_documents(*shape[:2]), "return_final_state": True}
    truth = results(ssd_scan, e, torch.float64, "reference")
    for name, found in results(ssd_scan, e, torch.float64, "eager").items():
        assert distance(found, truth[name]) < 1e-12, name


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 140),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 10),
    st.integers(1, 10),
    st.sets(st.sampled_from(["D", "dt_bias", "initial_state"])),
    st.booleans(),
)
def test_any_shape_and_any_set_of_options_equals_the_reference(
    batch, length, groups, width, head_dim, states, absent, softplus
):
    e = example(batch, length, groups * width, head_dim, states, groups)
    e = {name: value for name, value in e.items() if name not in absent} | {"dt_softplus": softplus}
    if not softplus:
        e["dt"] = F.softplus(e["dt"])
    truth = results(ssd_scan, e, torch.float64, "reference")
    for name, found in results(ssd_scan, e, torch.float64, "eager").items():
        assert distance(found, truth[name]) < 1e-12, name


@pytest.mark.parametrize("chunk", [1, 2, 7, 32, 99, 100, 128])
def test_the_size_of_a_chunk_changes_nothing(chunk):
    e = example(2, 100, 4, 6, 5, groups=2)
    tensors = [e[name].clone().requires_grad_() for name in ("x", "dt", "A", "B", "C", "D", "dt_bias")]
    state = e["initial_state"].clone().requires_grad_()
    starts_BL = F.pad(random_documents(2, 100).diff(dim=1) != 0, (1, 0))

    def run(chunk: int) -> list[Tensor]:
        outputs = eager.ssd_scan(*tensors, True, state, starts_BL, chunk)
        return [*outputs, *torch.autograd.grad([o.square().sum() for o in outputs], [*tensors, state])]

    for found, expected in zip(run(chunk), run(eager.CHUNK), strict=True):
        assert distance(found.detach(), expected.detach()) < 1e-12


@pytest.mark.parametrize("strides", ["slices", "transposed", "flipped"])
def test_strides_do_not_matter(strides):
    e = example(2, 70, 4, 6, 5, groups=2)

    def laid_out(value: Tensor) -> Tensor:
        if strides == "slices":
            return torch.cat([value, value], dim=-1)[..., : value.shape[-1]]
        if strides == "transposed":
            return value.transpose(0, -1).contiguous().transpose(0, -1)
        return value.flip(0).flip(0)

    strided = {n: laid_out(v) if isinstance(v, Tensor) else v for n, v in e.items()}
    plain = ssd_scan(**e, return_final_state=True, backend="eager")
    for found, expected in zip(ssd_scan(**strided, return_final_state=True), plain, strict=True):
        assert distance(found, expected) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck_of_all_inputs_through_output_and_final_state(backend, groups):
    e = example(2, 5, 4, 2, 3, groups)
    names = [name for name, value in e.items() if isinstance(value, Tensor)]
    ids = torch.tensor([[0, 0, 0, 0, 1], [4, 4, 5, 5, 5]])

    def run(*values):
        return ssd_scan(
            **dict(zip(names, values, strict=True)),
            dt_softplus=True,
            document_ids=ids,
            return_final_state=True,
            backend=backend,
        )

    assert torch.autograd.gradcheck(run, [e[name].requires_grad_() for name in names])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_without_options(backend):
    e = example(1, 4, 2, 2, 2)
    inputs = [F.softplus(e["dt"]), e["x"], e["A"], e["B"], e["C"]]

    def run(dt, x, A, B, C):
        return ssd_scan(x, dt, A, B, C, backend=backend)

    assert torch.autograd.gradcheck(run, [value.clone().requires_grad_() for value in inputs])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 40, 63, 64, 65, 99])
def test_pieces_that_pass_the_state_on_equal_the_whole_with_gradients(backend, cut):
    e = example(2, 100, 4, 6, 5, groups=2)
    names = [name for name, value in e.items() if isinstance(value, Tensor)]
    leaves = {name: e[name].clone().requires_grad_() for name in names}

    def whole(**arguments):
        return ssd_scan(**arguments, dt_softplus=True, return_final_state=True, backend=backend)

    def pieces(**arguments):
        y, state = whole(**along_time(arguments, slice(0, cut)))
        z, state = whole(**along_time(arguments, slice(cut, 100)) | {"initial_state": state})
        return torch.cat([y, z], 1), state

    found = [
        [*outputs, *torch.autograd.grad([o.square().sum() for o in outputs], list(leaves.values()))]
        for outputs in (whole(**leaves), pieces(**leaves))
    ]
    for expected, got in zip(*found, strict=True):
        assert distance(got.detach(), expected.detach()) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_by_step_equals_the_scan_and_leaves_the_state_alone(backend):
    e = example(3, 9, 4, 6, 5, groups=2)
    y, final_state = ssd_scan(**e, return_final_state=True, backend=backend)
    state = e["initial_state"]
    for t in range(9):
        before = state.clone()
        y_t, next_state = ssd_step(state, **at_step(e, t), backend=backend)
        assert distance(y_t, y[:, t]) < 1e-13
        assert torch.equal(state, before)
        state = next_state
    assert distance(state, final_state) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eager_step_is_as_accurate_as_the_reference(dtype):
    e = at_step(example(3, 1, 4, 6, 5, groups=2), 0)
    state = example(3, 1, 4, 6, 5, groups=2)["initial_state"]
    assert_as_accurate_as_the_reference(ssd_step, {"state": state} | e, "eager", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_the_step(backend):
    e = at_step(example(2, 1, 4, 2, 3, 2), 0)
    state = example(2, 1, 4, 2, 3)["initial_state"]
    names = [name for name, value in e.items() if isinstance(value, Tensor)]

    def run(state, *values):
        return ssd_step(state, **dict(zip(names, values, strict=True)), dt_softplus=True, backend=backend)

    inputs = [state, *(e[name].clone() for name in names)]
    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in inputs])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 80), min_size=2, max_size=4))
def test_packed_documents_are_separate_documents_and_the_state_belongs_to_the_first(backend, lengths):
    e = example(1, sum(lengths), 2, 3, 4)
    ids = torch.repeat_interleave(torch.arange(len(lengths)) * 3, torch.tensor(lengths))[None]
    packed, final_state = ssd_scan(**e, document_ids=ids, return_final_state=True, backend=backend)
    start, state = 0, None
    for number, length in enumerate(lengths):
        alone = along_time(e, slice(start, start + length))
        if number > 0:
            alone["initial_state"] = None
        y, state = ssd_scan(**alone, return_final_state=True, backend=backend)
        assert distance(packed[:, start : start + length], y) < 1e-12
        start += length
    assert distance(final_state, state) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 63, 64, 65, 99])
def test_no_gradient_reaches_another_document(backend, cut):
    e = example(2, 100, 4, 5, 4, dtype=torch.float32)
    ids = (torch.arange(100) >= cut).long().expand(2, 100)
    inputs = {name: value.requires_grad_() for name, value in e.items() if isinstance(value, Tensor)}
    y, final_state = ssd_scan(
        **inputs, dt_softplus=True, document_ids=ids, return_final_state=True, backend=backend
    )
    (y[:, cut:].square().sum() + final_state.square().sum()).backward()
    for name in ALONG_TIME:
        gradient = inputs[name].grad
        assert torch.count_nonzero(gradient[:, :cut]) == 0, name
        assert torch.count_nonzero(gradient[:, cut:]) > 0, name
    assert torch.count_nonzero(inputs["initial_state"].grad) == 0
    grads = torch.autograd.grad(
        ssd_scan(**inputs, dt_softplus=True, document_ids=ids, backend=backend)[:, :cut].sum(),
        [inputs["x"], inputs["dt"], inputs["B"]],
    )
    assert all(torch.count_nonzero(gradient[:, cut:]) == 0 for gradient in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_future_step_changes_a_past_output(backend):
    e = example(1, 100, 4, 5, 4, dtype=torch.float32)
    changed = {name: value.clone() if isinstance(value, Tensor) else value for name, value in e.items()}
    for name in ALONG_TIME:
        changed[name][:, 80:] = 7.0
    past = slice(0, 80)
    assert torch.equal(ssd_scan(**e, backend=backend)[:, past], ssd_scan(**changed, backend=backend)[:, past])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "A", "D", "dt_bias", "initial_state"])
def test_nan_is_not_hidden(backend, name):
    e = example(1, 70, 4, 5, 4, dtype=torch.float32)
    e[name][...] = torch.nan
    assert ssd_scan(**e, backend=backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_is_fp32_and_y_has_the_dtype_of_x(backend):
    e = example(1, 3, 2, 4, 2, dtype=torch.bfloat16)
    y, state = ssd_scan(**e, return_final_state=True, backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    y, state = ssd_step(state, **at_step(e, 0), backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    y, state = ssd_scan(**example(1, 3, 2, 4, 2), return_final_state=True, backend=backend)
    assert (y.dtype, state.dtype) == (torch.float64, torch.float64)
    mixed = example(1, 3, 2, 4, 2, dtype=torch.float32) | {"x": e["x"]}
    assert ssd_scan(**mixed, backend=backend).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 4)}, "x has shape (2, 5, 4); it must be (B, L, H, P)"),
        ({"dt": torch.zeros(2, 5, 3)}, "dt has shape (2, 5, 3); it must be (B, L, H) = (2, 5, 4)"),
        ({"A": torch.zeros(4, 1)}, "A has shape (4, 1); it must be (H,) = (4,)"),
        ({"B": torch.zeros(2, 5, 6)}, "B has shape (2, 5, 6); it must be (B, L, G, N)"),
        ({"B": torch.zeros(2, 5, 3, 6)}, "B has G=3 groups; choose G ≥ 1 that divides H=4"),
        ({"C": torch.zeros(2, 5, 2, 6)}, "C has shape (2, 5, 2, 6); it must be (B, L, G, N) = (2, 5, 1, 6)"),
        ({"D": torch.zeros(6)}, "D has shape (6,); it must be (H,) = (4,)"),
        (
            {"dt_bias": torch.zeros(4, dtype=torch.int64)},
            "dt_bias has dtype torch.int64; it must be floating",
        ),
        ({"initial_state": torch.zeros(2, 4, 6, 3)}, "initial_state has shape (2, 4, 6, 3); it must be"),
        ({"document_ids": torch.zeros(2, 5)}, "document_ids has dtype torch.float32; it must be an integer"),
        ({"document_ids": torch.zeros(2, 4, dtype=torch.int64)}, "document_ids has shape (2, 4); it must be"),
        ({"D": torch.zeros(4, device="meta")}, "D is on meta; move it to x's device, cpu"),
        ({"backend": "fpga"}, "backend='fpga' does not exist; choose auto, "),
        ({"backend": "triton"}, "backend='triton' cannot run here: it needs a CUDA device"),
    ],
)
def test_a_wrong_argument_is_named_with_its_rule(change, message):
    arguments = {
        "x": torch.zeros(2, 5, 4, 3),
        "dt": torch.zeros(2, 5, 4),
        "A": torch.zeros(4),
        "B": torch.zeros(2, 5, 1, 6),
        "C": torch.zeros(2, 5, 1, 6),
    }
    with pytest.raises(ConfigError) as caught:
        ssd_scan(**arguments | change)
    assert message in str(caught.value)
    assert str(caught.value).startswith("ssd_scan: ")
    assert "\n" not in str(caught.value)


def test_an_empty_sequence_and_a_wrong_step_are_refused():
    shapes = ((1, 0, 4, 2), (1, 0, 4), (4,), (1, 0, 1, 2), (1, 0, 1, 2))
    with pytest.raises(ConfigError, match=r"x has shape \(1, 0, 4, 2\) and N is 2; every size must be"):
        ssd_scan(*(torch.zeros(s) for s in shapes))
    with pytest.raises(
        ConfigError, match=r"ssd_step: state has shape \(2, 3, 4\); it must be \(B, H, P, N\)"
    ):
        ssd_step(torch.zeros(2, 3, 4), **at_step(example(2, 1, 4, 3, 2), 0))


def test_doctor_reports_which_backend_runs_and_why_not():
    for operation in (SSD_SCAN, SSD_STEP):
        report = operation.report(torch.device("cpu"))
        assert report["eager"] == "chosen" and report["reference"] == "available"
        assert "needs a CUDA device" in report["triton"]
