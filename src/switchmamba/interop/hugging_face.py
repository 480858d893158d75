"""What transformers' formats have in common: loading a folder to compare with, and the tokenizer beside a model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchmamba.data.tokenizer import END_OF_TEXT, Tokenizer
from switchmamba.errors import CheckpointError
from switchmamba.interop.conversion import Native, Source
from switchmamba.interop.verification import Foreign

TOLERANCE = 2e-5
"""Both in fp32; their sequential scan against ours, through dozens of layers."""

USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50, do_sample=False)[0]))
```"""


def read_config(class_name: str, source: Source) -> Any:
    """Return config.json as transformers reads it, with its defaults; CheckpointError if it does not."""
    with quietly() as transformers:
        try:
            return getattr(transformers, class_name).from_dict(source.config)
        except Exception as error:  # its validation raises classes of several packages
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{source.path / 'config.json'}: transformers refuses it: {reason}"
            ) from None


def write_config(config: dict[str, Any], end_of_text_id: int, directory: Path) -> None:
    """Write config.json; the end of text also begins a text that has no other beginning, and pads."""
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text_id)
    text = json.dumps(config | special | {"dtype": "float32", "torch_dtype": "float32"}, indent=2)
    (directory / "config.json").write_text(text, encoding="utf-8")


def write_weights(tensors: dict[str, Tensor], directory: Path) -> None:
    """Write model.safetensors."""
    from safetensors.torch import save_file

    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, so that AutoTokenizer gives the ids that ours gives.

    Encoding adds no special token.
    """
    tokenizer.save(directory / "tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def unused_rows(native: Native) -> tuple[str, ...]:
    """Return the deviation of a vocabulary that is larger than the tokenizer's."""
    rows = native.model.config.vocab_size - native.tokenizer.vocab_size
    if not rows:
        return ()
    return (
        f"The last {rows} rows of the vocabulary are no tokens. switchmamba never draws them; nothing keeps other "
        "programs from it.",
    )


def foreign(model_class: str, directory: Path, steps_per_layer: int) -> Foreign:
    """Load a folder with transformers, in fp32.

    Args:
        model_class: name of the class in transformers.
        directory: config.json and weights.
        steps_per_layer: how many of our residual steps one of its layers is.

    Raises:
        CheckpointError: a tensor is missing, ignored or of another shape.
    """
    with quietly() as transformers:
        model, loading = getattr(transformers, model_class).from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading.get(what):
            raise CheckpointError(
                f"{directory}: transformers reports {what}: {sorted(map(str, loading[what]))[:3]}"
            )
    model.eval()

    @torch.no_grad()
    def streams(tokens_BL: Tensor) -> dict[int, Tensor]:
        with quietly():
            hidden = model(tokens_BL, output_hidden_states=True, use_cache=False).hidden_states
        # What enters each layer, or with some versions what leaves it; the last one is normed.
        entering = torch.equal(hidden[0], model.get_input_embeddings()(tokens_BL))
        first = -1 if entering else steps_per_layer - 1
        return {first + steps_per_layer * i: x_BLD for i, x_BLD in enumerate(hidden[:-1])}

    @torch.no_grad()
    def logits(tokens_BL: Tensor) -> Tensor:
        with quietly():
            found: Tensor = model(tokens_BL, use_cache=False).logits
        return found

    return Foreign(logits, streams)


@contextmanager
def quietly() -> Iterator[Any]:
    """Yield transformers, without progress bars and advice on kernels; its settings are put back afterwards."""
    import transformers
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
