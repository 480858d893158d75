"""Configuration: strict, immutable, and its errors name the field, the value and the nearest right name."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, PositiveInt

from switchmamba.config import Config, Ratio, apply_overrides, parse_overrides, read_toml, validate
from switchmamba.errors import ConfigError


class Inner(Config):
    learning_rate: float = 1e-3
    steps: PositiveInt = 10


class Outer(Config):
    inner: Inner = Inner()
    named: dict[str, Inner] = Field(default_factory=dict)
    ratio: Ratio = Fraction(2)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"iner": {}}, "unknown key iner; did you mean inner?"),
        ({"inner": {"learning_rat": 1.0}}, "unknown key inner.learning_rat; did you mean learning_rate?"),
        ({"named": {"a": {"stepz": 1}}}, "unknown key named.a.stepz; did you mean steps?"),
        ({"inner": {"zzzzzz": 1}}, "known: learning_rate, steps"),
        ({"inner": {"steps": 0}}, "inner.steps = 0: input should be greater than 0"),
        ({"inner": {"steps": "7"}}, "inner.steps = '7'"),
        ({"inner": {"steps": True}}, "inner.steps = True"),
        ({"inner": 3}, "inner = 3"),
        ({"ratio": "2/0"}, "ratio = '2/0': must be a number or a fraction such as '2/3'"),
        ({"ratio": -1}, "ratio = -1: must be greater than 0"),
        ({"ratio": True}, "ratio = True"),
    ],
)
def test_an_error_is_one_line_with_source_field_value_and_rule(tables, message):
    with pytest.raises(ConfigError) as error:
        validate(Outer, tables, source="run.toml")
    assert str(error.value).startswith("run.toml: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_inside_a_union_is_named_as_it_was_written():
    from switchmamba import presets
    from switchmamba.models.config import ModelConfig

    tables = apply_overrides(presets["moe-mamba-tiny"]["model"], [("layers.moe.num_expert", 3)])
    with pytest.raises(ConfigError, match=r"unknown key layers\.moe\.num_expert; did you mean num_experts\?"):
        validate(ModelConfig, tables, source="x")
    tables = apply_overrides(presets["moe-mamba-tiny"]["model"], [("layers.moe.router.top_k", 0)])
    with pytest.raises(ConfigError, match=r"layers\.moe\.router\.top_k = 0: "):
        validate(ModelConfig, tables, source="x")


def test_a_configuration_cannot_be_changed():
    with pytest.raises(Exception, match="frozen"):
        Inner().steps = 3


def test_integers_serve_as_floats_and_strings_do_not():
    assert validate(Inner, {"learning_rate": 1}, source="x").learning_rate == 1.0
    with pytest.raises(ConfigError):
        validate(Inner, {"learning_rate": "1"}, source="x")


@given(st.fractions(min_value=Fraction(1, 100), max_value=100))
def test_a_ratio_survives_writing_and_reading(ratio):
    written = Outer(ratio=ratio).model_dump(mode="json")["ratio"]
    assert validate(Outer, {"ratio": written}, source="x").ratio == ratio


def test_overrides_are_toml_values_or_strings():
    arguments = [
        "--a.rate",
        "1e-3",
        "--a.on=true",
        "--a.name",
        "bf16",
        "--a.pattern",
        '["mamba", "moe"]',
        "--a.b.c",
        "none",
    ]
    assert parse_overrides(arguments) == [
        ("a.rate", 1e-3),
        ("a.on", True),
        ("a.name", "bf16"),
        ("a.pattern", ["mamba", "moe"]),
        ("a.b.c", None),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stray"], "unexpected argument 'stray'"),
        (["--nodot", "3"], "unexpected argument '--nodot'"),
        (["--a.b"], "--a.b needs a value"),
    ],
)
def test_a_malformed_override_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse_overrides(arguments)


def test_overrides_leave_the_original_tables_alone():
    tables = {"training": {"steps": 1}}
    assert apply_overrides(tables, [("training.steps", 2), ("model.d_model", 8)]) == {
        "training": {"steps": 2},
        "model": {"d_model": 8},
    }
    assert tables == {"training": {"steps": 1}}


def test_an_override_below_a_value_is_refused():
    with pytest.raises(ConfigError, match="steps is a value, not a table"):
        apply_overrides({"training": {"steps": 1}}, [("training.steps.more", 2)])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a = ", "not valid TOML"), (b"\xff", "not UTF-8 at byte 0"), (None, "no such configuration file")],
)
def test_an_unreadable_file_is_named(tmp_path, content, message):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_toml(path)
    assert str(path) in str(error.value)


def test_a_toml_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/mine\.toml: cannot be read: Not a directory"):
        read_toml(tmp_path / "file" / "mine.toml")
