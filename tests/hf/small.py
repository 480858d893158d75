"""Small models in both forms with the same weights, and tokens for them."""

import pytest
import torch

pytest.importorskip("transformers")

from switchmamba import LanguageModel
from switchmamba.hf import SwitchMambaConfig, SwitchMambaForCausalLM
from switchmamba.hf.native import to_native

FAMILIES = {
    "mamba": ("mamba-tiny", {"num_blocks": 2}),
    "moe-mamba": ("moe-mamba-tiny", {"num_blocks": 1}),
    "mamba2": ("mamba2-tiny", {"num_blocks": 2}),
    "transformer-moe": ("transformer-moe-tiny", {"num_blocks": 1}),
    "hybrid": (
        "moe-mamba-tiny",
        {
            "num_blocks": 1,
            "pattern": ["mamba", "attention", "moe"],
            "layers__attention": {"kind": "attention", "num_heads": 2},
        },
    ),
}
VOCAB = 61


def config(family: str, **overrides: object) -> SwitchMambaConfig:
    preset, changes = FAMILIES[family]
    return SwitchMambaConfig.from_preset(preset, **{"vocab_size": VOCAB, **changes, **overrides})


def model(family: str = "moe-mamba", seed: int = 0, **overrides: object) -> SwitchMambaForCausalLM:
    """Return a model in ``eval()`` mode whose choices are not all alike."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = SwitchMambaForCausalLM(config(family, **overrides))
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return built.eval()


def native(wrapped: SwitchMambaForCausalLM) -> LanguageModel:
    """Return a native model with the same weights, but of its own."""
    twin = LanguageModel(wrapped.config.native)
    twin.load_state_dict(to_native(wrapped).state_dict())
    return twin.train(wrapped.training)


def tokens(rows: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())
