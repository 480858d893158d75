"""A native language model as a Hugging Face one and back; both share the parameters."""

from typing import Any

import torch
from torch import nn

from switchmamba.errors import ConfigError
from switchmamba.hf.causal_lm import SwitchMambaForCausalLM
from switchmamba.hf.configuration import SwitchMambaConfig
from switchmamba.models.language_model import LanguageModel

_BACKBONE, _HEAD, _NATIVE_HEAD = "model.backbone.", "lm_head.", "head."


def hf_name(native: str) -> str:
    """Return the name that a native parameter has in :class:`SwitchMambaForCausalLM`."""
    if native.startswith(_NATIVE_HEAD):
        return _HEAD + native.removeprefix(_NATIVE_HEAD)
    return _BACKBONE + native


def from_native(model: LanguageModel, **config_fields: Any) -> SwitchMambaForCausalLM:
    """Wrap a native model; ``config_fields`` are further fields of its :class:`SwitchMambaConfig`.

    Raises ConfigError for a model that is not a native one.
    """
    if not isinstance(model, LanguageModel):
        raise ConfigError(
            f"from_native takes a switchmamba.LanguageModel, not a {type(model).__name__}; to_native goes the other way"
        )
    config = SwitchMambaConfig.from_native(model.config, **config_fields)
    with torch.device("meta"):
        wrapped = SwitchMambaForCausalLM(config)
    wrapped.load_state_dict({hf_name(name): p for name, p in _parameters(model).items()}, assign=True)
    wrapped.tie_weights()
    return wrapped.train(model.training)


def to_native(model: SwitchMambaForCausalLM) -> LanguageModel:
    """Return the native model of a wrapped one."""
    with torch.device("meta"):
        native = LanguageModel(model.config.native)
    held = _parameters(model)
    native.load_state_dict({name: held[hf_name(name)] for name in _parameters(native)}, assign=True)
    if native.config.tie_embeddings:
        native.head.weight = native.embedding.weight
    return native.train(model.training)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters by name, a tied one by both of its names."""
    return dict(model.named_parameters(remove_duplicate=False))
