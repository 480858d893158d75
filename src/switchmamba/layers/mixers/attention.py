"""Causal multi-head attention with rotary positions (Vaswani et al. 2017; RoPE: Su et al. 2021, arXiv 2104.09864).

    q, k, v = q_proj(x), k_proj(x), v_proj(x)        D → H·P, of k and v D → G·P, without biases
    y       = o_proj(softmax(RoPE(q) RoPE(k)ᵀ / √P) v)

A query sees the keys of its own document at its own and earlier positions. Positions are relative, so none is reset
at a document's start. Without RoPE, as in Jamba, a query knows no positions but what x tells. With G key-value heads
(grouped queries: Ainslie et al. 2023, arXiv 2305.13245) H / G queries share each. S is the number of keys, cached ones
included.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from switchmamba.layers.initialization import Initialization
from switchmamba.layers.interface import Layer, LayerConfig, LayerCost, LayerOutput, LayerState, SequenceInfo

_FOR_ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN, which makes a plan for each new shape: with a cache that grows, milliseconds for every token."""


class AttentionConfig(LayerConfig):
    """Multi-head attention; head_dim = d_model / num_heads must be a whole number, an even one for RoPE.

    ``num_kv_heads``: heads of keys and values; None: as many as of queries. ``rope_base`` None: no rotary positions.
    """

    kind: Literal["attention"] = "attention"
    num_heads: PositiveInt
    num_kv_heads: PositiveInt | None = None
    rope_base: PositiveFloat | None = 10000.0

    def check(self, d_model: int) -> None:  # noqa: D102
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; choose a divisor"
            )
        if self.rope_base is None and d_model % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide d_model={d_model}; choose a divisor"
            )
        if self.rope_base is not None and d_model % (2 * self.num_heads):
            raise ValueError(
                f"num_heads={self.num_heads} does not divide d_model={d_model} into heads of even size; "
                f"choose num_heads so that d_model / num_heads is even"
            )

    @property
    def kv_heads(self) -> int:
        """G, the heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def kv_width(self, d_model: int) -> int:
        """Return G·P, the width of the keys and of the values."""
        return d_model // self.num_heads * self.kv_heads

    def build(self, d_model: int) -> "Attention":  # noqa: D102
        return Attention(self, d_model)

    def cost(self, d_model: int) -> LayerCost:  # noqa: D102
        kv_width = self.kv_width(d_model)
        matrices = 2 * d_model * d_model + 2 * d_model * kv_width
        return LayerCost(
            parameters=matrices,
            active_parameters=matrices,
            flops_per_token=2 * matrices,
            flops_per_token_and_key=4 * d_model,  # q·k and the weighted sum of v
            state_values_per_token=2 * kv_width,
            activation_values=4 * d_model
            + 2 * kv_width,  # x, rotated q and k, v, output, its input to o_proj
        )


@dataclass(frozen=True)
class AttentionState(LayerState):
    """The key-value cache: rotated keys and values (B, G, S, P), and the document of each key (B, S)."""

    grows: ClassVar[bool] = True
    key_BHSP: Tensor
    value_BHSP: Tensor
    document_ids_BS: Tensor

    def reset(self, rows_B: Tensor) -> "AttentionState":
        """Return itself: a query sees only keys of its own document, so a new document forgets by itself."""
        return self


class Attention(Layer):
    """Causal self-attention within documents."""

    state_class = AttentionState

    def __init__(self, config: AttentionConfig, d_model: int) -> None:
        super().__init__()
        self.num_heads, self.rope_base = config.num_heads, config.rope_base
        self.head_dim = d_model // config.num_heads
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, config.kv_width(d_model), bias=False)
        self.v_proj = nn.Linear(d_model, config.kv_width(d_model), bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def initialize(self, scheme: Initialization) -> None:  # noqa: D102
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            scheme.projection(projection.weight, fan_in=projection.in_features)
        scheme.output(self.o_proj.weight, fan_in=self.o_proj.in_features)

    def forward(self, x_BLD: Tensor, sequence: SequenceInfo, state: LayerState | None = None) -> LayerOutput:
        """Map x (B, L, D) to y (B, L, D); the returned state holds all keys and values so far."""
        assert state is None or isinstance(state, AttentionState)
        batch, length, _ = x_BLD.shape
        position_BL = sequence.position_B[:, None] + torch.arange(length, device=x_BLD.device)
        q_BHLP, k_BHSP = self._heads(self.q_proj(x_BLD)), self._heads(self.k_proj(x_BLD))
        if self.rope_base is not None:
            q_BHLP, k_BHSP = (rotate(x_BHLP, position_BL, self.rope_base) for x_BHLP in (q_BHLP, k_BHSP))
        v_BHSP = self._heads(self.v_proj(x_BLD))
        one_document = sequence.document_ids_BL is None
        ids_BL = (
            sequence.document_id_B[:, None].expand(batch, length)
            if one_document
            else sequence.document_ids_BL
        )
        assert ids_BL is not None
        ids_BS = ids_BL
        if state is not None:
            k_BHSP = torch.cat([state.key_BHSP, k_BHSP], dim=2)
            v_BHSP = torch.cat([state.value_BHSP, v_BHSP], dim=2)
            ids_BS = torch.cat([state.document_ids_BS, ids_BL], dim=1)

        shared = k_BHSP.shape[1] < self.num_heads
        if state is None and one_document:
            y_BHLP = F.scaled_dot_product_attention(q_BHLP, k_BHSP, v_BHSP, is_causal=True, enable_gqa=shared)
        else:
            visible_B1LS = (ids_BL[:, :, None] == ids_BS[:, None, :]).tril(ids_BS.shape[1] - length)[:, None]
            with sdpa_kernel(_FOR_ANY_LENGTH):
                y_BHLP = F.scaled_dot_product_attention(
                    q_BHLP, k_BHSP, v_BHSP, attn_mask=visible_B1LS, enable_gqa=shared
                )
        y_BLD = self.o_proj(y_BHLP.transpose(1, 2).flatten(2))
        return LayerOutput(y_BLD, AttentionState(k_BHSP, v_BHSP, ids_BS), ())

    def _heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.view(*x_BLD.shape[:2], -1, self.head_dim).transpose(1, 2)


def rotate(x_BHLP: Tensor, position_BL: Tensor, base: float) -> Tensor:
    """Apply rotary positions: the pair (i, i + P/2) turns by position · base^(−2i/P); angles in fp32."""
    half = x_BHLP.shape[-1] // 2
    dtype = torch.promote_types(x_BHLP.dtype, torch.float32)
    frequency = base ** (-torch.arange(half, device=x_BHLP.device, dtype=dtype) / half)
    angle_B1LP = (position_BL[:, None, :, None].to(dtype)) * frequency
    cos, sin = angle_B1LP.cos().to(x_BHLP.dtype), angle_B1LP.sin().to(x_BHLP.dtype)
    first, second = x_BHLP[..., :half], x_BHLP[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
