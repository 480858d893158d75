"""The language model: embedding → residual steps → (norm) → head.

Mamba, MoE-Mamba, Transformer, Transformer-MoE and every hybrid of them are configurations of this one class
(MoE-Mamba, arXiv 2401.04081, §3).
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from switchmamba.config import apply_overrides, validate
from switchmamba.errors import ConfigError
from switchmamba.layers.feed_forward.moe import MoE
from switchmamba.layers.interface import RouterStats, SequenceInfo
from switchmamba.layers.wrapping import is_plain, is_plain_norm, unwrapped
from switchmamba.models.backbone import Backbone
from switchmamba.models.config import ModelConfig
from switchmamba.models.presets import presets
from switchmamba.models.state import ModelState
from switchmamba.ops.fused_step import fused_step_unavailable, largest_logit_step, linear_step


@dataclass(frozen=True)
class ModelOutput:
    """Result of a forward pass.

    Attributes:
        logits: (B, L, V), of the token after each position.
        state: pass it back to continue, with one token or any chunk.
        router_stats: one per MoE layer, in order.
    """

    logits: Tensor
    state: ModelState
    router_stats: tuple[RouterStats, ...]


class LanguageModel(Backbone):
    """A causal language model from a :class:`ModelConfig`.

    ``train()`` applies the configured expert capacity, ``eval()`` never drops a token. The parameters start by the
    scheme that the configuration names, drawn from torch's global generator.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.initialize()

    @classmethod
    def from_preset(cls, name: str, **overrides: object) -> Self:
        """Build a preset's model in training mode, randomly initialised.

        Args:
            name: one of ``switchmamba.presets``.
            overrides: fields of its ``model`` table, dots as double underscores: ``layers__moe__num_experts=8``.
        """
        dotted = [(key.replace("__", "."), value) for key, value in overrides.items()]
        return cls(validate(ModelConfig, apply_overrides(presets[name]["model"], dotted), source=name))

    def initialize(self) -> None:
        """Fill all parameters by the configured scheme. Norms start as the identity."""
        scheme = self.scheme
        scheme.embedding(self.embedding.weight)
        if not self.config.tie_embeddings:
            scheme.head(self.head.weight)
        for layer in self.iterate_layers():
            layer.initialize(scheme)

    def why_not_capturable(self, dtype: torch.dtype, decoding: bool = False) -> str | None:
        """Say which layer waits for the device, so that no CUDA graph can hold a step; None if none does.

        Args:
            dtype: of the matrix products.
            decoding: of :meth:`decode_` rather than :meth:`forward`.
        """
        wrapped = {unwrapped(module) for module in self.modules() if unwrapped(module) is not module}
        for name, module in self.named_modules():
            if not isinstance(module, MoE):
                continue
            reason = module.why_not_capturable(dtype, decoding and module not in wrapped)
            if reason is not None:
                return f"{name}: {reason}"
        return None

    @property
    def head_weight(self) -> Tensor:
        """(V, D), for a loss that never forms all logits; ConfigError if an adapter adds to it: then call ``head``."""
        if type(self.head) is not nn.Linear:
            raise ConfigError(
                f"the head is wrapped by {type(self.head).__name__}, which its weight alone would leave out; call the "
                "head, or merge the adapter first"
            )
        return self.head.weight

    @property
    def device(self) -> torch.device:
        """Where the model's tokens belong."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights that multiply: of all but those kept in fp32."""
        return self.embedding.weight.dtype

    def forward(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        state: ModelState | None = None,
        observe_routers: bool = True,
        allow_non_causal: bool = False,
    ) -> ModelOutput:
        """Compute the logits of the next token at every position.

        Args:
            tokens: (B, L) int64 in [0, vocab_size).
            document_ids: (B, L) int64, non-decreasing along a row: memory ends where it changes. −1 is
                padding, to the left of a row's first document. None: every row continues the document it is in.
            state: what an earlier call returned; None: nothing came before.
            observe_routers: return the routers' statistics; False saves their time when decoding.
            allow_non_causal: continue from ``state`` although a layer looks ahead and cannot see across the cut.

        Raises ConfigError for tokens, ids or a state of the wrong shape or range (ranges are checked on a CPU only), or
        for a state given to a model that is not causal.
        """
        hidden_BLD, state, router_stats = self.hidden_states(
            tokens, document_ids, state, observe_routers, allow_non_causal=allow_non_causal
        )
        return ModelOutput(self.head(hidden_BLD), state, router_stats)

    def decode_(self, tokens_B: Tensor, state: ModelState, allow_non_causal: bool = False) -> Tensor:
        """Read one more token per row; return the logits (B, V) of the next one, and update ``state`` in place.

        For inference without autograd; it computes what :meth:`forward` does in fewer launches, and no tensor moves:
        a CUDA graph can hold it (:class:`switchmamba.generation.decode_graph.DecodeGraph`).

        Args:
            tokens_B: (B,) int64; the range is not checked.
            state: of B rows, of a model whose state does not grow.
            allow_non_causal: as for :meth:`forward`.
        """
        if not allow_non_causal:
            self._refuse_to_continue()
        x_BD = self._decode_layers_(tokens_B, state)
        if self._has_fused_head(x_BD):
            norm = self.final_norm if self.config.final_norm else None
            logits_BV: Tensor = linear_step(x_BD, self.head.weight, norm)
            return logits_BV
        return self.head(self.final_norm(x_BD))  # type: ignore[no-any-return]

    def decode_greedily_(
        self, tokens_B: Tensor, state: ModelState, chosen_B: Tensor, allow_non_causal: bool = False
    ) -> Tensor:
        """Like :meth:`decode_`, but return the most probable next token of each row, in ``chosen_B`` (B,) int64.

        Ties go to the lower token. On a GPU the logits are never written.
        """
        if not allow_non_causal:
            self._refuse_to_continue()
        x_BD = self._decode_layers_(tokens_B, state)
        if self._has_fused_head(x_BD):
            norm = self.final_norm if self.config.final_norm else None
            largest_logit_step(x_BD, self.head.weight, norm, chosen_B)
            return chosen_B
        torch.argmax(self.head(self.final_norm(x_BD)), -1, out=chosen_B)
        return chosen_B

    def _has_fused_head(self, x_BD: Tensor) -> bool:
        plain = is_plain(self.head) and is_plain_norm(self.final_norm)
        return plain and fused_step_unavailable(x_BD.device, self.head.weight.dtype) is None

    def _decode_layers_(self, tokens_B: Tensor, state: ModelState) -> Tensor:
        """Read one more token per row; return x (B, D) before the final norm."""
        sequence = SequenceInfo(None, None, state.position_B, state.document_id_B, observe_routers=False)
        x_BD: Tensor = self.embedding(tokens_B)
        used = 0
        for step in self.steps():
            own = state.layers[used : used + len(step.branch_names)]
            used += len(own)
            x_BD = step.decode_(x_BD, sequence, own)
        state.position_B.add_(1)
        return x_BD

    def check(
        self, tokens: Tensor, document_ids: Tensor | None = None, state: ModelState | None = None
    ) -> None:
        """Check what the backbone does, and that no adapter wraps one end of a tied weight."""
        if self.config.tie_embeddings and any(
            unwrapped(end) is not end for end in (self.head, self.embedding)
        ):
            raise ConfigError(
                "an adapter wraps the head or the embedding, which share a weight here (tie_embeddings): merging it "
                "would change both; take it out of the adapter's targets"
            )
        super().check(tokens, document_ids, state)
