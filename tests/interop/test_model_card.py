"""The card of an export says what stands in the checkpoint and its run, and nothing that came after."""

import hashlib
import json
from pathlib import Path

from switchmamba.interop.model_card import CardFacts, model_card
from switchmamba.interop.verification import Agreement
from switchmamba.models.accounting import account
from tests.interop.foreign_models import tokenizer
from tests.interop.native_models import tiny

TABLES = {"data": {"context_length": 16}, "training": {"batch_size": 4}, "model": {"b": 1, "a": [2]}}


def facts(checkpoint: Path, step: int | None, tables: dict = TABLES) -> CardFacts:
    return CardFacts.collect(checkpoint, step, tables, tiny().config, tokenizer())


def written(found: CardFacts) -> str:
    return model_card(
        found, "mine", "jamba", Agreement(1e-7, 2e-6, 300, 2e-5), "USAGE", ["One.", "Two."], {"a": "b"}
    )


def test_counts_and_hashes_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    card, costs = written(facts(tmp_path, None)), account(tiny().config)
    assert f"{costs.parameters_with_embeddings:,} with embeddings, {costs.parameters:,} without" in card
    assert f"{costs.active_parameters_with_embeddings:,} with embeddings" in card
    canonical = '{"data":{"context_length":16},"model":{"a":[2],"b":1},"training":{"batch_size":4}}'
    assert hashlib.sha256(canonical.encode()).hexdigest() in card
    assert tokenizer().sha256 in card


def test_the_front_matter_leaves_the_licence_to_the_user(tmp_path: Path) -> None:
    _, front, _ = written(facts(tmp_path, None)).split("---\n", 2)
    assert front.splitlines() == [
        "# license: choose one",
        "pipeline_tag: text-generation",
        "a: b",
        "tags:",
        "- switchmamba",
        "- state-space-model",
        "- jamba",
    ]


def test_metrics_end_with_the_saved_step_and_a_torn_line_is_skipped(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-2"
    checkpoint.mkdir(parents=True)
    lines = [
        {"step": 1, "loss": 3.0, "loss_ema": 3.0, "validation_loss": 2.75},
        {"step": 2, "loss": 2.5, "loss_ema": 2.6},
        {"step": 3, "loss": 0.5, "loss_ema": 0.6, "validation_loss": 0.7},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 2, "lo'
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    (checkpoint / "training.json").write_text(json.dumps({"data": {"train_sha256": "abc"}}))
    card = written(facts(checkpoint, 2))
    assert "| steps | 2 |" in card
    assert "| tokens | 128, in sequences of 16 |" in card
    assert "| data: train_sha256 | `abc` |" in card
    assert "| training loss | 2.5000 nats per token |" in card
    assert "| validation loss | 2.7500 nats per token |" in card


def test_where_an_untrained_model_comes_from_is_said_and_so_are_deviations(tmp_path: Path) -> None:
    card = written(facts(tmp_path, None, TABLES | {"imported_from": {"path": "theirs"}}))
    assert '- imported_from: `{"path": "theirs"}`' in card
    assert "- One.\n- Two." in card
    assert "does not say how the model was trained" in written(facts(tmp_path, None))


def test_a_fine_tuned_model_says_what_it_started_from_and_that_it_knows_conversations(tmp_path: Path) -> None:
    tuned = TABLES | {"training": {"batch_size": 4, "initial_checkpoint": "runs/base", "lora": {"rank": 2}}}
    card = written(facts(tmp_path, 3, tuned))
    assert "| started from | `base`, trained before; below: an adapter (LoRA), merged |" in card
    assert "apply_chat_template" not in card
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    card = written(facts(tmp_path, 3, TABLES | {"training": {"initial_checkpoint": "runs/base"}}))
    assert "below: all that is not frozen" in card
    assert "apply_chat_template" in card
