"""The backbone: embedding → residual steps → (norm), from tokens to hidden states, without the head.

:class:`~switchmamba.models.language_model.LanguageModel` is one with a head; the Hugging Face classes wrap one.
"""

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from switchmamba.errors import ConfigError
from switchmamba.layers.initialization import SCHEMES, Initialization
from switchmamba.layers.interface import Layer, RouterStats, SequenceInfo
from switchmamba.models.blocks import ResidualStep, build_norm
from switchmamba.models.config import ModelConfig
from switchmamba.models.state import ModelState


class HiddenStates(NamedTuple):
    """What the head reads.

    Attributes:
        hidden: (B, L, D), behind the final norm.
        state: pass it back to continue, with one token or any chunk.
        router_stats: one per MoE layer, in order.
    """

    hidden: Tensor
    state: ModelState
    router_stats: tuple[RouterStats, ...]


class Backbone(nn.Module):
    """Embedding, residual steps and final norm of a :class:`ModelConfig`; the parameters are not filled yet.

    Class attribute ``step_class``: of the residual steps.
    """

    step_class: ClassVar[type[ResidualStep]] = ResidualStep

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(self.step_class(config, branches) for branches in config.steps)
        self.final_norm = build_norm(config) if config.final_norm else nn.Identity()

    @property
    def scheme(self) -> Initialization:
        """How the configuration fills parameters. Norms start as the identity."""
        return SCHEMES[self.config.initialization](num_residual_steps=len(self.layers))

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

    @property
    def state_grows(self) -> bool:
        """The state's size grows with the tokens seen."""
        return any(c is not None and c.grows for c in (layer.state_class for layer in self.iterate_layers()))

    def state_from_tensors(self, tensors: dict[str, Tensor]) -> ModelState:
        """Rebuild a state of this model from :meth:`ModelState.tensors`; KeyError names what is missing."""
        return ModelState.from_tensors(tensors, [layer.state_class for layer in self.iterate_layers()])

    def hidden_states(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        state: ModelState | None = None,
        observe_routers: bool = True,
        recompute: bool = False,
        allow_non_causal: bool = False,
    ) -> HiddenStates:
        """Read tokens (B, L) int64; the arguments are those of :meth:`LanguageModel.forward`.

        ``recompute`` keeps only each step's input for the backward pass.
        """
        self.check(tokens, document_ids, state)
        if state is not None and not allow_non_causal:
            self._refuse_to_continue()
        sequence, state = self._begin(tokens, document_ids, state, observe_routers)
        return self._read(self.embedding(tokens), sequence, state, recompute)

    def read_embedded(
        self,
        embedded: Tensor,
        document_ids: Tensor | None = None,
        padding: Tensor | None = None,
        state: ModelState | None = None,
        residuals: list[Tensor] | None = None,
        observe_routers: bool = True,
    ) -> HiddenStates:
        """Read vectors (B, L, D) in the embedding's place; nothing is checked.

        Args:
            embedded: for example ``self.embedding(tokens)``.
            document_ids: (B, L) int64, non-decreasing along a row.
            padding: (B, L) bool, what routers do not see; None: where ``document_ids`` is negative.
            state: what an earlier call returned.
            residuals: a list that gets the residual stream (B, L, D) before each step, which is then its only input.
            observe_routers: return the routers' statistics.
        """
        sequence, state = self._begin(embedded[..., 0], document_ids, state, observe_routers, padding)
        return self._read(embedded, sequence, state, recompute=False, residuals=residuals)

    def _read(
        self,
        x_BLD: Tensor,
        sequence: SequenceInfo,
        state: ModelState,
        recompute: bool,
        residuals: list[Tensor] | None = None,
    ) -> HiddenStates:
        length = x_BLD.shape[1]
        # The residual stream is x + branch: the last branch is added by the norm of the step behind it.
        branch_BLD: Tensor | None = None
        new_states, router_stats, used = [], [], 0
        for step in self.steps():
            own = state.layers[used : used + len(step.branch_names)]
            used += len(own)
            if recompute or residuals is not None:
                x_BLD, branch_BLD = (x_BLD if branch_BLD is None else x_BLD + branch_BLD), None
            if residuals is not None:
                residuals.append(x_BLD)
            if recompute:
                x_BLD, branch_BLD, states, stats = checkpoint(
                    step, x_BLD, None, sequence, own, use_reentrant=False
                )
            else:
                x_BLD, branch_BLD, states, stats = step(x_BLD, branch_BLD, sequence, own)
            new_states.extend(states)
            router_stats.extend(stats)
        x_BLD = x_BLD if branch_BLD is None else x_BLD + branch_BLD
        ids_BL = sequence.document_ids_BL
        end_B = sequence.document_id_B if ids_BL is None else ids_BL[:, -1]
        new_state = ModelState(tuple(new_states), state.position_B + length, end_B)
        return HiddenStates(self.final_norm(x_BLD), new_state, tuple(router_stats))

    def _begin(
        self,
        tokens_BL: Tensor,
        document_ids_BL: Tensor | None,
        state: ModelState | None,
        observe_routers: bool = True,
        padding_BL: Tensor | None = None,
    ) -> tuple[SequenceInfo, ModelState]:
        """Describe the chunk, and reset the rows of the state whose document does not go on in it."""
        if state is None:
            zeros_B = torch.zeros(tokens_BL.shape[0], dtype=torch.int64, device=tokens_BL.device)
            state = ModelState(
                (None,) * sum(len(step.branch_names) for step in self.steps()), zeros_B, zeros_B
            )
        elif document_ids_BL is not None:
            state = state.reset(document_ids_BL[:, 0] != state.document_id_B)
        if padding_BL is None and document_ids_BL is not None:
            padding_BL = document_ids_BL < 0
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

    def check(
        self, tokens: Tensor, document_ids: Tensor | None = None, state: ModelState | None = None
    ) -> None:
        """Raise ConfigError for tokens, ids or a state of the wrong shape; on a CPU, also out of range."""
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
            raise ConfigError(
                f"tokens must be (B, L) int64 with L ≥ 1, got {tuple(tokens.shape)} {tokens.dtype}"
            )
        if document_ids is not None:
            check_document_ids(document_ids, tokens.shape)
        if state is not None and not isinstance(state, ModelState):
            raise ConfigError(
                f"state must be the .state of an earlier output, or None, got {type(state).__name__}"
            )
        if state is not None and state.position_B.shape[0] != tokens.shape[0]:
            raise ConfigError(
                f"state holds {state.position_B.shape[0]} rows, tokens {tokens.shape[0]}; select its rows"
            )
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return  # reading values would make the host wait for the device, and break a graph
        low, high = (int(bound) for bound in tokens.aminmax())
        entries = self.embedding.weight.shape[0]
        if low < 0 or high >= entries:
            raise ConfigError(f"token id {low if low < 0 else high} is outside [0, {entries})")


def check_document_ids(document_ids: Tensor, shape: torch.Size | tuple[int, int]) -> None:
    """Raise ConfigError for ids that are not of the tokens' ``shape`` (B, L); on a CPU, also out of order."""
    if document_ids.shape != shape:
        raise ConfigError(
            f"document_ids must be of tokens' shape {tuple(shape)}, got {tuple(document_ids.shape)}"
        )
    if document_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool((document_ids.diff(dim=1) < 0).any() or (document_ids < -1).any()):
        raise ConfigError("document_ids must not decrease along a row and start at -1 (padding) or above")
