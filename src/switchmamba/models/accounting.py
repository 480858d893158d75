"""Parameters, operations and memory of a model, from its configuration alone.

Counts "without embeddings" leave out embedding and head, as the paper's do (arXiv 2401.04081v2, appendix E).
"Active" is everything but the experts that a token does not visit; the whole router counts. A multiply-add is two
operations; training costs three forward passes (one forward, two backward).
"""

from dataclasses import asdict, dataclass
from typing import Any

from switchmamba.layers.interface import LayerCost
from switchmamba.models.config import ModelConfig


@dataclass(frozen=True)
class LayerAccount:
    """One layer of a residual step, its share of the step's norm not included."""

    name: str
    kind: str
    parameters: int
    active: int
    flops_per_token: int


@dataclass(frozen=True)
class Account:
    """Costs of a model; see :func:`account`. Memory is in bytes, fp32 unless said otherwise.

    Without ``embeddings``, of a model whose vocabulary is open, every figure leaves out embedding and head.
    """

    config: ModelConfig
    costs: tuple[LayerCost, ...]
    layers: tuple[LayerAccount, ...]
    parameters: int
    active_parameters: int
    embedding_parameters: int
    embeddings: bool = True

    @property
    def parameters_with_embeddings(self) -> int:
        """All parameters."""
        return self.parameters + self.embedding_parameters

    @property
    def active_parameters_with_embeddings(self) -> int:
        """All but the experts that a token does not visit."""
        return self.active_parameters + self.embedding_parameters

    def forward_flops_per_token(self, length: int) -> int:
        """One token's forward pass with the head, averaged over a causal sequence of ``length`` tokens."""
        fixed = sum(cost.flops_per_token for cost in self.costs) + self._head_flops
        visible_keys = (length + 1) / 2
        return int(fixed + visible_keys * sum(cost.flops_per_token_and_key for cost in self.costs))

    def training_flops_per_token(self, length: int) -> int:
        """Forward and backward of one token in a sequence of ``length`` tokens."""
        return 3 * self.forward_flops_per_token(length)

    def decode_flops_per_token(self, position: int) -> int:
        """One step of generation after ``position`` tokens."""
        fixed = sum(cost.flops_per_token for cost in self.costs) + self._head_flops
        return fixed + (position + 1) * sum(cost.flops_per_token_and_key for cost in self.costs)

    def state_bytes_per_sequence(self, length: int) -> int:
        """State of one sequence after ``length`` tokens, fp32; independent of length without attention.

        Each attention layer adds 8 bytes a token for the document of its key; position and document take 16 in all.
        """
        values = sum(cost.state_values + length * cost.state_values_per_token for cost in self.costs)
        attention_layers = sum(cost.state_values_per_token > 0 for cost in self.costs)
        return 4 * values + 8 * length * attention_layers + 16

    def training_memory(self, batch: int, length: int) -> dict[str, int]:
        """Bytes for one training step in fp32 with AdamW: weights, gradients, moments, activations."""
        weights = 4 * self.parameters_with_embeddings
        return {
            "weights": weights,
            "gradients": weights,
            "optimizer": 2 * weights,
            "activations": 4 * batch * length * self.activation_values_per_token,
        }

    @property
    def activation_values_per_token(self) -> int:
        """Values per token that training keeps for the backward pass.

        Each norm keeps its input, and RMSNorm the normalised input as well; each layer keeps what its cost says; the
        head's loss keeps the gradient of its input. Tests hold the sum against what autograd really saves.
        """
        per_norm = 1 if self.config.norm == "layernorm" else 2
        head = (1 + self.config.final_norm) if self.embeddings else 0
        return (per_norm * self.config.num_norms + head) * self.config.d_model + sum(
            cost.activation_values for cost in self.costs
        )

    @property
    def _head_flops(self) -> int:
        return 2 * self.config.d_model * self.config.vocab_size if self.embeddings else 0

    def as_dict(self, batch: int, length: int) -> dict[str, Any]:
        """Everything as plain values, for JSON; None for embeddings that are not counted."""
        with_embeddings = {
            "total_with_embeddings": self.parameters_with_embeddings,
            "active_with_embeddings": self.active_parameters_with_embeddings,
            "embeddings": self.embedding_parameters,
        }
        return {
            "vocab_size": self.config.vocab_size if self.embeddings else None,
            "parameters": {"total": self.parameters, "active": self.active_parameters}
            | {name: count if self.embeddings else None for name, count in with_embeddings.items()},
            "layers": [asdict(layer) for layer in self.layers],
            "flops_per_token": {
                "forward": self.forward_flops_per_token(length),
                "training": self.training_flops_per_token(length),
                "decode": self.decode_flops_per_token(length),
            },
            "memory_bytes": self.training_memory(batch, length)
            | {"state_per_sequence": self.state_bytes_per_sequence(length)},
            "batch": batch,
            "length": length,
        }


def account(config: ModelConfig, *, embeddings: bool = True) -> Account:
    """Count a model's costs without building it; False leaves out embedding and head, and the vocabulary with them."""
    norm_values = config.d_model * (2 if config.norm == "layernorm" else 1)
    names = [f"layers.{i}.{name}" for i, step in enumerate(config.steps) for name in step]
    configs = [config.layers[name] for step in config.steps for name in step]
    costs = tuple(layer.cost(config.d_model) for layer in configs)
    norms = norm_values * config.num_norms
    matrices = 0 if not embeddings else 1 if config.tie_embeddings else 2
    return Account(
        config=config,
        costs=costs,
        layers=tuple(
            LayerAccount(name, layer.kind, cost.parameters, cost.active_parameters, cost.flops_per_token)
            for name, layer, cost in zip(names, configs, costs, strict=True)
        ),
        parameters=sum(cost.parameters for cost in costs) + norms,
        active_parameters=sum(cost.active_parameters for cost in costs) + norms,
        embedding_parameters=config.vocab_size * config.d_model * matrices,
        embeddings=embeddings,
    )
