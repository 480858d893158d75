"""The operations that the layers stand on, each with an obvious reference and faster backends.

Every function takes ``backend="auto"``; ``switchmamba doctor`` says what that chooses here, and why.
"""

from switchmamba.ops.backend import Operation
from switchmamba.ops.causal_conv1d import CAUSAL_CONV1D, CAUSAL_CONV1D_STEP, causal_conv1d, causal_conv1d_step
from switchmamba.ops.expert_feed_forward import EXPERT_FEED_FORWARD, expert_feed_forward
from switchmamba.ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY, linear_cross_entropy
from switchmamba.ops.selective_scan import SELECTIVE_SCAN, SELECTIVE_STEP, selective_scan, selective_step

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "expert_feed_forward",
    "linear_cross_entropy",
    "operations",
    "selective_scan",
    "selective_step",
]


def operations() -> tuple[Operation, ...]:
    """Return every operation, for reports of what runs where."""
    return (
        SELECTIVE_SCAN,
        SELECTIVE_STEP,
        CAUSAL_CONV1D,
        CAUSAL_CONV1D_STEP,
        EXPERT_FEED_FORWARD,
        LINEAR_CROSS_ENTROPY,
    )
