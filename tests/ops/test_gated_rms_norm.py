"""Laws of the gated RMS norm, for every backend that runs on a CPU."""

import pytest
import torch
import torch.nn.functional as F

from switchmamba.errors import ConfigError
from switchmamba.ops import gated_rms_norm
from tests.ops.agreement import assert_as_accurate_as_the_reference, distance, results

BACKENDS = ["eager", "reference"]


def example(*shape: int, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    x, z = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return {"x": x, "z": z, "weight": torch.randn(shape[-1], generator=generator, dtype=torch.float64)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_rms_norm_of_torch_on_the_gated_input(backend):
    e = example(3, 5, 12)
    gated = e["x"] * F.silu(e["z"])
    expected = F.rms_norm(gated, (12,), e["weight"], 1e-3)
    torch.testing.assert_close(gated_rms_norm(**e, eps=1e-3, backend=backend), expected)
    expected = F.rms_norm(gated.view(3, 5, 3, 4), (4,), None, 1e-3).flatten(-2) * e["weight"]
    torch.testing.assert_close(gated_rms_norm(**e, groups=3, eps=1e-3, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 3), (7, 48), (2, 3, 341), (1000, 24)])
def test_eager_is_as_accurate_as_the_reference(shape, dtype):
    assert_as_accurate_as_the_reference(gated_rms_norm, example(*shape), "eager", dtype)


@pytest.mark.parametrize("groups", [1, 2, 24])
def test_eager_equals_the_reference_in_fp64(groups):
    e = example(5, 24) | {"groups": groups}
    truth = results(gated_rms_norm, e, torch.float64, "reference")
    for name, found in results(gated_rms_norm, e, torch.float64, "eager").items():
        assert distance(found, truth[name]) < 1e-13, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    inputs = [value.requires_grad_() for value in example(3, 6).values()]
    assert torch.autograd.gradcheck(lambda x, z, w: gated_rms_norm(x, z, w, 2, backend=backend), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_a_wider_tensor_are_read_where_they_lie(backend):
    e = example(4, 6)
    wide = torch.cat([e["z"], e["x"]], dim=-1)
    found = gated_rms_norm(wide[:, 6:], wide[:, :6], e["weight"], backend=backend)
    torch.testing.assert_close(found, gated_rms_norm(**e, backend=backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "x has shape (2, 5); its last size must be weight's, 6"),
        ({"z": torch.zeros(3, 6)}, "z has shape (3, 6); it must be x's shape = (2, 6)"),
        ({"weight": torch.zeros(1, 6)}, "weight has shape (1, 6); it must be (I,)"),
        ({"groups": 4}, "groups=4; choose G ≥ 1 that divides I=6"),
        ({"z": torch.zeros(2, 6, dtype=torch.int64)}, "z has dtype torch.int64; it must be floating point"),
        ({"z": torch.zeros(2, 6, device="meta")}, "z is on meta; move it to x's device, cpu"),
    ],
)
def test_a_wrong_argument_is_named_with_its_rule(change, message):
    arguments = {"x": torch.zeros(2, 6), "z": torch.zeros(2, 6), "weight": torch.zeros(6)}
    with pytest.raises(ConfigError) as caught:
        gated_rms_norm(**arguments | change)
    assert message in str(caught.value)
