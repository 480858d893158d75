"""The language model: embedding → residual steps → (norm) → head.

Mamba, MoE-Mamba, Transformer, Transformer-MoE and every hybrid of them are configurations of this one class
(MoE-Mamba, arXiv 2401.04081, §3).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from switchmamba.config import apply_overrides, validate
from switchmamba.errors import ConfigError
from switchmamba.layers.feed_forward.moe import MoE
from switchmamba.layers.initialization import SCHEMES
from switchmamba.layers.interface import Layer, RouterStats, SequenceInfo
from switchmamba.layers.wrapping import is_plain, is_plain_norm, unwrapped
from switchmamba.models.blocks import ResidualStep, build_norm
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


class HiddenStates(NamedTuple):
    """The same before the head: ``hidden`` (B, L, D)."""

    hidden: Tensor
    state: ModelState
    router_stats: tuple[RouterStats, ...]


class LanguageModel(nn.Module):
    """A causal language model from a :class:`ModelConfig`.

    ``train()`` applies the configured expert capacity, ``eval()`` never drops a token. The parameters start by the
    scheme that the configuration names, drawn from torch's global generator.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(ResidualStep(config, branches) for branches in config.steps)
        self.final_norm = build_norm(config) if config.final_norm else nn.Identity()
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
        scheme = SCHEMES[self.config.initialization](num_residual_steps=len(self.layers))
        scheme.embedding(self.embedding.weight)
        if not self.config.tie_embeddings:
            scheme.head(self.head.weight)
        for layer in self.iterate_layers():
            layer.initialize(scheme)

    def steps(self) -> Iterator[ResidualStep]:
        """Iterate over the residual steps in order."""
        for step in self.layers:
            assert isinstance(step, ResidualStep)
            yield step

    def iterate_layers(self) -> Iterator[Layer]:
        """Iterate over the layers in order, parallel branches one after the other."""
        for step in self.steps():
            yield from step.branches()

    @property
    def causal(self) -> bool:
        """No logit depends on a later token."""
        return all(layer.causal for layer in self.iterate_layers())

    @property
    def why_not_causal(self) -> str | None:
        """Which layer looks ahead, and how; None of a causal model."""
        layers = ((i, name) for i, step in enumerate(self.steps()) for name in step.branch_names)
        for (i, name), layer in zip(layers, self.iterate_layers(), strict=True):
            if not layer.causal:
                return f"layers.{i}.{name}: {layer.why_not_causal}"
        return None

    @property
    def batch_invariant(self) -> bool:
        """In ``eval()`` no logit depends on the other rows of the batch."""
        return all(layer.batch_invariant for layer in self.iterate_layers())

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

    def hidden_states(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        state: ModelState | None = None,
        observe_routers: bool = True,
        recompute: bool = False,
        allow_non_causal: bool = False,
    ) -> HiddenStates:
        """Like :meth:`forward`, without the head. ``recompute`` keeps only each step's input for the backward pass."""
        self._check(tokens, document_ids, state)
        if state is not None and not allow_non_causal:
            self._refuse_to_continue()
        sequence, state = self._begin(tokens, document_ids, state, observe_routers)
        # The residual stream is x + branch: the last branch is added by the norm of the step behind it.
        x_BLD, branch_BLD = self.embedding(tokens), None
        new_states, router_stats, used = [], [], 0
        for step in self.steps():
            own = state.layers[used : used + len(step.branch_names)]
            used += len(own)
            if recompute:
                x_BLD = x_BLD if branch_BLD is None else x_BLD + branch_BLD
                x_BLD, branch_BLD, states, stats = checkpoint(
                    step, x_BLD, None, sequence, own, use_reentrant=False
                )
            else:
                x_BLD, branch_BLD, states, stats = step(x_BLD, branch_BLD, sequence, own)
            new_states.extend(states)
            router_stats.extend(stats)
        x_BLD = x_BLD if branch_BLD is None else x_BLD + branch_BLD
        end_B = sequence.document_id_B if document_ids is None else document_ids[:, -1]
        new_state = ModelState(tuple(new_states), state.position_B + tokens.shape[1], end_B)
        return HiddenStates(self.final_norm(x_BLD), new_state, tuple(router_stats))

    @property
    def state_grows(self) -> bool:
        """The state's size grows with the tokens seen; then there is no :meth:`decode_`."""
        return any(c is not None and c.grows for c in (layer.state_class for layer in self.iterate_layers()))

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

    def state_from_tensors(self, tensors: dict[str, Tensor]) -> ModelState:
        """Rebuild a state of this model from :meth:`ModelState.tensors`; KeyError names what is missing."""
        return ModelState.from_tensors(tensors, [layer.state_class for layer in self.iterate_layers()])

    def _begin(
        self,
        tokens_BL: Tensor,
        document_ids_BL: Tensor | None,
        state: ModelState | None,
        observe_routers: bool = True,
    ) -> tuple[SequenceInfo, ModelState]:
        """Describe the chunk, and reset the rows of the state whose document does not go on in it."""
        if state is None:
            zeros_B = torch.zeros(tokens_BL.shape[0], dtype=torch.int64, device=tokens_BL.device)
            state = ModelState(
                (None,) * sum(len(step.branch_names) for step in self.steps()), zeros_B, zeros_B
            )
        elif document_ids_BL is not None:
            state = state.reset(document_ids_BL[:, 0] != state.document_id_B)
        padding_BL = None if document_ids_BL is None else document_ids_BL < 0
        sequence = SequenceInfo(
            document_ids_BL, padding_BL, state.position_B, state.document_id_B, observe_routers
        )
        return sequence, state

    def _refuse_to_continue(self) -> None:
        if not self.causal:
            raise ConfigError(
                f"the model is not causal ({self.why_not_causal}); what it read before cannot be read together with "
                "what follows: give it whole sequences without a state, or accept that with allow_non_causal"
            )

    def _check(self, tokens: Tensor, document_ids: Tensor | None, state: ModelState | None) -> None:
        if self.config.tie_embeddings and any(
            unwrapped(end) is not end for end in (self.head, self.embedding)
        ):
            raise ConfigError(
                "an adapter wraps the head or the embedding, which share a weight here (tie_embeddings): merging it "
                "would change both; take it out of the adapter's targets"
            )
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
            raise ConfigError(
                f"tokens must be (B, L) int64 with L ≥ 1, got {tuple(tokens.shape)} {tokens.dtype}"
            )
        if document_ids is not None and document_ids.shape != tokens.shape:
            raise ConfigError(
                f"document_ids must be of tokens' shape {tuple(tokens.shape)}, got {tuple(document_ids.shape)}"
            )
        if state is not None and not isinstance(state, ModelState):
            raise ConfigError(
                f"state must be the .state of an earlier output, or None, got {type(state).__name__}"
            )
        if state is not None and state.position_B.shape[0] != tokens.shape[0]:
            raise ConfigError(
                f"state holds {state.position_B.shape[0]} rows, tokens {tokens.shape[0]}; select its rows"
            )
        if tokens.device.type != "cpu":
            return  # reading values would make the host wait for the device
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ConfigError(f"token id {low if low < 0 else high} is outside [0, {self.config.vocab_size})")
        if document_ids is not None and bool(
            (document_ids.diff(dim=1) < 0).any() or (document_ids < -1).any()
        ):
            raise ConfigError("document_ids must not decrease along a row and start at -1 (padding) or above")
