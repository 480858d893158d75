"""What most routers share: logits W x, a linear map in fp32 without a bias, and a refusal of NaN."""

from contextlib import nullcontext
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchmamba.errors import NonFiniteError
from switchmamba.layers.initialization import Initialization
from switchmamba.layers.routing.interface import Router


class LinearRouter(Router):
    """A router with one weight (outputs, D), most often a row per expert."""

    float32_parameters: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, d_model: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, d_model))

    def initialize(self, scheme: Initialization) -> None:  # noqa: D102
        scheme.router(self.weight)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return W x (T, outputs) in the weight's dtype, also where autocast is enabled."""
        device_type = x_TD.device.type
        full_precision = torch.autocast(device_type, enabled=False)
        with full_precision if torch.is_autocast_enabled(device_type) else nullcontext():
            return F.linear(x_TD.to(self.weight.dtype), self.weight)


def refuse_nan(probability: Tensor) -> None:
    """Raise NonFiniteError for NaN on a CPU; a GPU passes it on to the loss, without a host sync."""
    if probability.device.type == "cpu" and bool(probability.isnan().any()):
        raise NonFiniteError("router: NaN in the router's input or weight; look at the layer before it")
