"""Steps queued as on a GPU, here on a CPU: the same training, and still no update after something non-finite."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from switchmamba.errors import NonFiniteError
from switchmamba.training import trainer
from switchmamba.training.config import TrainingConfig
from switchmamba.training.optimizer import build_optimizer, state_tensors
from switchmamba.training.train_step import launch_step, train_step
from tests.training.test_train_step import PoisonGradient, assert_unchanged, tiny_batch, tiny_model, weights
from tests.training.test_trainer import run
from tests.training.tiny_run import assert_same_run, read_lines


@pytest.mark.parametrize("clip", [None, 0.1, 1e3])
def test_a_queued_step_is_the_step(clip):
    config = TrainingConfig(batch_size=4, gradient_clip=clip)
    one, other = tiny_model(), tiny_model()
    first, second = build_optimizer(one, config), build_optimizer(other, config)
    for seed in range(3):
        expected = train_step(one, first, tiny_batch(seed=seed), config, 1e-2)
        found = launch_step(other, second, tiny_batch(seed=seed), config, 1e-2).result()
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        for ours, theirs in zip(found.router_stats, expected.router_stats, strict=True):
            assert torch.equal(ours.tokens_per_expert_E, theirs.tokens_per_expert_E)
            assert int(ours.num_tokens) == int(theirs.num_tokens)
            torch.testing.assert_close(ours.probability_sum_E, theirs.probability_sum_E)
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6, msg=name)


def test_a_queue_behind_a_non_finite_step_changes_nothing_until_the_host_has_raised():
    config = TrainingConfig(batch_size=4)
    model = tiny_model()
    optimizer = build_optimizer(model, config)
    launch_step(model, optimizer, tiny_batch(), config, 1e-2).result()
    before = weights(model)
    moments = {name: tensor.clone() for name, tensor in state_tensors(optimizer, model).items()}

    def poison() -> Any:
        hook = lambda _module, _inputs, output: PoisonGradient.apply(output)  # noqa: E731
        return model.layers[2].norm.register_forward_hook(hook)

    poisoned = poison()
    bad = launch_step(model, optimizer, tiny_batch(), config, 1e-2)
    poisoned.remove()
    behind = launch_step(model, optimizer, tiny_batch(seed=1), config, 1e-2)
    assert behind.result().loss > 0
    poisoned = poison()
    with pytest.raises(NonFiniteError, match=r"first at parameter layers\.2\.norm\.weight"):
        bad.result()
    poisoned.remove()
    assert_unchanged(model, before)
    for name, tensor in state_tensors(optimizer, model).items():
        assert torch.equal(tensor, moments[name]), name
    launch_step(model, optimizer, tiny_batch(), config, 1e-2).result()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(trainer, "queues_steps", lambda device: True)


def test_a_queued_run_writes_every_line_checkpoint_and_validation(queued, data_dir: Path, tmp_path: Path):
    observer = run(data_dir, tmp_path / "run")
    lines = read_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in observer.lines] == list(range(1, 13))
    assert [line["step"] for line in lines if "validation_loss" in line] == [5, 10, 12]
    assert all(line["tokens_per_second"] > 0 and len(line["routers"]) == 2 for line in lines)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-12", "step-9"]


@pytest.mark.parametrize("stop_at", [1, 6, 7])
def test_a_queued_run_continues_bit_for_bit(queued, data_dir: Path, tmp_path: Path, stop_at: int):
    run(data_dir, tmp_path / "whole")
    run(data_dir, tmp_path / "run", stop_at=stop_at)
    # The step behind the one that was shown was on its way: it is finished and saved as well.
    last = read_lines(tmp_path / "run")[-1]["step"]
    assert last in (stop_at, stop_at + 1)
    saved = json.loads((tmp_path / f"run/checkpoints/step-{last}/training.json").read_text())
    assert saved["sampler"]["next_sample"] == 4 * last
    run(data_dir, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
