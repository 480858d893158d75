"""Our byte-level BPE as llama.cpp's: the tokenizer model ``gpt2`` with GPT-2's way of splitting words.

llama.cpp knows pre-tokenizers by name and has no other way to be told. ``gpt-2`` is the one of a plain ByteLevel
pre-tokenizer, which tokenizers trained here have; any other is refused, since the tokens would differ silently.
"""

import json
from typing import Any

from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import ConfigError


def check_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tables of tokenizer.json; ConfigError for one that llama.cpp would not split alike."""
    tables: dict[str, Any] = json.loads(tokenizer.content)
    splitter, reasons = tables.get("pre_tokenizer") or {}, []
    plain = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
    if not plain or splitter.get("add_prefix_space"):
        reasons.append("its pre_tokenizer is not a plain ByteLevel one, which llama.cpp calls gpt-2")
    if tables.get("normalizer"):
        reasons.append(f"it has the normalizer {tables['normalizer'].get('type')}, which gpt-2 has not")
    if tables["model"].get("ignore_merges"):
        reasons.append("ignore_merges is set, which gpt-2 has not")
    if reasons:
        raise ConfigError(f"the tokenizer cannot be written as GGUF: {'; '.join(reasons)}")
    return tables


def add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    """Add tokens, their types, merges and special tokens to a GGUFWriter; ids without a token are unused."""
    import gguf

    tables = check_tokenizer(tokenizer)
    tokens = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    types = [gguf.TokenType.UNUSED] * tokenizer.vocab_size
    for token, i in tables["model"]["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for added in tables.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tables["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in types])
    writer.add_token_merges(merges)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(tokenizer.end_of_text_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
