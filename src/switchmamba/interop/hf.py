"""The package's own Hugging Face classes (``switchmamba.hf``): every model, exactly; config.json, weights, tokenizer.

Whoever loads the folder imports ``switchmamba.hf`` first; no code lies in it.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from switchmamba.hf import SwitchMambaConfig
from switchmamba.hf.native import from_native, hf_name
from switchmamba.interop.conversion import Native, Read, Source, Written
from switchmamba.interop.foreign_weights import Tensors, read_weights
from switchmamba.interop.hugging_face import USAGE, foreign, quietly, unused_rows, write_tokenizer
from switchmamba.models.language_model import LanguageModel

EXACT = 0.0
"""The same layers compute both."""

_USAGE = USAGE.replace(
    "from transformers",
    'import switchmamba.hf  # pip install "switchmamba[hf]"\nfrom transformers',
    1,
)


def export(native: Native, directory: Path) -> Written:
    """Write the folder; it is read back by transformers, and that model compared."""
    end = native.tokenizer.end_of_text_id
    coefficients = native.tables.get("training", {})
    losses: dict[str, Any] = {
        ours: coefficients[theirs]
        for ours, theirs in (
            ("router_aux_loss_coef", "load_balance_coef"),
            ("router_z_coef", "router_z_coef"),
        )
        if theirs in coefficients
    }
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    with quietly():
        from_native(native.model, **special, **losses).save_pretrained(directory)
    write_tokenizer(native.tokenizer, directory)
    return Written(
        foreign("AutoModelForCausalLM", directory, steps_per_layer=1),
        EXACT,
        _USAGE,
        deviations=unused_rows(native),
        front_matter={"library_name": "transformers"},
    )


def import_(source: Source) -> Read:
    """Read a folder of :class:`SwitchMambaForCausalLM`; compared with what transformers makes of it."""
    config = SwitchMambaConfig.from_dict(source.config)
    model = LanguageModel(config.native).eval()
    left = Tensors(read_weights(source.path), source.path)
    found: dict[str, Tensor] = {
        name: left.take(hf_name(name), tuple(parameter.shape)) for name, parameter in model.named_parameters()
    }
    left.finish()
    for name, parameter in model.named_parameters():
        parameter.data = found[name]
    theirs = foreign("AutoModelForCausalLM", source.path, steps_per_layer=1)
    return Read(model, source.tokenizer(), theirs, EXACT)
