"""A model's configuration as Hugging Face stores it: the keys of the native ``model`` table, side by side.

Two keys have the name that transformers itself reads, ``hidden_size`` for d_model and ``tie_word_embeddings`` for
tie_embeddings; the native names work as well. What follows from the table (``num_hidden_layers``, ``layer_types``) is
computed, not stored.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig

from switchmamba.config import apply_overrides, nearest, validate
from switchmamba.errors import ConfigError
from switchmamba.layers.mixers.attention import AttentionConfig
from switchmamba.layers.mixers.inner_moe_mamba import InnerMoEMambaConfig
from switchmamba.layers.mixers.mamba import MambaConfig
from switchmamba.layers.mixers.mamba2 import Mamba2Config
from switchmamba.models.config import ModelConfig
from switchmamba.models.presets import presets

_DEFAULT_PRESET = "moe-mamba-25m"
_RECURRENT = (MambaConfig, InnerMoEMambaConfig, Mamba2Config)


class SwitchMambaConfig(PreTrainedConfig):
    """Configuration of every SwitchMamba model; without ``pattern`` and ``layers`` it is that of moe-mamba-25m.

    Attributes:
        vocab_size, hidden_size, num_blocks, pattern, layers, norm, norm_eps, norm_per_branch, final_norm,
            tie_word_embeddings, initialization: as in :class:`~switchmamba.models.config.ModelConfig`.
        use_cache: return the state, so that generation does not read everything again for every token.
        router_aux_loss_coef: weight of the load-balance loss in training (native: ``training.load_balance_coef``).
        router_z_coef: weight of the routers' z-loss in training.
        output_router_logits: return what every router computed for every token.
    """

    model_type = "switchmamba"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "aux_loss", "router_logits"]
    attribute_map: ClassVar[dict[str, str]] = {
        "d_model": "hidden_size",
        "tie_embeddings": "tie_word_embeddings",
    }

    vocab_size: int | None = None
    hidden_size: int | None = None
    num_blocks: int | None = None
    pattern: list[Any] | None = None
    layers: dict[str, Any] | None = None
    norm: str | None = None
    norm_eps: float | None = None
    norm_per_branch: bool | None = None
    final_norm: bool | None = None
    tie_word_embeddings: bool | None = None
    initialization: str | None = None
    use_cache: bool = True
    router_aux_loss_coef: float = 0.01
    router_z_coef: float = 0.0
    output_router_logits: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what is missing; ConfigError for what is no model. ``kwargs`` are transformers' own fields."""
        if isinstance(kwargs.get("model"), dict):
            raise ConfigError(
                "this is the configuration of a native checkpoint, not of a Hugging Face folder; make one with: "
                "switchmamba export CKPT --to hf --out DIR"
            )
        for native, ours in self.attribute_map.items():
            if native in kwargs:
                setattr(self, ours, kwargs.pop(native))
        given = {name: value for name, value in self._table().items() if value is not None}
        self._set_table(validate(ModelConfig, _default_table(given) | given, source=type(self).__name__))
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """Return the configuration of a preset, its weights of the routers' losses included.

        Args:
            name: one of ``switchmamba.presets``.
            overrides: fields of its ``model`` table, dots as double underscores
                (``layers__moe__num_experts=8``), and fields of this class.
        """
        tables = presets[name]
        training = tables.get("training", {})
        own: dict[str, Any] = {
            "router_aux_loss_coef": training.get("load_balance_coef", 0.01),
            "router_z_coef": training.get("router_z_coef", 0.0),
        }
        native = {theirs: ours for ours, theirs in cls.attribute_map.items()}
        known = {*ModelConfig.model_fields, *native, *(f.name for f in fields(cls)), "num_labels"}
        known.add("num_hidden_layers")
        table_overrides = []
        for key, value in overrides.items():
            first, *rest = key.split("__")
            if first not in known:
                raise ConfigError(f"unknown key {key}{nearest(first, sorted(known))}")
            first = native.get(first, first)
            if first in ModelConfig.model_fields:
                table_overrides.append((".".join([first, *rest]), value))
            else:
                own[key] = value
        table = validate(ModelConfig, apply_overrides(tables["model"], table_overrides), source=name)
        return cls.from_native(table, **own)

    @classmethod
    def from_native(cls, config: ModelConfig, **fields_of_ours: Any) -> Self:
        """Return the configuration of a native model."""
        return cls(**config.model_dump(mode="json"), **fields_of_ours)

    @property
    def native(self) -> ModelConfig:
        """The native configuration, checked anew."""
        return validate(ModelConfig, self._table(), source=type(self).__name__)

    @property
    def num_hidden_layers(self) -> int:
        """Number of residual steps; setting it repeats the pattern as often as that takes."""
        assert self.pattern is not None and self.num_blocks is not None
        return len(self.pattern) * self.num_blocks

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        assert self.pattern is not None
        if value < 1 or value % len(self.pattern):
            raise ConfigError(
                f"num_hidden_layers={value} is not a multiple of the pattern's {len(self.pattern)} steps "
                f"({self.pattern}); choose one that is, or set pattern and num_blocks"
            )
        self.num_blocks = value // len(self.pattern)

    @property
    def layer_types(self) -> list[str]:
        """What each residual step remembers, in transformers' words: a state, keys and values, both, or nothing."""
        native = self.native
        types = []
        for step in native.steps:
            configs = [native.layers[name] for name in step]
            recurrent = any(isinstance(config, _RECURRENT) for config in configs)
            attention = any(isinstance(config, AttentionConfig) for config in configs)
            both = "hybrid" if recurrent else "full_attention"
            types.append(both if attention else "linear_attention" if recurrent else "moe")
        return types

    @property
    def num_attention_heads(self) -> int:
        """Heads of the first attention layer; AttributeError in a model without."""
        for config in self.native.layers.values():
            if isinstance(config, AttentionConfig):
                return config.num_heads
        raise AttributeError("num_attention_heads: the model has no attention layer")

    def _table(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ModelConfig.model_fields}

    def _set_table(self, config: ModelConfig) -> None:
        for name, value in config.model_dump(mode="json").items():
            setattr(self, name, value)


def _default_table(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default preset's table; only its sizes if other layers are given."""
    table: dict[str, Any] = presets[_DEFAULT_PRESET]["model"]
    if "pattern" in given or "layers" in given:
        return {name: table[name] for name in ("vocab_size", "d_model", "num_blocks")}
    return table
