"""Model FLOPs utilisation, what share of the hardware's peak the model's own arithmetic reaches; and the memory held.

    mfu = tokens/s · 3 · forward FLOPs per token / peak        (PaLM, arXiv 2204.02311, appendix B)

The forward pass is that of the active parameters at the context length: experts that a token does not visit
cost nothing. The backward pass is twice that. Recomputation earns no credit.
"""

import resource
import sys
from statistics import median
from time import perf_counter

import torch

PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10G": 70e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 peak by a part of the device's name, from the vendor's data sheets; the first match counts."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the peak in FLOP/s: from a GPU's data sheet in bf16, otherwise measured by a matrix product."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_BF16_FLOPS.items():
            if part in name:
                return peak
    return measured_peak_flops(device, dtype)


def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a square matrix product, the median of five; takes about 0.2 s on a CPU."""
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        seconds.append(perf_counter() - start)
    return float(2 * size**3 / median(seconds[1:]))


def mfu(tokens_per_second: float, training_flops_per_token: float, peak: float) -> float:
    """Return the utilisation, 0 to 1; ``training_flops_per_token`` is three forward passes."""
    return tokens_per_second * training_flops_per_token / peak


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: of the GPU by tensors, or, without one, of memory by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobyte = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte
