"""What a Jamba is (Lieber et al. 2024, arXiv 2403.19887), and which of our models are one.

A Jamba layer is two of our steps: a mixer (Mamba, or attention without positions), then a feed-forward (SwiGLU, or
experts of it behind softmax top-k with raw weights), each behind an RMS norm. All layers of a kind have one shape, and
where attention and experts stand is said by a period and an offset. Hugging Face's ``JambaForCausalLM`` and llama.cpp's
architecture ``jamba`` are both of this shape.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from switchmamba.config import validate
from switchmamba.errors import ConfigError
from switchmamba.layers.feed_forward.mlp import MLPConfig
from switchmamba.layers.feed_forward.moe import MoEConfig
from switchmamba.layers.interface import LayerConfig
from switchmamba.layers.mixers.attention import AttentionConfig
from switchmamba.layers.mixers.mamba import MambaConfig
from switchmamba.layers.routing.top_k import TopKRouterConfig
from switchmamba.models.config import ModelConfig

Mixer = Literal["mamba", "attention"]
FeedForward = Literal["mlp", "moe"]

_INITIALISATION = {"dt_min", "dt_max", "dt_init_floor", "capacity_factor"}
"""Fields that say how a layer begins or trains, not what it computes."""

_HEAD_DIMS = (64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class JambaShape:
    """A Jamba.

    Attributes:
        layers: mixer and feed-forward of each layer, without the one that is added.
        adds_attention: no layer has attention, so a layer behind the last one has it, with outputs of 0: the programs
            that run Jamba need one for their caches.
        attention, experts: period and offset of the layers that have them, the added layer included.
        num_experts: 1 without any.
    """

    vocab_size: int
    d_model: int
    layers: tuple[tuple[Mixer, FeedForward], ...]
    adds_attention: bool
    attention: tuple[int, int]
    experts: tuple[int, int]
    d_ff: int
    num_experts: int
    top_k: int
    num_heads: int
    num_kv_heads: int
    expand: int
    d_state: int
    d_conv: int
    dt_rank: int
    norm_eps: float

    @property
    def num_layers(self) -> int:
        """Layers, the added one included."""
        return len(self.layers) + self.adds_attention

    @property
    def all_layers(self) -> tuple[tuple[Mixer, FeedForward], ...]:
        """Mixer and feed-forward of each layer, the added one included."""
        period, offset = self.experts
        last = len(self.layers)
        has_experts = self.num_experts > 1 and last % period == offset
        added: tuple[Mixer, FeedForward] = ("attention", "moe" if has_experts else "mlp")
        return (*self.layers, added) if self.adds_attention else self.layers

    def with_vocabulary(self, vocab_size: int) -> "JambaShape":
        """Return the same with another vocabulary."""
        return replace(self, vocab_size=vocab_size)

    def native(self, source: str) -> ModelConfig:
        """Return the configuration of the native model, its pattern as short as it can be."""
        steps = [name for layer in self.layers for name in layer]
        length = next(n for n in range(2, len(steps) + 1, 2) if steps[:n] * (len(steps) // n) == steps)
        layers: dict[str, dict[str, Any]] = {
            "mamba": {
                "kind": "mamba",
                "expand": self.expand,
                "d_state": self.d_state,
                "d_conv": self.d_conv,
                "dt_rank": self.dt_rank,
                "inner_norm_eps": self.norm_eps,
            },
            "attention": {
                "kind": "attention",
                "num_heads": self.num_heads,
                "num_kv_heads": self.num_kv_heads,
                "rope_base": None,
            },
            "mlp": {"kind": "mlp", "d_ff": self.d_ff, "activation": "swiglu"},
            "moe": {
                "kind": "moe",
                "num_experts": self.num_experts,
                "d_expert": self.d_ff,
                "activation": "swiglu",
                "router": {"kind": "top_k", "top_k": self.top_k, "renormalize": False},
            },
        }
        tables = {
            "vocab_size": self.vocab_size,
            "d_model": self.d_model,
            "num_blocks": len(steps) // length,
            "pattern": steps[:length],
            "layers": {name: layer for name, layer in layers.items() if name in steps},
            "norm": "rmsnorm",
            "norm_eps": self.norm_eps,
        }
        return validate(ModelConfig, tables, source=source)


def jamba_shape(config: ModelConfig) -> JambaShape:
    """Return the Jamba that a native model is.

    Raises:
        ConfigError: it is none; with every reason and what to change.
    """
    reasons: list[str] = []
    if config.norm != "rmsnorm":
        reasons.append(f"model.norm = {config.norm!r}, Jamba has 'rmsnorm'")
    if not config.final_norm:
        reasons.append("model.final_norm = false, Jamba has a final norm")
    layers = _pairs(config, reasons)
    mamba = _the_one([c for c in config.layers.values() if isinstance(c, MambaConfig)], "mamba", reasons)
    attention = _the_one(
        [c for c in config.layers.values() if isinstance(c, AttentionConfig)], "attention", reasons
    )
    moe = _the_one([c for c in config.layers.values() if isinstance(c, MoEConfig)], "moe", reasons)
    mlp = _the_one([c for c in config.layers.values() if isinstance(c, MLPConfig)], "mlp", reasons)
    if mamba is None:
        reasons.append("no mamba layer is in the pattern")
    else:
        reasons += _mamba_reasons(mamba, config)
    if attention is not None and attention.rope_base is not None:
        reasons.append(
            f"attention has rope_base = {attention.rope_base}, Jamba has no positions (rope_base = none)"
        )
    for name, layer in (("moe", moe), ("mlp", mlp)):
        if layer is not None and layer.activation != "swiglu":
            reasons.append(f"{name} has activation = {layer.activation!r}, Jamba has 'swiglu'")
    if moe is not None:
        reasons += _moe_reasons(moe)
    if mlp is not None and moe is not None and mlp.d_ff != moe.d_expert:
        reasons.append(
            f"mlp has d_ff = {mlp.d_ff} and moe d_expert = {moe.d_expert}, Jamba has one width for both"
        )
    attention_at = [i for i, (mixer, _) in enumerate(layers) if mixer == "attention"]
    experts_at = [i for i, (_, feed_forward) in enumerate(layers) if feed_forward == "moe"]
    adds_attention = not attention_at
    periods = {
        "attention": (len(layers) + 1, len(layers)) if adds_attention else _period(attention_at, len(layers)),
        "experts": _period(experts_at, len(layers), spare_last=adds_attention),
    }
    for what, at in periods.items():
        if at is None:
            reasons.append(f"{what} do not stand at a fixed period in the pattern, as Jamba's do")
    if reasons:
        raise ConfigError(
            f"the model is no Jamba: {'; '.join(reasons)}. Train the preset jamba-compat for this format; "
            "--to hf exports every model"
        )
    assert mamba is not None and periods["attention"] is not None and periods["experts"] is not None
    heads = _plain_heads(config.d_model) if attention is None else (attention.num_heads, attention.kv_heads)
    return JambaShape(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        layers=tuple(layers),
        adds_attention=adds_attention,
        attention=periods["attention"],
        experts=periods["experts"],
        d_ff=moe.d_expert if moe is not None else _width(mlp),
        num_experts=1 if moe is None else moe.num_experts,
        top_k=1 if moe is None else int(moe.router.experts_per_token),
        num_heads=heads[0],
        num_kv_heads=heads[1],
        expand=int(mamba.expand),
        d_state=mamba.d_state,
        d_conv=mamba.d_conv,
        dt_rank=mamba.rank(config.d_model),
        norm_eps=config.norm_eps,
    )


def _width(mlp: MLPConfig | None) -> int:
    assert mlp is not None  # every layer has a feed-forward
    return mlp.d_ff


def _pairs(config: ModelConfig, reasons: list[str]) -> list[tuple[Mixer, FeedForward]]:
    """Return mixer and feed-forward of each layer; none if the steps are not such pairs."""
    kinds = [[config.layers[name].kind for name in step] for step in config.steps]
    if any(len(step) > 1 for step in kinds):
        reasons.append("layers stand side by side in one step, Jamba's follow each other")
        return []
    flat: list[Any] = [step[0] for step in kinds]
    for kind in dict.fromkeys(flat):
        if kind not in ("mamba", "attention", "mlp", "moe"):
            reasons.append(f"a layer is kind = {kind!r}, Jamba's are mamba, attention, mlp and moe")
    pairs = list(zip(flat[::2], flat[1::2], strict=False))
    fits = all(mixer in ("mamba", "attention") and ff in ("mlp", "moe") for mixer, ff in pairs)
    if len(flat) % 2 or not fits:
        reasons.append(
            f"the pattern is {config.written_pattern}, Jamba's is a mixer and a feed-forward in turn"
        )
        return []
    return pairs


_Layer = TypeVar("_Layer", bound=LayerConfig)


def _the_one(configs: list[_Layer], kind: str, reasons: list[str]) -> _Layer | None:
    """Return the configuration that all layers of a kind share; None if there is no such layer."""
    shapes = [config.model_dump(exclude=_INITIALISATION) for config in configs]
    different = sorted({key for shape in shapes for key in shape if shape[key] != shapes[0][key]})
    if different:
        reasons.append(f"layers of kind {kind} differ in {', '.join(different)}, Jamba's are all alike")
    return configs[0] if configs else None


def _mamba_reasons(mamba: MambaConfig, config: ModelConfig) -> list[str]:
    reasons = []
    if mamba.inner_norm_eps is None:
        reasons.append(f"mamba has no norms on Δ, B and C, Jamba has (inner_norm_eps = {config.norm_eps:g})")
    elif mamba.inner_norm_eps != config.norm_eps:
        reasons.append(
            f"mamba has inner_norm_eps = {mamba.inner_norm_eps:g} and the model norm_eps = {config.norm_eps:g}, "
            "Jamba has one eps for both"
        )
    if mamba.expand.denominator != 1:
        reasons.append(f"mamba has expand = {mamba.expand}, Jamba's is a whole number")
    return reasons


def _moe_reasons(moe: MoEConfig) -> list[str]:
    router, reasons = moe.router, []
    if not isinstance(router, TopKRouterConfig):
        reasons.append(f"moe has router.kind = {router.kind!r}, Jamba has 'top_k'")
    else:
        if router.temperature != 1:
            reasons.append(f"moe has router.temperature = {router.temperature:g}, Jamba has 1")
        if router.top_k > 1 and router.renormalize:
            reasons.append("moe has router.renormalize = true at top_k > 1, Jamba has raw weights")
    if moe.num_shared_experts:
        reasons.append(f"moe has num_shared_experts = {moe.num_shared_experts}, Jamba has none")
    if moe.num_experts == 1:
        reasons.append("moe has num_experts = 1, which is an mlp to Jamba; make it one")
    return reasons


def _period(at: list[int], count: int, spare_last: bool = False) -> tuple[int, int] | None:
    """Return the period and offset whose positions below ``count`` are ``at``; None if there is no such period.

    ``spare_last``: rather one that leaves out position ``count`` too.
    """
    if not at:
        return count + 2, count + 1
    fitting = [
        (period, at[0])
        for period in range(1, count + 2)
        if at[0] < period and [i for i in range(count) if i % period == at[0]] == at
    ]
    if spare_last:
        fitting.sort(key=lambda found: count % found[0] == found[1])
    return fitting[0] if fitting else None


def _plain_heads(d_model: int) -> tuple[int, int]:
    """Return the heads of an attention layer that does nothing: of a usual width, and one of keys."""
    return d_model // next(size for size in _HEAD_DIMS if d_model % size == 0), 1
