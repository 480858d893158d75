"""Tiny models with random weights and a tokenizer trained on a few lines, for tests of generation and evaluation."""

from functools import cache

import torch

from switchmamba import LanguageModel
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.generation.generate import Continuation

TEXTS = (
    "The sea was calm, and the ship lay still.\nNobody spoke.",
    "Ein Käse für 3 €, bitte! 🙂 Vielen Dank — auf Wiedersehen.",
    "def scan(a, b):\n    return [x * y for x, y in zip(a, b)]\n",
    "calm sea, still ship, calm sea, still ship",
)

PRESETS = ("mamba-tiny", "moe-mamba-tiny", "transformer-tiny", "transformer-moe-tiny")


@cache
def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE with a few merges, so that words take several tokens."""
    return Tokenizer.train(TEXTS, vocab_size=280)


def tiny_model(
    preset: str = "moe-mamba-tiny", dtype: torch.dtype = torch.float64, seed: int = 0
) -> LanguageModel:
    """A preset's model with random weights, in eval mode; the head is sharpened so that choices are not all alike."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LanguageModel.from_preset(preset, vocab_size=tiny_tokenizer().vocab_size)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return to_dtype(model, dtype).eval()


def to_dtype(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """Change all parameters, those too that stay in fp32 under ``model.to(bfloat16)``."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def next_logits(model: LanguageModel, continuation: Continuation) -> torch.Tensor:
    """Logits (V,) after all of the row's tokens."""
    with torch.no_grad():
        return model(torch.tensor([[continuation.token]]), state=continuation.state).logits[0, -1]


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
