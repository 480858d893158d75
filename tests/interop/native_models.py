"""Native checkpoints to be exported: weights drawn wide, so that every layer and every expert shows in the logits."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from switchmamba.config import apply_overrides, validate
from switchmamba.generation.generate import generate
from switchmamba.generation.settings import SamplingSettings
from switchmamba.models.config import ModelConfig
from switchmamba.models.language_model import LanguageModel
from switchmamba.models.loading import save_model
from switchmamba.models.presets import presets
from tests.interop.foreign_models import tokenizer


def tiny(preset: str = "jamba-compat-tiny", *overrides: tuple[str, Any]) -> LanguageModel:
    """Build a preset's model over the tests' tokenizer, its norms and recurrences disturbed."""
    tables = apply_overrides(presets[preset]["model"], [("vocab_size", tokenizer().vocab_size), *overrides])
    torch.manual_seed(0)
    model = LanguageModel(validate(ModelConfig, tables, source=preset)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "A_log", ".D")):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding | nn.Linear):
                parameter.mul_(2)
    return model


def save(path: Path, model: LanguageModel) -> Path:
    save_model(path, model, tokenizer())
    return path


def greedy(model: LanguageModel, prompt: str, count: int) -> list[int]:
    """Return the tokens that ``generate`` draws at temperature 0, the end of text included where it comes first."""
    result = generate(model, tokenizer(), [prompt], SamplingSettings(temperature=0), max_tokens=count).result
    (completion,) = result.completions
    end = [tokenizer().end_of_text_id] if completion.finish_reason == "end_of_text" else []
    return [*completion.token_ids, *end]
