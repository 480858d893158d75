"""Training configurations: bounds with one-line errors, resolution, and what may change on resume."""

import copy

import pytest

from switchmamba.config import validate
from switchmamba.errors import ConfigError
from switchmamba.models.presets import presets
from switchmamba.training.config import (
    CHANGEABLE_ON_RESUME,
    RunConfig,
    TrainingConfig,
    differences,
    resolve,
)
from tests.training.tiny_run import tiny_config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("micro_batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("min_learning_rate_ratio", 1.5),
        ("betas", [0.9, 1.0]),
        ("weight_decay_scope", "most"),
        ("gradient_clip", 0.0),
        ("load_balance_coef", -0.01),
        ("seed", -1),
        ("seed", 2**63),
        ("precision", "fp8"),
        ("loss_ema_alpha", 0.0),
        ("keep_checkpoints", 0),
        ("steps", "many"),
    ],
)
def test_a_value_out_of_range_is_refused_in_one_line_that_names_it(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as refusal:
        tiny_config((f"training.{field}", value))
    assert field in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_unknown_key_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean learning_rate"):
        tiny_config(("training.learning_rat", 1e-3))


def test_a_micro_batch_larger_than_the_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="micro_batch_size = 9 exceeds batch_size = 4"):
        tiny_config(("training.micro_batch_size", 9))


@pytest.mark.parametrize("name", list(presets))
def test_every_preset_is_a_valid_run(name: str) -> None:
    validate(RunConfig, presets[name], source=name)


def test_resolution_takes_the_vocabulary_of_the_data_and_decides_what_training_leaves_open() -> None:
    cpu = resolve(tiny_config(), vocab_size=321, device="cpu")
    assert cpu.model.vocab_size == 321
    assert (cpu.training.precision, cpu.training.micro_batch_size, cpu.training.device) == ("fp32", 4, "cpu")
    assert "auto" not in cpu.training.model_dump().values()
    assert resolve(tiny_config(), vocab_size=321, device="cuda").training.precision == "bf16"
    assert resolve(cpu, vocab_size=321, device="cpu") == cpu


def test_a_resolved_configuration_survives_json() -> None:
    resolved = resolve(tiny_config(), vocab_size=300, device="cpu")
    assert validate(RunConfig, resolved.model_dump(mode="json"), source="config.json") == resolved


def test_differences_name_the_fields_that_may_not_change() -> None:
    def dump(*overrides: tuple[str, object]) -> dict[str, object]:
        return tiny_config(*overrides).model_dump(mode="json")

    assert differences(dump(), dump()) == []
    free = dump(("training.steps", 99), ("training.keep_checkpoints", 7), ("training.validate_every", 0))
    assert differences(dump(), free) == []
    bound = dump(("training.learning_rate", 1.0), ("model.layers.moe.num_experts", 8))
    assert differences(dump(), bound) == [
        "model.layers.moe.num_experts (was 4, is 8)",
        "training.learning_rate (was 0.003, is 1.0)",
    ]
    assert differences({"a": {"b": 1}}, {"a": {}}) == ["a.b (was 1, is None)"]


def test_a_field_younger_than_the_run_had_its_default() -> None:
    new = tiny_config().model_dump(mode="json")
    old = copy.deepcopy(new)
    del old["training"]["eps"], old["model"]["norm_eps"], old["model"]["layers"]["mamba"]["d_conv"]
    assert differences(old, new) == []
    changed = tiny_config(("training.eps", 1e-6)).model_dump(mode="json")
    assert differences(old, changed) == ["training.eps (was 1e-08, is 1e-06)"]


@pytest.mark.parametrize("betas", [0.9, [0.9], [0.9, "a"], [0.9, 0.95, 0.99]])
def test_betas_are_two_numbers(betas: object) -> None:
    with pytest.raises(ConfigError, match=r"training\.betas = .*: must be a list of two numbers, such as"):
        tiny_config(("training.betas", betas))


def test_a_field_that_no_longer_exists_is_named() -> None:
    new = tiny_config().model_dump(mode="json")
    old = copy.deepcopy(new)
    old["training"]["momentum"] = 0.9
    assert differences(old, new) == ["training.momentum (was 0.9, is None)"]


def test_what_may_change_on_resume_exists() -> None:
    fields = {f"training.{name}" for name in TrainingConfig.model_fields}
    assert fields.issuperset(CHANGEABLE_ON_RESUME)
