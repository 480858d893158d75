"""Data with a mask: its targets alone are learnt from, however a run is cut, and a tiny model learns from them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from switchmamba.config import apply_overrides
from switchmamba.config import validate as checked
from switchmamba.data.index import encode_index, read_index
from switchmamba.data.sampler import IGNORE_INDEX, Batch
from switchmamba.data.shard_writer import SplitWriter
from switchmamba.data.shards import TokenShards
from switchmamba.data.synthetic import InductionHeads, SelectiveCopying, prepare_synthetic
from switchmamba.errors import DataError
from switchmamba.evaluation.perplexity import evaluate
from switchmamba.experiments.curves import centred, read_metrics
from switchmamba.models.language_model import LanguageModel
from switchmamba.models.loading import load
from switchmamba.models.presets import read_tables
from switchmamba.training.config import RunConfig
from switchmamba.training.inputs import Inputs
from switchmamba.training.losses import compute_losses
from switchmamba.training.optimizer import build_optimizer
from switchmamba.training.stop import StopRequest
from switchmamba.training.train_step import train_step
from switchmamba.training.trainer import train
from switchmamba.training.validation import validate
from tests.training.tiny_run import assert_same_run, read_lines, tiny_config

LENGTH = 14  # context of one example: 8 tokens, ">", 4 to answer, the end of text
ONE_EXAMPLE = ("data.context_length", LENGTH)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("masked") / "data"
    task = SelectiveCopying(length=8, data_tokens=4)
    prepare_synthetic(task, out, train_examples=300, validation_examples=20)
    return out


def opened(masked: Path, *overrides: tuple[str, Any]) -> tuple[Any, Inputs, LanguageModel]:
    config = tiny_config(("model.vocab_size", 257), *overrides)
    torch.manual_seed(0)
    return config, Inputs.open(masked, config), LanguageModel(config.model)


def test_the_loss_of_a_step_is_that_of_the_answers_alone(masked: Path) -> None:
    config, inputs, model = opened(
        masked, ONE_EXAMPLE, ("model.layers.moe.capacity_factor", None), ("training.load_balance_coef", 0.0)
    )
    batch = inputs.batch(0, config)
    assert batch.num_targets == 4 * 4
    with torch.no_grad():
        logits = model(batch.tokens_BL, batch.document_ids_BL).logits
    log_p = logits.log_softmax(-1)[:, 8:12]  # at ">" and at the first three answers
    answers = batch.tokens_BL[:, 9:13]
    expected = -log_p.gather(2, answers[..., None]).mean()
    result = train_step(model, build_optimizer(model, config.training), batch, config.training, 1e-3)
    assert result.loss == pytest.approx(float(expected), rel=1e-5)


def test_a_batch_in_which_nothing_counts_has_no_loss_and_the_average_skips_it(
    masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch = Inputs.batch

    def without_targets_at_first_and_third(self: Inputs, step: int, config: RunConfig) -> Batch:
        made = batch(self, step, config)
        return made if step % 2 else replace(made, targets_BL=torch.full_like(made.targets_BL, IGNORE_INDEX))

    monkeypatch.setattr(Inputs, "batch", without_targets_at_first_and_third)
    config = tiny_config(
        ("model.vocab_size", 257), ONE_EXAMPLE, ("training.steps", 4), ("training.log_every", 1)
    )
    with caplog.at_level("INFO", "switchmamba"):
        train(config, masked, tmp_path / "run")
    first, second, third, fourth = read_lines(tmp_path / "run")
    assert first["loss"] is first["loss_ema"] is third["loss"] is None
    assert third["loss_ema"] == second["loss_ema"] == pytest.approx(second["loss"])
    assert min(second["loss"], fourth["loss"]) <= fourth["loss_ema"] <= max(second["loss"], fourth["loss"])
    assert "step 1/4  loss –" in caplog.text
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert np.isfinite(centred(metrics.loss_S, 0.5)).all()


def test_tokens_that_do_not_count_have_no_gradient(masked: Path) -> None:
    config, inputs, model = opened(masked, ONE_EXAMPLE)
    batch = inputs.batch(0, config)
    hidden: list[torch.Tensor] = []

    def keep(_module: object, _arguments: object, output: torch.Tensor) -> None:
        output.retain_grad()
        hidden.append(output)

    handle = model.final_norm.register_forward_hook(keep)
    losses = compute_losses(model, batch.tokens_BL, batch.targets_BL, batch.document_ids_BL, config.training)
    losses.cross_entropy_sum.backward()
    handle.remove()
    counted_BL = batch.targets_BL != IGNORE_INDEX
    norms_BL = hidden[0].grad.norm(dim=-1)
    assert (norms_BL[~counted_BL] == 0).all()
    assert (norms_BL[counted_BL] > 0).all()


def test_micro_batches_with_different_numbers_of_targets_are_one_batch(masked: Path) -> None:
    whole_examples = ("data.context_length", 10)  # windows cut examples: rows have 0 to 4 targets
    gradients = []
    for micro_batch_size in (None, 1, 3):
        config, inputs, model = opened(
            masked,
            whole_examples,
            ("model.layers.moe.capacity_factor", None),
            ("training.load_balance_coef", 0.0),
            ("training.gradient_clip", None),
            ("training.micro_batch_size", micro_batch_size),
        )
        batch = inputs.batch(3, config)
        assert len(set((batch.targets_BL != IGNORE_INDEX).sum(1).tolist())) > 1
        result = train_step(model, build_optimizer(model, config.training), batch, config.training, 0.0)
        gradients.append((result.loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    for loss, gradient in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, gradients[0][1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reset_state", [True, False])
def test_a_stopped_run_on_masked_data_continues_bit_for_bit(
    masked: Path, tmp_path: Path, reset_state: bool
) -> None:
    overrides = (ONE_EXAMPLE, ("data.reset_state", reset_state))

    class Stopping:
        def __init__(self, at: int | None) -> None:
            self.at, self.stop = at, StopRequest()

        def start(self, step: int, steps: int) -> None:
            pass

        def show(self, line: Any) -> None:
            self.stop.requested = line["step"] == self.at

    for out, ends in (("whole", [None]), ("cut", [4, 9, None])):
        for at in ends:
            observer = Stopping(at)
            train(
                tiny_config(*overrides),
                masked,
                tmp_path / out,
                resume=True,
                observer=observer,
                stop=observer.stop,
            )
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_the_validation_loss_is_the_evaluations(masked: Path) -> None:
    config, inputs, model = opened(masked, ONE_EXAMPLE, ("training.validation_batches", 100))
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform: what stands before a document would show
            parameter.add_(0.3 * torch.randn_like(parameter))
    loss = validate(model, inputs.validation_batches(config), config.training)
    model.eval()
    result = evaluate(model, inputs.tokenizer, masked)
    assert loss == pytest.approx(result.loss, rel=1e-5)
    assert result.tokens == 20 * 4
    assert result.answers == 20


def test_held_out_batches_without_a_target_have_no_loss(masked: Path) -> None:
    config, inputs, model = opened(masked, ("data.context_length", 3), ("training.batch_size", 1))
    batches = [batch for batch in inputs.validation_batches(config) if not batch.num_targets]
    assert batches
    with pytest.raises(DataError, match="no target of the held-out batches counts; raise"):
        validate(model, batches, config.training)


def test_a_run_is_not_continued_with_another_mask(masked: Path, tmp_path: Path) -> None:
    """The same tokens with another mask are other data."""
    other = tmp_path / "other"
    prepare_synthetic(
        SelectiveCopying(length=8, data_tokens=4), other, train_examples=300, validation_examples=20
    )
    flipped = tmp_path / "flipped"
    _flip_masks(other, flipped)
    train(tiny_config(ONE_EXAMPLE, ("training.steps", 2)), masked, tmp_path / "run")
    with pytest.raises(DataError, match="data"):
        train(tiny_config(ONE_EXAMPLE, ("training.steps", 3)), flipped, tmp_path / "run", resume=True)
    train(tiny_config(ONE_EXAMPLE, ("training.steps", 3)), other, tmp_path / "run", resume=True)
    assert len(read_lines(tmp_path / "run")) == 3


def _flip_masks(source: Path, out: Path) -> None:
    """Write the documents of ``source`` again, the last token of each counting too."""
    out.mkdir()
    index = read_index(source)
    splits = {}
    for split in index.splits:
        shards = TokenShards.open(source, split)
        with SplitWriter(out, split, np.dtype("u2"), index.end_of_text_id, 10**6, masked=True) as writer:
            for i in range(shards.num_documents):
                mask = shards.mask(i).astype(bool)
                mask[-1] = True
                writer.add(shards.document(i)[:-1].astype(np.uint32), len(mask) - 1, mask)
            splits[split] = writer.finish()
    (out / "index.json").write_bytes(encode_index(index.model_copy(update={"splits": splits})))
    shutil.copy(source / "tokenizer.json", out)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["mamba-tiny", "transformer-tiny"])
def test_a_tiny_model_learns_to_find_what_followed_the_special_token(preset: str, tmp_path: Path) -> None:
    task = InductionHeads(length=12, vocabulary=8)
    prepare_synthetic(task, tmp_path / "data", train_examples=20_000, validation_examples=300)
    training = {"batch_size": 32, "steps": 600, "learning_rate": 5e-3, "validate_every": 0, "device": "cpu"}
    overrides = [("data.context_length", 14), *((f"training.{name}", v) for name, v in training.items())]
    config = checked(RunConfig, apply_overrides(read_tables(preset), overrides), preset)
    train(config, tmp_path / "data", tmp_path / "run")
    result = evaluate(*load(tmp_path / "run"), tmp_path / "data")
    assert result.tokens == result.answers == 300
    assert result.answer_accuracy == result.accuracy > 0.9  # chance is 1/7
