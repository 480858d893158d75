"""Runs from beginning to end: reproducible, resumable, refused where they must be."""

import json
import logging
import random
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from switchmamba.checkpoint import Content, write_directory
from switchmamba.errors import CheckpointError, ConfigError, DataError, NonFiniteError, SwitchMambaError
from switchmamba.models.accounting import account
from switchmamba.models.language_model import LanguageModel
from switchmamba.models.loading import load
from switchmamba.training.checkpoint import restore_rng_state, rng_state
from switchmamba.training.config import RunConfig
from switchmamba.training.inputs import Inputs
from switchmamba.training.stop import StopRequest
from switchmamba.training.trainer import train
from switchmamba.training.validation import validate
from tests.faults.disk_full import small_disk
from tests.training.tiny_run import (
    assert_same_run,
    prepare_tiny_data,
    read_lines,
    tiny_config,
    without_timings,
)


class Silent:
    """An observer that remembers lines, and asks for the end at a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop = StopRequest()
        self.lines: list[Mapping[str, Any]] = []
        self.stop_at = stop_at

    def start(self, step: int, steps: int) -> None:
        self.bounds = (step, steps)

    def show(self, line: Mapping[str, Any]) -> None:
        self.lines.append(line)
        self.stop.requested = line["step"] == self.stop_at


def run(
    data: Path, out: Path, *overrides: tuple[str, Any], resume: bool = False, stop_at: int | None = None
) -> Silent:
    observer = Silent(stop_at)
    train(tiny_config(*overrides), data, out, resume=resume, observer=observer, stop=observer.stop)
    return observer


@pytest.fixture(scope="module")
def reference(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("reference") / "run"
    run(data_dir, out)
    return out


def test_a_run_leaves_its_configuration_metrics_and_newest_checkpoints(
    reference: Path, data_dir: Path
) -> None:
    lines = read_lines(reference)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["tokens"] for line in lines] == [64 * step for step in range(1, 13)]
    assert [line["step"] for line in lines if "validation_loss" in line] == [5, 10, 12]
    assert all(len(line["routers"]) == 2 for line in lines)
    assert sorted(p.name for p in (reference / "checkpoints").iterdir()) == ["step-12", "step-9"]
    config = RunConfig.model_validate(json.loads((reference / "config.json").read_text()))
    assert config.model.vocab_size == Inputs.open(data_dir, config).tokenizer.vocab_size
    assert config.training.precision == "fp32"


def test_every_field_of_the_metrics_is_explained_on_the_page(reference: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "runs.md").read_text(encoding="utf-8")
    lines = read_lines(reference)
    names = {name for line in lines for name in line} | {
        name for line in lines for name in line["routers"][0]
    }
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_the_mfu_is_that_of_the_active_parameters(reference: Path) -> None:
    config = RunConfig.model_validate(json.loads((reference / "config.json").read_text()))
    flops = account(config.model).training_flops_per_token(config.data.context_length)
    peaks = {line["tokens_per_second"] * flops / line["mfu"] for line in read_lines(reference)}
    assert max(peaks) == pytest.approx(min(peaks))
    assert max(peaks) > 1e8


def test_a_checkpoint_is_self_contained_and_gives_the_validated_model(
    reference: Path, data_dir: Path
) -> None:
    model, tokenizer = load(reference)
    config = RunConfig.model_validate(json.loads((reference / "config.json").read_text()))
    inputs = Inputs.open(data_dir, config)
    assert tokenizer.sha256 == inputs.tokenizer.sha256
    loss = validate(model, inputs.validation_batches(config), config.training)
    assert loss == read_lines(reference)[-1]["validation_loss"]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    reference: Path, data_dir: Path, tmp_path: Path
) -> None:
    run(data_dir, tmp_path / "same")
    assert_same_run(tmp_path / "same", reference)
    run(data_dir, tmp_path / "other", ("training.seed", 1), ("training.steps", 1))
    assert read_lines(tmp_path / "other")[0]["loss"] != read_lines(reference)[0]["loss"]


@pytest.mark.parametrize("stop_at", [1, 4, 6, 11])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stopped_run_continues_bit_for_bit(
    reference: Path, data_dir: Path, tmp_path: Path, stop_at: int, asynchronous: bool
) -> None:
    mode = ("training.asynchronous_checkpoints", asynchronous)
    run(data_dir, tmp_path / "run", mode, stop_at=stop_at)
    assert read_lines(tmp_path / "run")[-1]["step"] == stop_at
    torch.manual_seed(99)  # what came before must not matter
    continued = run(data_dir, tmp_path / "run", resume=True)
    assert continued.bounds == (stop_at, 12)
    assert_same_run(tmp_path / "run", reference)


def test_the_sample_ids_of_a_resumed_run_go_on_without_gap_or_repetition(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = Inputs.batch

    def watched(self: Inputs, step: int, config: RunConfig) -> Any:
        seen.append(step)
        return original(self, step, config)

    monkeypatch.setattr(Inputs, "batch", watched)
    run(data_dir, tmp_path / "run", stop_at=5)
    saved = json.loads((tmp_path / "run/checkpoints/step-5/training.json").read_text())
    assert saved["sampler"] == {"seed": 0, "next_sample": 20}
    run(data_dir, tmp_path / "run", resume=True)
    assert seen == list(range(12))


def test_resume_on_nothing_starts_afresh_and_on_a_finished_run_does_nothing(
    reference: Path, data_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        run(data_dir, tmp_path / name, resume=True)
        assert_same_run(tmp_path / name, reference)
    before = (tmp_path / "empty/metrics.jsonl").read_bytes()
    assert run(data_dir, tmp_path / "empty", resume=True).lines == []
    assert (tmp_path / "empty/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_whose_only_checkpoint_found_the_disk_full_begins_anew_when_there_is_room(
    reference: Path, data_dir: Path, tmp_path: Path, asynchronous: bool
) -> None:
    mode = ("training.asynchronous_checkpoints", asynchronous)
    with small_disk(8_000), pytest.raises(SwitchMambaError, match="step-12: cannot be written"):
        run(data_dir, tmp_path / "run", mode, ("training.checkpoint_every", 0))
    assert read_lines(tmp_path / "run")[-1]["step"] == 12
    run(data_dir, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", reference)
    assert not list((tmp_path / "run/checkpoints").glob("*.tmp-*"))


@pytest.mark.parametrize("steps", [12, 4])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(
    reference: Path, data_dir: Path, tmp_path: Path, steps: int
) -> None:
    shutil.copytree(reference, tmp_path / "run", ignore=shutil.ignore_patterns("step-*"))
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:steps]))
    before = metrics.read_bytes()
    with pytest.raises(
        ConfigError, match=f"holds metrics of {steps} steps but no checkpoint any more; restore"
    ):
        run(data_dir, tmp_path / "run", resume=True)
    assert metrics.read_bytes() == before


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew_and_says_so(
    reference: Path, data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(reference, tmp_path / "run", ignore=shutil.ignore_patterns("step-*"))
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:3]))  # saved every 3 steps
    with caplog.at_level(logging.WARNING, "switchmamba"):
        run(data_dir, tmp_path / "run", resume=True)
    assert f"no checkpoint in {tmp_path / 'run'}: starting from step 0; its 3 steps" in caplog.text
    assert_same_run(tmp_path / "run", reference)


def test_a_run_may_begin_in_an_empty_directory(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run(data_dir, tmp_path / "run", ("training.steps", 1))
    assert len(read_lines(tmp_path / "run")) == 1


def test_an_end_by_request_at_the_last_step_is_a_finished_run(
    data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "switchmamba"):
        run(data_dir, tmp_path / "a", ("training.steps", 2), stop_at=2)
        assert "stopped as asked" not in caplog.text
        run(data_dir, tmp_path / "b", ("training.steps", 3), stop_at=2)
    assert "stopped as asked after step 2; --resume continues" in caplog.text


def test_a_finished_run_can_be_extended(reference: Path, data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "run")
    run(data_dir, tmp_path / "run", ("training.steps", 15), resume=True)
    lines = read_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 16))
    assert without_timings(lines[:12]) == without_timings(read_lines(reference))


def test_a_run_that_exists_is_refused_without_resume(reference: Path, data_dir: Path) -> None:
    with pytest.raises(ConfigError, match="exists; --resume continues it"):
        run(data_dir, reference)


def test_resuming_with_another_configuration_names_the_fields(reference: Path, data_dir: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in reference.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"training\.learning_rate \(was 0\.003, is 0\.5\)"):
        run(data_dir, reference, ("training.learning_rate", 0.5), resume=True)
    assert before == {p: p.stat().st_mtime_ns for p in reference.rglob("*") if p.is_file()}


def test_a_run_begun_before_a_field_existed_continues_bit_for_bit(
    reference: Path, data_dir: Path, tmp_path: Path
) -> None:
    old, new = reference / "checkpoints/step-9", tmp_path / "run/checkpoints/step-9"
    files: dict[str, Content] = {p.name: p.read_bytes() for p in old.iterdir() if p.name != "manifest.json"}
    config = json.loads((old / "config.json").read_text())
    del config["training"]["eps"], config["model"]["layers"]["mamba"]["d_conv"]
    write_directory(new, files | {"config.json": json.dumps(config).encode()}, {})
    shutil.copy(reference / "metrics.jsonl", tmp_path / "run")
    run(data_dir, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", reference)


def test_resuming_on_other_data_is_refused(reference: Path, tmp_path: Path) -> None:
    other_tokenizer = prepare_tiny_data(tmp_path / "a", text="quite another text, sir; ")
    with pytest.raises(DataError, match="another tokenizer"):
        run(other_tokenizer, reference, resume=True)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_continues_bit_for_bit(
    reference: Path, data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(reference, tmp_path / "run")
    victim = tmp_path / "run/checkpoints/step-12/optimizer.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 4
    victim.write_bytes(raw)
    with caplog.at_level(logging.WARNING, "switchmamba"):
        run(data_dir, tmp_path / "run", resume=True)
    assert str(victim) in caplog.text
    assert_same_run(tmp_path / "run", reference)
    assert len(list((tmp_path / "run/checkpoints").glob("step-12.damaged-*"))) == 1


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(
    reference: Path, data_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(reference, tmp_path / "run")
    for step in (tmp_path / "run/checkpoints").iterdir():
        (step / "training.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        run(data_dir, tmp_path / "run", resume=True)


def test_a_renamed_checkpoint_is_refused(reference: Path, data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "run")
    (tmp_path / "run/checkpoints/step-12").rename(tmp_path / "run/checkpoints/step-11")
    with pytest.raises(CheckpointError, match=r"step-11/training\.json: does not describe step-11"):
        run(data_dir, tmp_path / "run", resume=True)


def test_a_non_finite_step_is_neither_logged_nor_saved(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LanguageModel.hidden_states
    calls = [0]

    def poisoned(self: LanguageModel, *arguments: Any, **settings: Any) -> Any:
        output = original(self, *arguments, **settings)
        calls[0] += self.training
        return output._replace(hidden=output.hidden * float("nan")) if calls[0] >= 5 else output

    monkeypatch.setattr(LanguageModel, "hidden_states", poisoned)
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        run(data_dir, tmp_path / "run")
    assert [line["step"] for line in read_lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-3"]
    load(tmp_path / "run")


def test_a_validation_loss_that_is_no_number_stops_before_it_is_logged(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LanguageModel.hidden_states

    def overflowing(self: LanguageModel, *arguments: Any, **settings: Any) -> Any:
        output = original(self, *arguments, **settings)
        return output if self.training else output._replace(hidden=output.hidden * float("inf"))

    monkeypatch.setattr(LanguageModel, "hidden_states", overflowing)
    with pytest.raises(NonFiniteError, match="the validation loss is nan"):
        run(data_dir, tmp_path / "run")
    assert [line["step"] for line in read_lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_failed_save_in_the_thread_is_raised(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from switchmamba.training import checkpoint

    def full(*_arguments: Any) -> None:
        raise SwitchMambaError("cannot be written (No space left on device)")

    monkeypatch.setattr(checkpoint, "write_directory", full)
    with pytest.raises(SwitchMambaError, match="No space left"):
        run(data_dir, tmp_path / "run", ("training.asynchronous_checkpoints", True))


def test_asynchronous_checkpoints_equal_synchronous_ones(
    reference: Path, data_dir: Path, tmp_path: Path
) -> None:
    run(data_dir, tmp_path / "run", ("training.asynchronous_checkpoints", True))
    for name in ("model.safetensors", "optimizer.safetensors", "training.json"):
        for step in ("step-9", "step-12"):
            ours = (tmp_path / "run/checkpoints" / step / name).read_bytes()
            assert ours == (reference / "checkpoints" / step / name).read_bytes()


def test_recomputation_and_micro_batches_train_whole_runs(
    reference: Path, data_dir: Path, tmp_path: Path
) -> None:
    run(data_dir, tmp_path / "recompute", ("training.activation_recompute", True))
    for ours, theirs in zip(read_lines(tmp_path / "recompute"), read_lines(reference), strict=True):
        assert [r["fraction"] for r in ours["routers"]] == [r["fraction"] for r in theirs["routers"]]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    run(data_dir, tmp_path / "micro", ("training.micro_batch_size", 3))
    assert read_lines(tmp_path / "micro")[-1]["loss"] == pytest.approx(
        read_lines(reference)[-1]["loss"], rel=0.05
    )


def test_paper_mode_without_state_reset_and_without_validation_trains(data_dir: Path, tmp_path: Path) -> None:
    paper = (("data.reset_state", False), ("model.norm", "layernorm"), ("model.final_norm", False))
    run(data_dir, tmp_path / "run", *paper, ("training.validate_every", 0), ("training.steps", 3))
    lines = read_lines(tmp_path / "run")
    assert len(lines) == 3
    assert not any("validation_loss" in line for line in lines)


def test_a_small_validation_split_is_counted_whole_and_a_large_one_sampled(data_dir: Path) -> None:
    def targets(batches: int) -> int:
        config = tiny_config(("training.validation_batches", batches))
        return sum(batch.num_targets for batch in Inputs.open(data_dir, config).validation_batches(config))

    config = tiny_config(("data.reset_state", False), ("training.validation_batches", 1000))
    inputs = Inputs.open(data_dir, config)
    assert inputs.validation is not None
    everything = sum(batch.num_targets for batch in inputs.validation_batches(config))
    assert everything == inputs.validation.num_tokens - 1
    assert targets(1) < targets(2) < targets(3)


def test_data_shorter_than_one_sample_is_refused_before_the_run_exists(
    data_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match=f"{data_dir}: the training split has [0-9]+ tokens, one sample needs"
    ):
        run(data_dir, tmp_path / "run", ("data.context_length", 10**6))
    assert not (tmp_path / "run").exists()


def test_damaged_data_is_refused_before_the_run_exists(data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(data_dir, tmp_path / "data")
    index = json.loads((tmp_path / "data/index.json").read_text())
    shard = tmp_path / "data" / index["splits"]["train"]["shards"][0]["file"]
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(DataError, match=shard.name):
        run(tmp_path / "data", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=shard.name):
        run(tmp_path / "data", tmp_path / "empty", resume=True)


def test_random_generators_are_saved_and_restored() -> None:
    import numpy as np

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002

    state = json.loads(json.dumps(rng_state()))
    first = draw()
    assert draw() != first
    restore_rng_state(state)
    assert draw() == first


def test_tensorboard_without_its_package_is_refused_before_the_run_exists(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'switchmamba\[tensorboard\]'"):
        run(data_dir, tmp_path / "run", ("training.tensorboard", True))
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_the_weights_of_a_checkpoint_and_of_nothing_else_in_it(
    reference: Path, data_dir: Path, tmp_path: Path
) -> None:
    start = ("training.initial_checkpoint", str(reference))
    run(data_dir, tmp_path / "run", start, ("training.steps", 4), ("training.learning_rate", 1e-9))
    lines = read_lines(tmp_path / "run")
    trained, begun = load(reference).model, load(tmp_path / "run").model
    for (name, before), after in zip(trained.named_parameters(), begun.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-7, msg=name)
    assert lines[-1]["validation_loss"] == pytest.approx(
        read_lines(reference)[-1]["validation_loss"], abs=1e-5
    )
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["loss_ema"] == pytest.approx(lines[0]["loss"]), "the smoothed loss starts anew"
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["training"]["initial_checkpoint"] == str(reference)


def test_a_resumed_run_reads_its_own_weights_and_not_those_that_it_started_from(
    reference: Path, data_dir: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(reference, start)
    more = (("training.initial_checkpoint", str(start)), ("training.seed", 1))
    run(data_dir, tmp_path / "whole", *more)
    run(data_dir, tmp_path / "halves", *more, stop_at=5)
    shutil.rmtree(start)
    with pytest.raises(ConfigError, match=r"training\.initial_checkpoint \(was '.*start', is None\)"):
        run(data_dir, tmp_path / "halves", ("training.seed", 1), resume=True)
    run(data_dir, tmp_path / "halves", *more, resume=True)
    assert_same_run(tmp_path / "halves", tmp_path / "whole")


def test_another_model_or_tokenizer_or_a_damaged_checkpoint_cannot_start_a_run(
    reference: Path, data_dir: Path, tmp_path: Path
) -> None:
    start = ("training.initial_checkpoint", str(reference))
    with pytest.raises(
        ConfigError, match=r"step-12: cannot start .* model.layers.moe.d_expert \(was 16, is 8\)"
    ):
        run(data_dir, tmp_path / "run", start, ("model.layers.moe.d_expert", 8))
    other = prepare_tiny_data(tmp_path / "other", "a dog ran past the gate, ")
    with pytest.raises(DataError, match=r"step-12: was trained with another tokenizer .* --tokenizer"):
        run(other, tmp_path / "run", start)
    shutil.copytree(reference / "checkpoints" / "step-12", tmp_path / "start")
    (tmp_path / "start" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        run(data_dir, tmp_path / "run", ("training.initial_checkpoint", str(tmp_path / "start")))
    assert not (tmp_path / "run").exists()


def test_a_last_checkpoint_without_the_optimizer_can_be_loaded_but_not_trained_on(
    data_dir: Path, tmp_path: Path
) -> None:
    out, lean = tmp_path / "run", (("training.save_optimizer", False), ("training.checkpoint_every", 2))
    run(data_dir, out, ("training.steps", 4), *lean)
    assert [p.parent.name for p in (out / "checkpoints").glob("*/optimizer.safetensors")] == ["step-2"]
    load(out)
    run(data_dir, out, ("training.steps", 4), *lean, resume=True)
    before = (out / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"saved without the optimizer's state.*--from begins"):
        run(data_dir, out, ("training.steps", 6), *lean, resume=True)
    assert (out / "config.json").read_bytes() == before
