"""What only the compiled backend promises: the same bits on any number of threads, little memory, any layout."""

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from switchmamba.ops import selective_scan, selective_step
from switchmamba.ops.selective_scan import SELECTIVE_SCAN, cpu, kernels
from switchmamba.ops.selective_scan.lanes import exp2, load, log1p, store
from tests.ops.agreement import results
from tests.ops.test_selective_scan import at_step, example, random_documents


@pytest.fixture
def threads():
    """A function that sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(3, 70, 341, 16, 1), (1, 300, 256, 8, 2)])
def test_outputs_and_gradients_have_the_same_bits_run_to_run_and_on_any_number_of_threads(shape, threads):
    e = example(*shape) | {"document_ids": random_documents(*shape[:2]), "return_final_state": True}
    threads(1)
    once = results(selective_scan, e, torch.float32, "cpu")
    for number in (1, 2, 3):
        threads(number)
        again = results(selective_scan, e, torch.float32, "cpu")
        assert all(torch.equal(again[name], once[name]) for name in once)


def test_a_large_batch_of_steps_has_the_same_bits_on_two_threads(threads):
    e = at_step(example(40, 1, 512, 16, dtype=torch.float32), 0)
    state = torch.randn(40, 512, 16)
    threads(1)
    y, next_state = selective_step(state, **e)
    threads(2)
    y_again, next_state_again = selective_step(state, **e)
    assert torch.equal(y, y_again)
    assert torch.equal(next_state, next_state_again)


def halves(tensor: Tensor) -> Tensor:
    """The same values as one half of a projection, as models make x and z."""
    return torch.cat([tensor, torch.full_like(tensor, torch.nan)], dim=-1).chunk(2, dim=-1)[0]


def time_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def every_other(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, dim=1)[:, ::2]


@pytest.mark.parametrize("layout", [halves, time_last, every_other])
@pytest.mark.parametrize("groups", [1, 2])
def test_memory_layout_changes_no_bit(layout, groups):
    e = example(2, 35, 48, 7, groups, dtype=torch.float32) | {"return_final_state": True}
    plain = results(selective_scan, e, torch.float32, "cpu")
    changed = e | {name: layout(e[name]) for name in ("x", "dt", "B", "C", "z")}
    changed |= {"A": e["A"].t().contiguous().t(), "initial_state": time_last(e["initial_state"])}
    assert not changed["x"].is_contiguous()
    inputs = {n: v.requires_grad_() if isinstance(v, Tensor) else v for n, v in changed.items()}
    y, state = selective_scan(**inputs, backend="cpu")
    assert torch.equal(y.double(), plain["output 0"])
    assert torch.equal(state.double(), plain["output 1"])


def test_memory_layout_changes_no_bit_of_a_step():
    e = at_step(example(3, 1, 48, 7, 2, dtype=torch.float32), 0)
    state = torch.randn(3, 48, 7)
    changed = e | {name: halves(e[name]) for name in ("x", "dt", "z")}
    changed |= {"A": e["A"].t().contiguous().t(), "B": e["B"].transpose(1, 2).contiguous().transpose(1, 2)}
    assert not changed["B"].is_contiguous()
    found = selective_step(time_last(state), **changed)
    assert all(torch.equal(f, x) for f, x in zip(found, selective_step(state, **e), strict=True))


def test_broadcast_inputs_and_output_gradients_are_read_as_they_lie():
    e = example(1, 33, 20, 5, dtype=torch.float32)
    B = e["B"].requires_grad_()
    e["x"] = e["x"].requires_grad_()
    full = (
        e | {"B": B.repeat(3, 1, 1, 1)} | {n: e[n].repeat(3, 1, 1) for n in ("x", "dt", "z", "initial_state")}
    )
    full["C"] = e["C"].repeat(3, 1, 1, 1)
    views = e | {"B": B.expand(3, -1, -1, -1), "C": e["C"].expand(3, -1, -1, -1)}
    views |= {n: e[n].expand(3, -1, -1) for n in ("x", "dt", "z", "initial_state")}
    found = torch.autograd.grad(selective_scan(**views).sum(), [B, e["x"]])
    expected = torch.autograd.grad(selective_scan(**full).sum(), [B, e["x"]])
    assert all(torch.equal(f, x) for f, x in zip(found, expected, strict=True))


def test_training_keeps_the_inputs_and_half_a_tensor_of_states():
    batch, length, channels, states = 2, 128, 64, 16
    e = example(batch, length, channels, states, dtype=torch.float32)
    e = {n: v.requires_grad_() if isinstance(v, Tensor) else v for n, v in e.items()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selective_scan(**e)
    inputs = sum(value.numel() for value in e.values() if isinstance(value, Tensor))
    assert sum(kept.values()) <= inputs + batch * length * channels // 2


def test_without_gradients_no_states_are_kept(monkeypatch):
    calls = []

    def record(kernel, work, *arguments):
        calls.append(arguments[-1].size)
        for item in work:
            kernel(*item, *arguments)

    monkeypatch.setattr(cpu, "run_parallel", record)
    e = example(1, 40, 16, 4, dtype=torch.float32)
    e["x"].requires_grad_()
    with torch.no_grad():
        selective_scan(**e)
    selective_scan(**e)
    assert calls[0] == 0
    assert calls[1] == kernels.checkpoint_rows(1, 40, 16, 1, 4) * 16


def test_activation_recompute_gives_the_same_gradients():
    e = example(1, 40, 16, 4, dtype=torch.float32)
    x = e.pop("x").requires_grad_()

    def run(x: Tensor) -> Tensor:
        return selective_scan(x=x, **e)

    (plain,) = torch.autograd.grad(run(x).square().sum(), x)
    recomputed_y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    (recomputed,) = torch.autograd.grad(recomputed_y.square().sum(), x)
    assert torch.equal(plain, recomputed)


def test_a_row_has_the_same_bits_in_any_batch():
    e = example(5, 40, 33, 6, dtype=torch.float32)
    rows = torch.tensor([3])
    alone = {
        name: value[rows] if isinstance(value, Tensor) and value.shape[0] == 5 else value
        for name, value in e.items()
    }
    assert torch.equal(selective_scan(**alone), selective_scan(**e)[rows])


def test_without_a_compiler_the_reference_runs(monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    report = SELECTIVE_SCAN.report(torch.device("cpu"))
    assert report["cpu"] == "NUMBA_DISABLE_JIT forbids compiling; unset it"
    assert report["reference"] == "chosen"


@numba.njit
def _functions(x, power, logarithm):
    for start in range(0, x.size, 16):
        value = load(x, start, 16)
        store(power, start, 16, exp2(value))
        store(logarithm, start, 16, log1p(value))


def functions(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    power, logarithm = np.empty_like(x), np.empty_like(x)
    _functions(x, power, logarithm)
    return power, logarithm


@pytest.mark.parametrize(("dtype", "longer"), [(np.float32, np.float64), (np.float64, np.longdouble)])
def test_exp2_and_log1p_err_by_less_than_two_units_in_the_last_place(dtype, longer):
    info = np.finfo(dtype)
    x = np.linspace(info.minexp + 2, info.maxexp - 1, 1 << 20).astype(dtype)
    power, _ = functions(x)
    truth = np.exp2(x.astype(longer))
    assert np.max(np.abs(power - truth) / truth) < 2 * info.eps
    small = np.concatenate([np.linspace(0, 1, 1 << 16), np.logspace(-30, 0, 1 << 16)]).astype(dtype)
    _, logarithm = functions(small)
    truth = np.log1p(small.astype(longer))
    assert np.max(np.abs(logarithm - truth) / np.maximum(truth, info.tiny)) < 2 * info.eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp2_is_right_at_the_ends(dtype):
    info = np.finfo(dtype)
    x = np.array(
        [0, -0.0, -1, 1, -np.inf, np.inf, np.nan, info.min, info.max, -info.tiny, 0, 0, 0, 0, 0, 0], dtype
    )
    x[10], x[11] = info.maxexp, info.minexp - 2
    x.view(np.int32 if dtype == np.float32 else np.int64)[12:14] = -1  # a NaN with every bit set
    power, _ = functions(x)
    assert power[:6].tolist() == [1, 1, 0.5, 2, 0, np.inf]
    assert np.isnan(power[[6, 12, 13]]).all()
    assert power[7:12].tolist() == [0, np.inf, 1, np.inf, 0]
