"""The base model: a wrapper of the native backbone that speaks Hugging Face's language and computes nothing itself.

Parameters are the native ones with ``backbone.`` before their names; behind a head, with ``model.backbone.``.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from switchmamba.checkpoint import aligned
from switchmamba.config import nearest
from switchmamba.errors import ConfigError
from switchmamba.hf.cache import Chunk, SwitchMambaCache
from switchmamba.hf.configuration import SwitchMambaConfig
from switchmamba.hf.documents import Documents, documents
from switchmamba.hf.offloading import load_whole_steps
from switchmamba.layers.initialization import Initialization
from switchmamba.layers.interface import KeepsFloat32, Layer, RouterStats
from switchmamba.layers.routing.linear import LinearRouter
from switchmamba.models.backbone import Backbone
from switchmamba.models.blocks import ResidualStep
from switchmamba.models.state import ModelState
from switchmamba.training.losses import mean_load_balance_loss, mean_z_loss

logger = logging.getLogger("switchmamba")

_FOR_EVERY_MODEL = frozenset(TransformersKwargs.__optional_keys__) | {
    "cache_position",
    "ignore_index",
    "shift_labels",
    "token_type_ids",
}
"""What transformers, its collators, Trainer, tokenizers and ``generate`` hand to whichever model takes keywords."""

_OTHERS_MARKS = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
"""Where packed documents end, as other models are told it."""


@dataclass
class SwitchMambaModelOutput(MoeModelOutputWithPast):
    """Hidden states (B, L, D) and more; ``router_stats`` are the native ones, one per router."""

    router_stats: tuple[RouterStats, ...] | None = None

    @property
    def cache_params(self) -> SwitchMambaCache | None:
        """The cache under the name that other state-space models give it."""
        return self.past_key_values


class SwitchMambaStep(GradientCheckpointingLayer, ResidualStep):
    """A residual step that transformers can checkpoint: in training it keeps only its input."""


class SwitchMambaBackbone(Backbone):
    """The native backbone, of such steps."""

    step_class = SwitchMambaStep


class SwitchMambaPreTrainedModel(PreTrainedModel):
    """What all classes share: loading, dtypes, initialisation."""

    config: SwitchMambaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["SwitchMambaStep"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values", "cache_params"]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, weights aligned; a step whose weights are offloaded is loaded whole."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for parameter in model.parameters():
            parameter.data = aligned(parameter.data)
        load_whole_steps(model)
        return loaded

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        keywords = getattr(gradient_checkpointing_func, "keywords", {})
        if keywords.get("use_reentrant"):
            logger.warning(
                "use_reentrant=True would lose the gradient of the routers' losses; checkpointing with "
                "use_reentrant=False instead"
            )
            gradient_checkpointing_func = partial(
                gradient_checkpointing_func.func, **{**keywords, "use_reentrant": False}
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def _initialize_weights(self, module: nn.Module, *_: Any) -> None:
        # Code outside transformers is taken for code that overwrites what was loaded, and a module without parameters
        # of its own (an attention layer) is passed over. _init_weights does look at the marks.
        super()._initialize_weights(module)

    def _refuse_unknown(self, keywords: Mapping[str, Any], document_ids: Tensor | None) -> None:
        """Raise ConfigError for a keyword of ``forward`` that would be lost without a word, such as a misspelt one.

        Others' marks of packed documents are such too, where none that is read here stands beside them.
        """
        for name, value in keywords.items():
            if value is not None and name not in _FOR_EVERY_MODEL:
                own = [p for p in signature(type(self).forward).parameters if p not in ("self", "kwargs")]
                known = [*own, *sorted(_FOR_EVERY_MODEL.difference(own))]
                raise ConfigError(f"{type(self).__name__} takes no keyword {name}{nearest(name, known)}")
        unread = [name for name in _OTHERS_MARKS if keywords.get(name) is not None]
        if unread and document_ids is None and keywords.get("position_ids") is None:
            raise ConfigError(
                f"{unread[0]} alone does not keep packed documents apart here; give position_ids or document_ids too"
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        scheme = self.base_model.backbone.scheme
        if isinstance(module, Layer):
            _initialize_missing(module, scheme)
        elif isinstance(module, nn.Embedding) and _is_missing(module.weight):
            scheme.embedding(module.weight)
        elif isinstance(module, nn.Linear) and self.base_model is not self and _is_missing(module.weight):
            scheme.head(
                module.weight
            )  # the layers' own projections belong to the base model, and to their layer
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            super()._init_weights(module)


def _is_missing(parameter: Tensor) -> bool:
    """Say whether a parameter did not come from a checkpoint; transformers marks those that did."""
    return not getattr(parameter, "_is_hf_initialized", False)


def _initialize_missing(layer: Layer, scheme: Initialization) -> None:
    """Fill a layer's parameters, which it does all at once, and put back those that came from a checkpoint."""
    if any(map(_is_missing, layer.parameters())):
        loaded = [(p, p.clone()) for p in layer.parameters() if not _is_missing(p)]
        layer.initialize(scheme)
        for parameter, value in loaded:
            parameter.copy_(value)


class SwitchMambaModel(SwitchMambaPreTrainedModel):
    """The native backbone: from tokens to hidden states behind the final norm."""

    def __init__(self, config: SwitchMambaConfig) -> None:
        super().__init__(config)
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            backbone = SwitchMambaBackbone(config.native)
        finally:
            torch.set_default_dtype(dtype)
        # Not built in 16 bits but turned into them, which leaves A_log, D, dt_bias and routers in fp32.
        self.backbone = backbone.to(dtype)
        self._keep_in_fp32_modules_strict = [
            f"backbone.{path}.{name}".replace(".", r"\.")
            for path, module in backbone.named_modules()
            if isinstance(module, KeepsFloat32)
            for name in module.float32_parameters
        ]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.backbone.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        assert isinstance(value, nn.Embedding)
        self.backbone.embedding = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SwitchMambaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        document_ids: Tensor | None = None,
        cache_params: SwitchMambaCache | None = None,
        allow_non_causal: bool = False,
        **kwargs: Any,
    ) -> SwitchMambaModelOutput:
        """Read tokens, after what ``past_key_values`` has read.

        Args:
            input_ids: (B, L) int64; or ``inputs_embeds`` (B, L, D) in their place.
            attention_mask: (B, L) or wider, 0 at padding, which changes nothing wherever it stands. What is returned
                for padding behind text is what its text ended with; for padding before it, nothing to rely on.
            past_key_values: a :class:`SwitchMambaCache`; it is advanced.
            inputs_embeds: see ``input_ids``.
            use_cache: return a cache, by default as configured in ``eval()`` and not in ``train()``.
            output_hidden_states: return the residual stream before every step, and the last hidden state.
            output_router_logits: return (B·L, E) logits of every router, without a gradient.
            document_ids: (B, L), packed documents: memory ends where it changes.
            cache_params: another name of ``past_key_values``.
            allow_non_causal: go on from a cache although a layer looks ahead and cannot see across the cut.
            kwargs: ``position_ids`` (B, L) of packed sequences, each of which begins at a 0; the rest of what
                transformers hands to every model has no effect.

        Raises ConfigError for what cannot be read, and for a keyword that means nothing to any model.
        """
        self._refuse_unknown(kwargs, document_ids)
        config = self.config
        cache = _the_cache(past_key_values, cache_params)
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            input_ids = input_ids.long()
            self.backbone.check(input_ids)
            inputs_embeds = self.backbone.embedding(input_ids)
        assert inputs_embeds is not None
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if use_cache and cache is None:
            cache = SwitchMambaCache()
        if cache is not None and cache.get_seq_length() and not (self.backbone.causal or allow_non_causal):
            raise ConfigError(
                f"the model is not causal ({self.backbone.why_not_causal}); what it read before cannot be read "
                "together with what follows: give it whole sequences, or accept that with allow_non_causal=True"
            )
        state = None if cache is None else self._caught_up(cache)
        read = documents(
            (inputs_embeds.shape[0], inputs_embeds.shape[1]),
            state,
            attention_mask,
            kwargs.get("position_ids"),
            document_ids,
        )
        chunk = Chunk(read.reordered(inputs_embeds), read.ids, read.padding)
        wants_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        checkpointing = (
            self.training
            and torch.is_grad_enabled()
            and any(step.gradient_checkpointing for step in self.backbone.steps())
        )
        residuals: list[Tensor] | None = [] if wants_hidden or checkpointing else None
        with _router_logits(self.backbone, wants_logits) as router_logits:
            hidden, new_state, router_stats = self.backbone.read_embedded(
                chunk.embedded,
                chunk.document_ids,
                chunk.padding,
                state,
                residuals,
                observe_routers=state is None or torch.is_grad_enabled() or bool(wants_logits),
            )
        if cache is not None:
            cache.advance(chunk, state, new_state)
        hidden = read.put_back(hidden)
        return SwitchMambaModelOutput(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*map(read.put_back, residuals or ()), hidden) if wants_hidden else None,
            router_logits=_put_back(router_logits, read) if wants_logits else None,
            router_stats=router_stats,
        )

    def _caught_up(self, cache: SwitchMambaCache) -> ModelState | None:
        """Return the cache's state, after reading what was taken back too far (:meth:`SwitchMambaCache.crop`)."""
        if cache.unread:
            state = cache.state
            for chunk in cache.unread:
                state = self.backbone.read_embedded(
                    chunk.embedded, chunk.document_ids, chunk.padding, state, observe_routers=False
                ).state
            cache.caught_up(state)
        return cache.state


def _the_cache(
    past_key_values: SwitchMambaCache | None, cache_params: SwitchMambaCache | None
) -> SwitchMambaCache | None:
    cache = cache_params if past_key_values is None else past_key_values
    if cache is not None and not isinstance(cache, SwitchMambaCache):
        raise ConfigError(
            f"past_key_values is a {type(cache).__name__}, which cannot hold a recurrent state; give a "
            "SwitchMambaCache, such as the past_key_values of an earlier output"
        )
    return cache


@contextmanager
def _router_logits(backbone: Backbone, wanted: bool) -> Iterator[list[Tensor]]:
    """Collect what each router computes, in order, without a gradient."""
    logits: list[Tensor] = []

    @torch.no_grad()
    def keep(router: LinearRouter, given: tuple[Tensor, ...]) -> None:
        logits.append(router.logits(given[0]))

    routers = [module for module in backbone.modules() if isinstance(module, LinearRouter)]
    hooks = [router.register_forward_pre_hook(keep) for router in routers] if wanted else []
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


def _put_back(logits_TE: Sequence[Tensor], read: Documents) -> tuple[Tensor, ...]:
    """Return every router's logits in the order of the tokens that were given."""
    if read.order is None:
        return tuple(logits_TE)
    return tuple(read.put_back(one.view(*read.order.shape, -1)).flatten(0, 1) for one in logits_TE)


def routing_loss(router_stats: tuple[RouterStats, ...], config: SwitchMambaConfig) -> Tensor:
    """Return the routers' weighted losses, () fp32, as the native trainer adds them to the cross-entropy."""
    loss = config.router_aux_loss_coef * mean_load_balance_loss(router_stats)
    if config.router_z_coef:
        loss = loss + config.router_z_coef * mean_z_loss(router_stats)
    return loss
