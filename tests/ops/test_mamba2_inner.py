"""What a Mamba-2 layer does between its projections is its three operations, one after the other."""

import pytest
import torch

from switchmamba.errors import ConfigError
from switchmamba.ops import mamba2_inner
from switchmamba.ops.mamba2_inner import MAMBA2_INNER
from tests.ops.agreement import distance, results


def example(rows: int = 2, length: int = 70, heads: int = 4, groups: int = 2) -> dict:
    generator = torch.Generator().manual_seed(0)
    inner, shared = 6 * heads, 2 * groups * 5

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "projected": random(rows, length, 2 * inner + shared + heads),
        "conv_weight": random(inner + shared, 3),
        "conv_bias": random(inner + shared),
        "A": -random(heads).exp(),
        "D": random(heads),
        "dt_bias": random(heads),
        "norm_weight": random(inner),
        "d_state": 5,
        "num_groups": groups,
        "conv_state": random(rows, 2, inner + shared),
        "ssm_state": random(rows, heads, 6, 5),
        "document_ids": (torch.rand(rows, length, generator=generator) < 0.05).cumsum(1),
    }


def test_composed_equals_the_reference_in_fp64():
    e = example()
    truth = results(mamba2_inner, e, torch.float64, "reference")
    for name, found in results(mamba2_inner, e, torch.float64, "composed").items():
        assert distance(found, truth[name]) < 1e-12, name


@pytest.mark.parametrize("cut", [1, 2, 40, 69])
def test_pieces_that_pass_both_states_on_equal_the_whole(cut):
    e = example() | {"document_ids": None}
    out, conv_state, ssm_state = mamba2_inner(**e)
    y, between, h = mamba2_inner(**e | {"projected": e["projected"][:, :cut]})
    rest = {"projected": e["projected"][:, cut:], "conv_state": between, "ssm_state": h}
    z, last, h = mamba2_inner(**e | rest)
    assert distance(torch.cat([y, z], 1), out) < 1e-12
    assert distance(last, conv_state) < 1e-12 and distance(h, ssm_state) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"projected": torch.zeros(2, 70)},
            "projected has shape (2, 70); it must be (B, L, 2·I + 2·G·N + H)",
        ),
        ({"projected": torch.zeros(2, 7, 71)}, "it must be (B, L, 2·I + 2·G·N + H) = (2, 7, 72)"),
        (
            {"conv_weight": torch.zeros(43, 3)},
            "conv_weight has shape (43, 3); it must be (I + 2·G·N, W) = (44, 3)",
        ),
        ({"num_groups": 3, "d_state": 0}, "I=24, H=4, G=3; H must divide I, and G must divide H"),
    ],
)
def test_a_wrong_argument_is_named_with_its_rule(change, message):
    e = example() | change
    if change.get("d_state") == 0:
        e |= {"projected": torch.zeros(2, 7, 52), "conv_weight": torch.zeros(24, 3)}
    with pytest.raises(ConfigError) as caught:
        mamba2_inner(**e)
    assert message in str(caught.value)


def test_doctor_reports_which_backend_runs():
    report = MAMBA2_INNER.report(torch.device("cpu"))
    assert report["composed"] == "chosen" and "needs a CUDA device" in report["triton"]
