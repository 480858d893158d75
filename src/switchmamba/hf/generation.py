"""``generate`` with the native state as its cache, and refusals where it would give something else than asked for.

transformers calls the cache of a class whose name contains "mamba" ``cache_params`` and builds one that this model has
no use for; here it is a :class:`SwitchMambaCache` called ``past_key_values``, as everywhere else, so that everything
that goes on from a cache works: continued, chunked, beam search and assisted generation.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import GenerationConfig

from switchmamba.errors import ConfigError
from switchmamba.hf.cache import SwitchMambaCache
from switchmamba.layers.feed_forward.moe import MoE


class SwitchMambaGenerationMixin(GenerationMixin):
    """transformers' ``generate``, with this model's cache."""

    def generate(self, *args: Any, allow_non_causal: bool = False, **kwargs: Any) -> Any:
        """Generate as every transformers model does.

        ``allow_non_causal`` accepts a model whose layers look ahead; its text is not what it learned.

        Raises ConfigError for such a model without it, and for one in training mode whose experts drop tokens.
        """
        backbone = self.base_model.backbone
        if not (backbone.causal or allow_non_causal):
            raise ConfigError(
                f"the model is not causal ({backbone.why_not_causal}); its logits know the tokens that they are to "
                "predict, and token by token it computes something else: allow_non_causal=True accepts that"
            )
        if self.training and any(
            isinstance(m, MoE) and m.capacity_factor is not None for m in self.modules()
        ):
            raise ConfigError(
                "the model is in training mode, where experts drop tokens; call model.eval() first"
            )
        if allow_non_causal:
            kwargs["allow_non_causal"] = True
        return super().generate(*args, **kwargs)

    def generate_batch(self, *_: Any, **__: Any) -> Any:
        """Refuse: transformers' continuous batching is made of pages of keys and values."""
        raise ConfigError(
            "continuous batching (generate_batch, cache_implementation='paged') needs a cache of pages, which a "
            "recurrent state has not; use generate"
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # it has a cache of its own

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> Any:
        if generation_config.is_assistant:
            # transformers takes every pad token for padding, also one that an assistant is given as text.
            return torch.ones(inputs_tensor.shape[:2], dtype=torch.int64, device=inputs_tensor.device)
        return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ConfigError(
                f"cache_implementation={implementation!r} is not for this model, whose state has a fixed size where "
                "it is recurrent and grows where it is keys and values; leave it out"
            )
        given = model_kwargs.pop("cache_params", None)
        if given is not None:
            model_kwargs["past_key_values"] = given
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            cache = model_kwargs["past_key_values"] = SwitchMambaCache()
            if generation_config.is_assistant:
                cache.activate_past_recording()
