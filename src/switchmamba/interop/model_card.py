"""The README.md of an export: what the model is, what it was trained on and how well, and how the export deviates.

Its front matter is the YAML that model hubs read. The licence is the user's decision: it is left as a comment.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchmamba.checkpoint import read_json
from switchmamba.config import Tables
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.interop.verification import Agreement
from switchmamba.models.accounting import Account, account
from switchmamba.models.config import ModelConfig
from switchmamba.models.loading import read_chat_template


@dataclass(frozen=True)
class CardFacts:
    """What is known of a checkpoint.

    Attributes:
        costs: parameters, from the configuration.
        config_sha256: of the checkpoint's config.json as canonical JSON (sorted keys, no spaces).
        step, tokens: of training; None: it was not saved by ``train``.
        context_length: of training.
        data: sha256 of what it was trained on, by name; empty where that is not recorded.
        metrics: the last known values of the run's metrics.jsonl up to that step.
        started_from: the checkpoint whose weights the training started from; None: from none.
        adapted: that training was of an adapter, which is merged.
        chat: it was trained on conversations, and brings their template.
        origin: tables of config.json that say where it came from (``imported_from``, ``upcycled_from``).
    """

    costs: Account
    config_sha256: str
    tokenizer_sha256: str
    vocab_size: int
    step: int | None
    tokens: int | None
    context_length: int | None
    data: Mapping[str, Any]
    metrics: Mapping[str, float]
    started_from: str | None
    adapted: bool
    chat: bool
    origin: Mapping[str, Any]

    @classmethod
    def collect(
        cls, checkpoint: Path, step: int | None, tables: Tables, model: ModelConfig, tokenizer: Tokenizer
    ) -> "CardFacts":
        """Read what stands in a verified checkpoint and in its run."""
        training, data = tables.get("training", {}), tables.get("data", {})
        context_length, batch_size = data.get("context_length"), training.get("batch_size")
        tokens = step * batch_size * context_length if step and batch_size and context_length else None
        record = checkpoint / "training.json"
        return cls(
            costs=account(model),
            config_sha256=hashlib.sha256(
                json.dumps(tables, sort_keys=True, separators=(",", ":")).encode()
            ).hexdigest(),
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            step=step,
            tokens=tokens,
            context_length=context_length,
            data=read_json(record).get("data", {}) if record.is_file() else {},
            metrics=_last_metrics(checkpoint.parent.parent / "metrics.jsonl", step),
            started_from=training.get("initial_checkpoint"),
            adapted=training.get("lora") is not None,
            chat=read_chat_template(checkpoint) is not None,
            origin={name: tables[name] for name in ("imported_from", "upcycled_from") if name in tables},
        )


_METRICS = {
    "loss": "training loss",
    "loss_ema": "training loss, smoothed",
    "validation_loss": "validation loss",
}


def _last_metrics(path: Path, step: int | None) -> dict[str, float]:
    """Return the last value of each metric at or before ``step``."""
    found: dict[str, float] = {}
    if step is None or not path.is_file():
        return found
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a line that was being written when the run was killed
        if line.get("step", step + 1) <= step:
            found |= {name: line[name] for name in _METRICS if line.get(name) is not None}
    return found


def model_card(
    facts: CardFacts,
    name: str,
    format_name: str,
    agreement: Agreement,
    usage: str,
    deviations: Sequence[str],
    front_matter: Mapping[str, str],
) -> str:
    """Return the card as Markdown; ``usage`` says how to load the export, ``front_matter`` adds lines to its YAML."""
    sections = [
        _front_matter(front_matter, format_name),
        f"# {name}",
        f"A language model, exported by switchmamba in the format `{format_name}`.",
        "## Model",
        _table(_model_rows(facts)),
        "## Training",
        _table(_training_rows(facts)) if facts.step is not None else _untrained(facts),
        "## How to load it",
        usage,
        *([_CHAT] if facts.chat else []),
        "## The export",
        f"Before it was written, {agreement.count:,} of its logits were compared with the native model's in fp32: "
        f"relative difference {agreement.relative:.1e} (allowed {agreement.tolerance:.0e}), largest difference "
        f"{agreement.largest:.1e}.",
        _deviations(deviations),
        "## Licence",
        "Not stated: whoever publishes this model chooses one, above and here.",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(extra: Mapping[str, str], format_name: str) -> str:
    lines = [
        "---",
        "# license: choose one",
        "pipeline_tag: text-generation",
        *(f"{key}: {value}" for key, value in extra.items()),
        "tags:",
        *(f"- {tag}" for tag in ("switchmamba", "state-space-model", format_name)),
        "---",
    ]
    return "\n".join(lines)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _model_rows(facts: CardFacts) -> list[tuple[str, str]]:
    costs, config = facts.costs, facts.costs.config
    return [
        ("layers", f"({config.written_pattern}) × {config.num_blocks}, d_model {config.d_model:,}"),
        ("parameters", f"{costs.parameters_with_embeddings:,} with embeddings, {costs.parameters:,} without"),
        (
            "active per token",
            f"{costs.active_parameters_with_embeddings:,} with embeddings, {costs.active_parameters:,} without",
        ),
        (
            "vocabulary",
            f"{config.vocab_size:,} (tokenizer: {facts.vocab_size:,}, sha256 `{facts.tokenizer_sha256}`)",
        ),
        ("configuration", f"sha256 `{facts.config_sha256}`"),
    ]


_CHAT = """It was trained on conversations, and knows them in the form of its chat template, a part of the export:
`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` writes it, llama.cpp reads it from the file."""


def _training_rows(facts: CardFacts) -> list[tuple[str, str]]:
    rows = []
    if facts.started_from is not None:
        how = "an adapter (LoRA), merged" if facts.adapted else "all that is not frozen"
        rows.append(("started from", f"`{Path(facts.started_from).name}`, trained before; below: {how}"))
    rows.append(("steps", f"{facts.step:,}"))
    if facts.tokens is not None:
        rows.append(("tokens", f"{facts.tokens:,}, in sequences of {facts.context_length:,}"))
    rows += [(f"data: {name}", f"`{value}`") for name, value in facts.data.items()]
    rows += [
        (label, f"{facts.metrics[name]:.4f} nats per token")
        for name, label in _METRICS.items()
        if name in facts.metrics
    ]
    return rows


def _untrained(facts: CardFacts) -> str:
    if not facts.origin:
        return "The checkpoint does not say how the model was trained."
    return "The checkpoint was not saved by a training run:\n\n" + "\n".join(
        f"- {name}: `{json.dumps(value)}`" for name, value in facts.origin.items()
    )


def _deviations(deviations: Sequence[str]) -> str:
    if not deviations:
        return "Nothing deviates from the native model."
    return "Deviations from the native model:\n\n" + "\n".join(f"- {sentence}" for sentence in deviations)
