"""Masked data in a captured step under bf16: the losses of the launched one, bit for bit."""

import json
import math

import pytest

from switchmamba.data.synthetic import SelectiveCopying, prepare_synthetic
from switchmamba.evaluation.perplexity import evaluate
from switchmamba.models.loading import load
from switchmamba.training.trainer import train
from tests.gpu.small import STEPS, masked_batches, run_config
from tests.gpu.training_steps import take


@pytest.mark.parametrize("preset", ["moe-mamba-tiny", "mamba2-tiny", "transformer-tiny"])
def test_a_captured_step_counts_the_targets_of_its_own_batch(preset, device):
    config = run_config(preset, device)
    (launched, *_), (captured, *_) = (
        take(config, masked_batches(), device, graph=graph) for graph in (False, True)
    )
    assert [step.loss for step in captured] == [step.loss for step in launched]
    assert [step.grad_norm for step in captured] == [step.grad_norm for step in launched]
    # A mean over the targets of another batch would be off by 8% or more.
    assert all(step.loss == pytest.approx(math.log(512), rel=0.05) for step in captured)


def test_runs_on_selective_copying_are_the_same_captured_and_launched(tmp_path, device, assert_captured):
    data = tmp_path / "data"
    task = SelectiveCopying(length=16, data_tokens=4, vocabulary=8)
    prepare_synthetic(task, data, train_examples=600, validation_examples=40)
    runs = {}
    for graph in (True, False):
        config = run_config(
            "moe-mamba-tiny",
            device,
            ("data.context_length", task.length + 1 + task.answer_tokens + 1),
            ("training.batch_size", 16),
            ("training.steps", 2 * STEPS),
            ("training.cuda_graph", graph),
            ("training.validate_every", STEPS),
            ("training.validation_batches", 10),
        )
        train(config, data, tmp_path / str(graph), vocab_size=None)
        lines = (tmp_path / str(graph) / "metrics.jsonl").read_text().splitlines()
        runs[graph] = [json.loads(line) for line in lines]
    assert_captured(1)
    assert len(runs[True]) == 2 * STEPS
    for captured, launched in zip(runs[True], runs[False], strict=True):
        for name in ("loss", "grad_norm"):
            assert captured[name] == launched[name], (name, captured["step"])
        assert captured.get("validation_loss") == launched.get("validation_loss")
    assert runs[True][-1]["loss"] < runs[True][0]["loss"]

    model, tokenizer = load(tmp_path / "True", device=device)
    result = evaluate(model, tokenizer, data)
    assert result.answers == 40 and result.tokens == 40 * task.answer_tokens
    assert result.loss == pytest.approx(
        runs[True][-1]["validation_loss"], rel=0.01
    )  # in fp32 here, there in bf16
