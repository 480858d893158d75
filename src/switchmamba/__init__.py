"""MoE-Mamba and its relatives: train, study and serve sparse state-space language models.

    from switchmamba import LanguageModel, load, presets

    model = LanguageModel.from_preset("moe-mamba-tiny")      # presets: a mapping of all names
    out = model(tokens)                                      # out.logits, out.state, out.router_stats
    model, tokenizer = load("runs/mine")                     # a trained checkpoint, in eval() mode

``switchmamba.ops`` has the operations by themselves. Importing the package is cheap: torch
is imported with the first of these names.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from switchmamba.models.language_model import LanguageModel
    from switchmamba.models.loading import load
    from switchmamba.models.presets import presets

__version__ = "0.1.0"
__all__ = ["LanguageModel", "__version__", "load", "presets"]

_HOMES = {
    "LanguageModel": "switchmamba.models.language_model",
    "load": "switchmamba.models.loading",
    "presets": "switchmamba.models.presets",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'switchmamba' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
