"""The operations that the layers stand on, each with an obvious reference and faster backends.

Every function takes ``backend="auto"``; ``switchmamba doctor`` says what that chooses here, and why.
"""

from switchmamba.ops.backend import Operation
from switchmamba.ops.causal_conv1d import (
    CAUSAL_CONV1D,
    CAUSAL_CONV1D_STEP,
    causal_conv1d,
    causal_conv1d_step,
    causal_conv1d_twice,
)
from switchmamba.ops.expert_capacity import EXPERT_CAPACITY, expert_capacity
from switchmamba.ops.expert_feed_forward import EXPERT_FEED_FORWARD, expert_feed_forward
from switchmamba.ops.gated_rms_norm import GATED_RMS_NORM, gated_rms_norm
from switchmamba.ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY, linear_cross_entropy
from switchmamba.ops.mamba2_inner import MAMBA2_INNER, mamba2_inner
from switchmamba.ops.residual_norm import RESIDUAL_NORM, residual_norm
from switchmamba.ops.selective_scan import SELECTIVE_SCAN, SELECTIVE_STEP, selective_scan, selective_step
from switchmamba.ops.ssd import SSD_SCAN, SSD_STEP, ssd_scan, ssd_step
from switchmamba.ops.switch_router import SWITCH_ROUTER, switch_router

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "causal_conv1d_twice",
    "expert_capacity",
    "expert_feed_forward",
    "gated_rms_norm",
    "linear_cross_entropy",
    "mamba2_inner",
    "operations",
    "residual_norm",
    "selective_scan",
    "selective_step",
    "ssd_scan",
    "ssd_step",
    "switch_router",
]


def operations() -> tuple[Operation, ...]:
    """Return every operation, for reports of what runs where."""
    return (
        SELECTIVE_SCAN,
        SELECTIVE_STEP,
        CAUSAL_CONV1D,
        CAUSAL_CONV1D_STEP,
        EXPERT_CAPACITY,
        EXPERT_FEED_FORWARD,
        LINEAR_CROSS_ENTROPY,
        RESIDUAL_NORM,
        SWITCH_ROUTER,
        SSD_SCAN,
        SSD_STEP,
        GATED_RMS_NORM,
        MAMBA2_INNER,
    )
