"""How parameters start. Two schemes; a layer says which role each of its tensors plays.

| role            | paper (the authors' runs)                       | modern (default)                              |
|-----------------|-------------------------------------------------|-----------------------------------------------|
| embedding       | truncated normal, fan_in 1                      | normal, std 0.02                              |
| head            | truncated normal, fan_in D                      | normal, std 0.02 (first logits near 0)        |
| projection      | truncated normal, std √(0.1/fan_in), cut at ±0.2| uniform ±1/√fan_in (as upstream Mamba)        |
| output of branch| as projection; an expert's W2 has fan_in E·F    | as projection, over √(number of residual steps)|
| Mamba projection| uniform ±1/√fan_in, no depth rescaling          | as projection and output of branch            |
| router          | truncated normal, fan_in D                      | the same                                      |

Source of ``paper``: the authors' training code. A, D and dt of a state-space layer start the same in both (Mamba §3.6).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import sqrt

from torch import Tensor, nn


def truncated_normal(tensor: Tensor, fan_in: int) -> None:
    """Normal with std √(0.1/fan_in), cut at ±0.2 absolute (the paper's and Switch Transformer's scale 0.1)."""
    nn.init.trunc_normal_(tensor, std=sqrt(0.1 / fan_in), a=-0.2, b=0.2)


def uniform(tensor: Tensor, fan_in: int, scale: float = 1.0) -> None:
    """Uniform in ±scale/√fan_in: torch's default for a linear layer."""
    bound = scale / sqrt(fan_in)
    nn.init.uniform_(tensor, -bound, bound)


@dataclass(frozen=True)
class Initialization(ABC):
    """A scheme; ``num_residual_steps`` is how many branches are added to the residual stream."""

    num_residual_steps: int

    def router(self, weight_ED: Tensor) -> None:
        """Fill a router's weight (E, D)."""
        truncated_normal(weight_ED, fan_in=weight_ED.shape[-1])

    @abstractmethod
    def embedding(self, weight_VD: Tensor) -> None:
        """Fill the embedding (V, D)."""

    @abstractmethod
    def head(self, weight_VD: Tensor) -> None:
        """Fill the head (V, D)."""

    @abstractmethod
    def projection(self, weight: Tensor, fan_in: int) -> None:
        """Fill a matrix inside a branch."""

    @abstractmethod
    def output(self, weight: Tensor, fan_in: int) -> None:
        """Fill the last matrix of a branch."""

    @abstractmethod
    def expert_output(self, weight_EDF: Tensor) -> None:
        """Fill the last matrices of E experts."""

    @abstractmethod
    def mamba_projection(self, weight: Tensor, fan_in: int) -> None:
        """Fill a matrix or convolution inside a state-space branch."""

    @abstractmethod
    def mamba_output(self, weight: Tensor, fan_in: int) -> None:
        """Fill the last matrix of a state-space branch."""


class PaperInitialization(Initialization):
    """The authors' runs."""

    def embedding(self, weight_VD: Tensor) -> None:  # noqa: D102
        truncated_normal(weight_VD, fan_in=1)

    def head(self, weight_VD: Tensor) -> None:  # noqa: D102
        truncated_normal(weight_VD, fan_in=weight_VD.shape[-1])

    def projection(self, weight: Tensor, fan_in: int) -> None:  # noqa: D102
        truncated_normal(weight, fan_in)

    def output(self, weight: Tensor, fan_in: int) -> None:  # noqa: D102
        truncated_normal(weight, fan_in)

    def expert_output(self, weight_EDF: Tensor) -> None:  # noqa: D102
        num_experts, _, d_expert = weight_EDF.shape
        truncated_normal(weight_EDF, fan_in=num_experts * d_expert)

    def mamba_projection(self, weight: Tensor, fan_in: int) -> None:  # noqa: D102
        uniform(weight, fan_in)

    def mamba_output(self, weight: Tensor, fan_in: int) -> None:  # noqa: D102
        uniform(weight, fan_in)


class ModernInitialization(Initialization):
    """The default: uniform by fan-in, branches scaled so that their sum keeps the residual stream's variance."""

    def embedding(self, weight_VD: Tensor) -> None:  # noqa: D102
        nn.init.normal_(weight_VD, std=0.02)

    def head(self, weight_VD: Tensor) -> None:  # noqa: D102
        nn.init.normal_(weight_VD, std=0.02)

    def projection(self, weight: Tensor, fan_in: int) -> None:  # noqa: D102
        uniform(weight, fan_in)

    def output(self, weight: Tensor, fan_in: int) -> None:  # noqa: D102
        uniform(weight, fan_in, scale=1 / sqrt(self.num_residual_steps))

    def expert_output(self, weight_EDF: Tensor) -> None:  # noqa: D102
        self.output(weight_EDF, fan_in=weight_EDF.shape[-1])

    def mamba_projection(self, weight: Tensor, fan_in: int) -> None:  # noqa: D102
        self.projection(weight, fan_in)

    def mamba_output(self, weight: Tensor, fan_in: int) -> None:  # noqa: D102
        self.output(weight, fan_in)


SCHEMES: dict[str, type[Initialization]] = {"paper": PaperInitialization, "modern": ModernInitialization}
