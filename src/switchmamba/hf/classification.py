"""Sequence classification: the hidden state of a row's last token, and a linear map to the labels."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple

from switchmamba.errors import ConfigError
from switchmamba.hf.cache import SwitchMambaCache
from switchmamba.hf.configuration import SwitchMambaConfig
from switchmamba.hf.modeling import SwitchMambaModel, SwitchMambaPreTrainedModel, routing_loss


class SwitchMambaForSequenceClassification(SwitchMambaPreTrainedModel):
    """The backbone with ``score``, (num_labels, D) without a bias."""

    def __init__(self, config: SwitchMambaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SwitchMambaModel(config)
        self.score = nn.Linear(self.model.backbone.config.d_model, config.num_labels, bias=False)
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
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Classify B sequences; arguments as of :meth:`SwitchMambaModel.forward`.

        The last token is the last one where ``attention_mask`` is 1; without a mask, the last that is not
        ``config.pad_token_id``. Of a row of packed documents it is the last document's, which alone is classified;
        ``document_ids`` have padding on the left only.

        Args:
            labels: (B,) int64, or (B, num_labels) or (B,) float; ``config.problem_type`` says which loss that means. In
                ``train()`` the routers' losses are added to it.
        """
        self._refuse_unknown(kwargs, document_ids)
        position_ids, pad = kwargs.get("position_ids"), self.config.pad_token_id
        text_BL = attention_mask
        if text_BL is None and document_ids is None and input_ids is not None and pad is not None:
            text_BL = _up_to_last(input_ids != pad)
        outputs = self.model(
            input_ids,
            attention_mask
            if position_ids is not None
            else text_BL,  # beside a mask positions are not looked at
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_router_logits,
            document_ids,
            cache_params,
            return_dict=True,
            position_ids=position_ids,
        )
        hidden_BLD = outputs.last_hidden_state
        batch, length = hidden_BLD.shape[:2]
        rows_B = torch.arange(batch, device=hidden_BLD.device)
        last_B = torch.full_like(rows_B, length - 1)
        if text_BL is not None:
            text_BL = text_BL[:, -length:].to(hidden_BLD.device).bool()
            last_B = length - 1 - text_BL.flip(1).int().argmax(1)
        elif batch > 1 and document_ids is None and position_ids is None and pad is None:
            raise ConfigError(
                "a batch of several sequences without attention_mask, and config.pad_token_id is not set: where the "
                "sequences end is unknown; give the mask"
            )
        logits = self.score(hidden_BLD[rows_B, last_B])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
            if self.training and outputs.router_stats:
                stats = tuple(one.to(loss.device) for one in outputs.router_stats)
                loss = loss + routing_loss(stats, self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


def _up_to_last(text_BL: Tensor) -> Tensor:
    """Return a mask that also keeps padding-like tokens in the middle of a text."""
    return (text_BL.int().cumsum(1) > 0) & (text_BL.flip(1).int().cumsum(1).flip(1) > 0)
