"""A run that trains an adapter: its checkpoints are models like any other, and it continues bit for bit."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from switchmamba import LanguageModel, load
from switchmamba.checkpoint import newest_valid
from switchmamba.data.chat import CHAT_TEMPLATE, DEFAULT_TEMPLATE, ChatTemplate
from switchmamba.data.prepare import prepare
from switchmamba.errors import ConfigError
from switchmamba.models.loading import read_chat_template
from switchmamba.models.lora import ADAPTER, ADAPTER_CONFIG, lora_targets
from switchmamba.training.trainer import train
from tests.training.tiny_run import assert_same_run, read_lines, tiny_config

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run to adapt."""
    run = tmp_path_factory.mktemp("base") / "run"
    train(tiny_config(("training.steps", 6)), data_dir, run)
    return run


def lora_config(base: Path, **lora: object):
    settings = {"rank": 2, "targets": ["mamba", "experts", "head"], **lora}
    return tiny_config(
        ("training.lora", settings),
        ("training.initial_checkpoint", str(base)),
        ("training.learning_rate", 1e-2),
        ("training.seed", 1),
    )


@dataclass
class StopAfter:
    """Asks to stop when it has been asked itself so often."""

    steps: int
    asked: int = 0

    @property
    def requested(self) -> bool:
        self.asked += 1
        return self.asked > self.steps


@pytest.fixture(scope="module")
def adapted(base: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an adapter."""
    run = tmp_path_factory.mktemp("adapted") / "run"
    train(lora_config(base), data_dir, run)
    return run


def test_a_checkpoint_loads_as_any_other_without_peft_and_is_base_and_adapter_together(
    base: Path, adapted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    step = newest_valid(adapted)
    theirs = PeftModel.from_pretrained(load(base).model, step).eval()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "peft", None)
        merged = load(adapted).model
    assert isinstance(merged, LanguageModel)
    tokens = torch.randint(merged.config.vocab_size, (2, 20))
    torch.testing.assert_close(theirs(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-5)
    assert (load(base).model(tokens).logits - merged(tokens).logits).abs().max() > 1e-2
    before, after = (dict(load(run).model.named_parameters()) for run in (base, adapted))
    chosen = lora_targets(load(base).model)
    touched = {f"{name}.weight" for key in ("mamba", "head") for name in chosen[key].modules}
    touched |= set(chosen["experts"].parameters)
    assert {name for name in before if not torch.equal(before[name], after[name])} == touched


def test_a_stopped_run_continues_bit_for_bit_though_its_base_is_gone(
    base: Path, adapted: Path, data_dir: Path, tmp_path: Path
) -> None:
    elsewhere, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(base, elsewhere)
    assert train(lora_config(elsewhere), data_dir, run, stop=StopAfter(5)).step == 5
    shutil.rmtree(elsewhere)
    assert train(lora_config(elsewhere), data_dir, run, resume=True).finished
    assert_same_run(run, adapted, skipped={"config.json"})
    names = {path.name for path in newest_valid(run).iterdir()}
    assert {ADAPTER, ADAPTER_CONFIG, "base.safetensors", "model.safetensors"} <= names


def test_the_loss_falls_and_the_first_one_is_that_of_the_base(
    base: Path, adapted: Path, data_dir: Path
) -> None:
    lines = read_lines(adapted)
    assert lines[-1]["validation_loss"] < lines[0]["loss"] - 0.05
    config = tiny_config(
        ("training.initial_checkpoint", str(base)), ("training.steps", 1), ("training.seed", 1)
    )
    plain = data_dir.parent / "plain"
    train(config, data_dir, plain)
    assert read_lines(plain)[0]["loss"] == pytest.approx(lines[0]["loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ([("training.initial_checkpoint", None)], "nothing to adapt"),
        ([("training.freeze", ["router"])], "only the adapter learns"),
        ([("training.compile", True)], "leave one out"),
        ([("training.lora.rank", 0)], "training.lora.rank = 0"),
        ([("training.lora.targets", [])], "must name at least one"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides: list, complaint: str) -> None:
    tables = [("training.lora", {"rank": 2}), ("training.initial_checkpoint", "x"), *overrides]
    with pytest.raises(ConfigError, match=complaint):
        tiny_config(*tables)


def test_targets_that_the_model_has_not_are_refused_with_those_it_has(
    base: Path, data_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="'attention' is no part of this model; known: mamba, experts"):
        train(lora_config(base, targets=["attention"]), data_dir, tmp_path / "run")
    assert not (tmp_path / "run").exists()  # so the corrected command may have the same --out


def test_without_peft_the_package_to_install_is_named(
    base: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("switchmamba.extras.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"training\.lora needs peft: pip install 'switchmamba\[lora\]'"):
        train(lora_config(base), data_dir, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_template_of_the_data_stays_with_the_checkpoints_and_with_what_is_trained_from_them(
    base: Path, data_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "talks.jsonl"
    records = [{"prompt": f"the cat {i}", "completion": f"sat on the mat {i}"} for i in range(12)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = newest_valid(base) / "tokenizer.json"
    prepare([file], tokenizer, tmp_path / "talks", chat_template=ChatTemplate(), validation_fraction=0.2)
    begin = [("training.steps", 2), ("training.initial_checkpoint", str(base)), ("data.context_length", 48)]
    train(tiny_config(*begin), tmp_path / "talks", tmp_path / "tuned")
    assert (newest_valid(tmp_path / "tuned") / CHAT_TEMPLATE).read_text() == DEFAULT_TEMPLATE
    onward = [("training.steps", 2), ("training.initial_checkpoint", str(tmp_path / "tuned"))]
    train(tiny_config(*onward), data_dir, tmp_path / "on")
    assert read_chat_template(newest_valid(tmp_path / "on")) == DEFAULT_TEMPLATE
    assert read_chat_template(newest_valid(base)) is None
