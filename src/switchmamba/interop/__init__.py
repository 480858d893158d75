"""Other programs' formats: models go out and come in, and their logits are compared on the way.

A format is a file here and a line in :data:`FORMATS`. Its module has ``export(native, directory) -> Written``, or
``import_(source) -> Read``, or both (the types are in ``conversion``); what is common to all formats (loading,
comparing, the model card, writing whole or not at all) is done once, in ``conversion``.
docs/decisions/0010-interop-is-a-room.md says why this is no part of ``models``.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from switchmamba.config import nearest
from switchmamba.errors import ConfigError
from switchmamba.extras import require

__all__ = ["FORMATS", "Format", "format_named", "guess_format"]


@dataclass(frozen=True)
class Format:
    """A format: its name, its module here, which ways it goes, and the extra that it needs."""

    name: str
    module: str
    exports: bool
    imports: bool
    extra: str | None
    summary: str

    def function(self, name: str) -> Callable[..., Any]:
        """Return ``export`` or ``import_`` of the format's module; ConfigError names the extra that is missing."""
        if self.extra is not None:
            require(PACKAGES[self.extra], self.extra, f"the format {self.name}")
        function: Callable[..., Any] = getattr(
            importlib.import_module(f"switchmamba.interop.{self.module}"), name
        )
        return function


PACKAGES = {"hf": "transformers", "gguf": "gguf"}
"""The package of each extra that formats need."""


FORMATS = {
    format.name: format
    for format in (
        # name, module, exports, imports, extra, summary
        Format("gguf", "gguf", True, False, "gguf", "llama.cpp's file: what jamba or mamba can hold"),
        Format("hf", "hf", True, True, "hf", "this package's own Hugging Face classes; every model, exactly"),
        Format("jamba", "jamba", True, True, "hf", "Hugging Face's JambaForCausalLM"),
        Format("mamba", "mamba", True, True, "hf", "Hugging Face's MambaForCausalLM and Mamba2ForCausalLM"),
        Format("state-spaces", "state_spaces", False, True, None, "checkpoints of state-spaces/mamba"),
    )
}


def format_named(name: str, *, importing: bool) -> Format:
    """Return a format that goes the given way; ConfigError has the nearest name."""
    known = [f.name for f in FORMATS.values() if (f.imports if importing else f.exports)]
    if name not in known:
        option = "--from" if importing else "--to"
        raise ConfigError(f"{option} {name!r} is no format here{nearest(name, known)}")
    return FORMATS[name]


def guess_format(config: dict[str, Any]) -> str:
    """Name the format of a foreign ``config.json``; ConfigError if no format here can read it."""
    by_model_type = {"mamba": "mamba", "mamba2": "mamba", "jamba": "jamba", "switchmamba": "hf"}
    model_type = config.get("model_type")
    if model_type in by_model_type:
        return by_model_type[model_type]
    if model_type is None and {"d_model", "n_layer"} <= config.keys():
        return "state-spaces"
    if "model" in config:
        raise ConfigError(
            "it is a native checkpoint already: generate, train --from, export and the rest take it as it is"
        )
    what = f"model_type = {model_type!r}" if model_type else "no model_type, nor d_model and n_layer"
    known = sorted(f.name for f in FORMATS.values() if f.imports)
    raise ConfigError(f"config.json has {what}; what can be imported: {', '.join(known)} (--from names one)")
