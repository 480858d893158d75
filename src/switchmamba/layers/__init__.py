"""Layers: one interface (:mod:`~switchmamba.layers.interface`), one file each, joined to the union by one line."""

from typing import Annotated

from pydantic import Field

from switchmamba.layers.feed_forward.mlp import MLPConfig
from switchmamba.layers.feed_forward.moe import MoEConfig
from switchmamba.layers.mixers.attention import AttentionConfig
from switchmamba.layers.mixers.inner_moe_mamba import InnerMoEMambaConfig
from switchmamba.layers.mixers.mamba import MambaConfig
from switchmamba.layers.mixers.mamba2 import Mamba2Config

AnyLayerConfig = Annotated[
    MambaConfig | InnerMoEMambaConfig | Mamba2Config | AttentionConfig | MLPConfig | MoEConfig,
    Field(discriminator="kind"),
]
"""Union of all layer configurations, told apart by ``kind``."""
