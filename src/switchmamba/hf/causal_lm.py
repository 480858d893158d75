"""The language model: the base model and a head, with a loss and ``generate``."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from switchmamba.data.sampler import IGNORE_INDEX
from switchmamba.hf.cache import SwitchMambaCache
from switchmamba.hf.configuration import SwitchMambaConfig
from switchmamba.hf.generation import SwitchMambaGenerationMixin
from switchmamba.hf.modeling import SwitchMambaModel, SwitchMambaPreTrainedModel, routing_loss
from switchmamba.training.losses import mean_load_balance_loss


@dataclass
class SwitchMambaCausalLMOutput(MoeCausalLMOutputWithPast):
    """Logits (B, L, V) and more; ``aux_loss`` is the mean load-balance loss, 1 where routing is uniform."""

    @property
    def cache_params(self) -> SwitchMambaCache | None:
        """The cache under the name that other state-space models give it."""
        return self.past_key_values


class SwitchMambaForCausalLM(SwitchMambaPreTrainedModel, SwitchMambaGenerationMixin):
    """A language model: the backbone and a head, which is the embedding's weight if the configuration ties them."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.backbone.embedding.weight"}

    def __init__(self, config: SwitchMambaConfig) -> None:
        super().__init__(config)
        self.model = SwitchMambaModel(config)
        self.lm_head = nn.Linear(
            self.model.backbone.config.d_model, self.model.backbone.config.vocab_size, bias=False
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SwitchMambaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        document_ids: Tensor | None = None,
        cache_params: SwitchMambaCache | None = None,
        logits_to_keep: int | Tensor = 0,
        allow_non_causal: bool = False,
        **kwargs: Any,
    ) -> SwitchMambaCausalLMOutput:
        """Compute the logits of the next token at every position; arguments as of :meth:`SwitchMambaModel.forward`.

        Args:
            labels: (B, L) int64, the tokens themselves (they are shifted here), −100 where none counts. The loss is the
                mean cross-entropy in nats. In ``train()``, and wherever ``output_router_logits`` is asked for, the
                routers' losses are added to it: ``router_aux_loss_coef`` · ``aux_loss`` and ``router_z_coef`` · z-loss.
            logits_to_keep: only the last so many positions (0: all), those of an index (K,) or (B, K), or of a mask
                (B, L), which joins the rows.
            kwargs: as of the base model; ``num_items_in_batch`` and ``shift_labels`` are the Trainer's.
        """
        self._refuse_unknown(kwargs, document_ids)
        wants_logits = (
            self.config.output_router_logits if output_router_logits is None else output_router_logits
        )
        outputs = self.model(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            wants_logits,
            document_ids,
            cache_params,
            allow_non_causal,
            return_dict=True,
            position_ids=kwargs.get("position_ids"),
        )
        logits = self.lm_head(_kept(outputs.last_hidden_state, logits_to_keep))
        # The layers may stand on several devices.
        stats = tuple(one.to(logits.device) for one in outputs.router_stats)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            if stats and (self.training or wants_logits):
                loss = loss + _share_of_batch(labels, **kwargs) * routing_loss(stats, self.config)
        return SwitchMambaCausalLMOutput(
            loss=loss,
            aux_loss=mean_load_balance_loss(stats) if stats else None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits,
        )


def _kept(hidden_BLD: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Return the positions that ``logits_to_keep`` names."""
    if isinstance(logits_to_keep, int):
        return hidden_BLD[:, -logits_to_keep:]
    if logits_to_keep.dtype == torch.bool:
        return hidden_BLD[logits_to_keep]
    if logits_to_keep.dim() == 2:
        return hidden_BLD.take_along_dim(logits_to_keep[..., None], dim=1)
    return hidden_BLD[:, logits_to_keep]


def _share_of_batch(
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor | float:
    """Return which part of a batch's targets are in this piece of it, where transformers accumulates gradients.

    The cross-entropy is then a sum over ``num_items_in_batch``, and the pieces' routing losses shall be a mean.
    """
    if num_items_in_batch is None:
        return 1.0
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    return (targets != IGNORE_INDEX).sum() / num_items_in_batch
