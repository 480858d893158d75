"""Times of Mamba-2 on a GPU: the whole mixer beside mamba_ssm's, and what it is made of.

    python -m benchmarks.gpu_mamba2

bf16 autocast, fp32 parameters, 64 channels a head, 128 states, one group. `benchmarks.gpu_check` holds the operations
against their references first, and calls :func:`measure`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_report import BANDWIDTH, Row, show
from benchmarks.gpu_timing import forward_backward_calls, forward_calls, milliseconds
from switchmamba.layers.initialization import SCHEMES
from switchmamba.layers.interface import SequenceInfo
from switchmamba.layers.mixers.mamba2 import Mamba2, Mamba2Config
from switchmamba.ops import causal_conv1d, gated_rms_norm, ssd_scan

bf16 = torch.bfloat16
MIXERS = {
    (512, 64, 1024): (1.31, 5.43),
    (768, 32, 1024): (1.15, 8.25),
    (1024, 8, 2048): (1.58, 5.82),
    (2048, 8, 2048): (2.06, 7.17),
}
"""(d_model, B, L): forward and forward + backward of mamba_ssm's Mamba-2 mixer on an H200, ms."""
TARGET = 1.5
"""How many times faster than mamba_ssm's the mixer shall be, forward + backward."""


def measure(device: torch.device) -> list[Row]:
    return [row for shape in MIXERS for row in mixer(*shape, device)]


def mixer(d_model: int, batch: int, length: int, device: torch.device) -> list[Row]:
    """Time a Mamba-2 layer on a bf16 input as its norm gives it, and its parts by themselves."""
    layer = Mamba2Config().build(d_model)
    layer.initialize(SCHEMES["paper"](num_residual_steps=8))
    layer.to(device)
    position_B = torch.zeros(batch, dtype=torch.int64, device=device)
    sequence = SequenceInfo(None, None, position_B, position_B)
    name = f"Mamba-2 d{d_model} {batch}×{length}"

    def whole(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=bf16):
            return layer(x, sequence).y

    rows = _both_passes(f"{name}, mixer", whole, lambda: [_random(batch, length, d_model, device)], layer)
    forward, both = MIXERS[d_model, batch, length]
    rows = [
        _beside(rows[0], peer=forward, peer_name="mamba_ssm"),
        _beside(rows[1], peer=both, peer_name="mamba_ssm", target=both / TARGET),
    ]
    for part, (run, make, tensors) in _parts(layer, d_model, batch, length, device).items():
        floor = 1000 * 2 * batch * length * tensors / BANDWIDTH
        timed = _both_passes(f"{name}, {part}", run, make, layer)
        rows.append(_beside(timed[0]))
        rows.append(_beside(timed[1], floor=floor or None))
    return rows


def _parts(
    layer: Mamba2, d_model: int, batch: int, length: int, device: torch.device
) -> dict[str, tuple[Callable[..., Tensor], Callable[[], list[Tensor]], int]]:
    """Return each part, its inputs lying as they do in the mixer, and the values a token that it reads and writes.

    That counts both passes, each input and output once; the scan's states, one per chunk, are its own affair.
    """
    config = layer.config
    inner, convolved, heads = layer.sizes
    width, states = sum(layer.sizes), config.num_groups * config.d_state

    def project_in(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=bf16):
            return layer.in_proj(x)

    def project_out(y: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=bf16):
            return layer.out_proj(y)

    def convolve(xBC: Tensor) -> Tensor:
        return causal_conv1d(xBC, layer.conv1d.weight.squeeze(1), layer.conv1d.bias, "silu")

    def scan(xBC: Tensor, dt: Tensor) -> Tensor:
        x, B, C = xBC.split([inner, states, states], dim=-1)
        return ssd_scan(
            x.unflatten(-1, (heads, -1)),
            dt,
            -layer.A_log.exp(),
            B.unflatten(-1, (-1, config.d_state)),
            C.unflatten(-1, (-1, config.d_state)),
            layer.D,
            layer.dt_bias,
            dt_softplus=True,
        )

    def norm(y: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(y, z, layer.norm.weight, config.num_groups)

    def random(*channels: int) -> Callable[[], list[Tensor]]:
        return lambda: [_random(batch, length, width, device) for width in channels]

    return {
        "in_proj": (project_in, random(d_model), 0),
        "out_proj": (project_out, random(inner), 0),
        "convolution": (
            convolve,
            lambda: [_random(batch, length, width, device)[..., inner : inner + convolved]],
            5 * convolved,
        ),
        "scan": (scan, random(convolved, heads), 5 * convolved),
        "gated norm": (
            norm,
            lambda: [
                _random(batch, length, inner, device),
                _random(batch, length, width, device)[..., :inner],
            ],
            8 * inner,
        ),
    }


def _random(batch: int, length: int, width: int, device: torch.device) -> Tensor:
    return torch.randn(batch, length, width, device=device, dtype=bf16)


def _both_passes(
    name: str, run: Callable[..., Tensor], make: Callable[[], list[Tensor]], layer: Mamba2
) -> list[Row]:
    sets = [[tensor.detach().requires_grad_() for tensor in make()] for _ in range(2)]
    return [
        Row(f"{name}, forward", milliseconds(forward_calls(run, sets), 3, 11)),
        Row(
            f"{name}, forward + backward",
            milliseconds(forward_backward_calls(run, sets, list(layer.parameters())), 3, 11),
        ),
    ]


def _beside(row: Row, **known: Any) -> Row:
    return show(Row(row.what, row.ours, **known))


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    measure(torch.device("cuda"))
