"""Configuration: strict, immutable, and its errors name the field, the value and the nearest right name."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, PositiveInt

from switchmamba.config import Config, Ratio, apply_overrides, nearest, parse_overrides, read_toml, validate
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


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lr", "; did you mean learning_rate?"),
        ("bs", "; did you mean batch_size?"),
        ("earning_rate", "; did you mean learning_rate?"),
        ("max_steps", "; did you mean steps?"),
        ("la", "; known: batch_size, eps, learning_rate, lora, steps"),
        ("epochs", "; known: batch_size, eps, learning_rate, lora, steps"),
    ],
)
def test_a_short_name_means_its_initials_and_a_poor_match_nothing(name, hint):
    assert nearest(name, ["batch_size", "eps", "learning_rate", "lora", "steps"]) == hint


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


@pytest.mark.parametrize(
    ("written", "meant"), [(0.7, "7/10"), (0.01, "1/100"), (1e-5, "1/100000"), (2.0, "2")]
)
def test_a_decimal_ratio_is_what_was_written_not_its_binary_neighbour(written, meant):
    assert validate(Outer, {"ratio": written}, source="x").ratio == Fraction(meant)


def test_a_decimal_expand_gives_the_channels_of_the_fraction():
    from switchmamba.layers.mixers.mamba import MambaConfig

    decimal, fraction = (validate(MambaConfig, {"expand": value}, source="x") for value in (0.7, "7/10"))
    assert decimal.d_inner(30) == fraction.d_inner(30) == 21
    with pytest.raises(ValueError, match="expand=1/100 gives no channel"):
        validate(MambaConfig, {"expand": 0.01}, source="x").check(32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("layers.mo.num_experts", 3),
            "layers.mo.kind is missing (one of attention, inner_moe_mamba, mamba, mamba2, mlp, moe)",
        ),
        (("layers.mo.num_experts", 3), "; did you mean layers.moe?"),
        (
            ("layers.other", {"d_ff": 3}),
            "layers.other.kind is missing (one of attention, inner_moe_mamba, mamba, mamba2, mlp, moe)",
        ),
        (("layers.moe.kind", "mpl"), "layers.moe.kind = 'mpl'; did you mean mlp?"),
        (
            ("layers.moe.kind", "xyz"),
            "layers.moe.kind = 'xyz'; known: attention, inner_moe_mamba, mamba, mamba2, mlp, moe",
        ),
        (("layers.moe.router.top_k", 99), "x: layers.moe: top_k=99 exceeds num_experts=4"),
        (("layers.moe", 3), "layers.moe = 3: must be a table"),
        (
            ("pattern", [["ssm", []]]),
            "x: pattern = [['ssm', []]]: must be a list of layers' names",
        ),
        (("pattern", "mamba"), "pattern = 'mamba': must be a list of layers' names"),
        (("pattern", []), "pattern is empty"),
    ],
)
def test_a_wrong_layer_is_answered_with_the_key_as_written_and_what_may_stand_there(change, message):
    from switchmamba import presets
    from switchmamba.models.config import ModelConfig

    with pytest.raises(ConfigError) as error:
        validate(ModelConfig, apply_overrides(presets["moe-mamba-tiny"]["model"], [change]), source="x")
    assert message in str(error.value)
    assert "moe.moe" not in str(error.value)


def test_a_pattern_of_tuples_is_that_of_lists():
    from switchmamba import presets
    from switchmamba.models.config import ModelConfig

    tables = presets["moe-mamba-tiny"]["model"]
    for listed, tupled in ((["mamba", "moe"], ("mamba", "moe")), ([["mamba", "moe"]], (("mamba", "moe"),))):
        configs = [validate(ModelConfig, tables | {"pattern": p}, source="x") for p in (listed, tupled)]
        assert configs[0] == configs[1] and configs[1].pattern == listed
    with pytest.raises(ConfigError, match="must be a list of layers' names"):
        validate(ModelConfig, tables | {"pattern": ("mamba", 3)}, source="x")


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


@pytest.mark.parametrize("order", [1, -1])
def test_a_table_that_becomes_of_another_kind_starts_anew(order):
    tables = {"router": {"kind": "top_k", "top_k": 2, "temperature": 0.5}}
    changes = [("router.temperature", 0.7), ("router.kind", "gumbel")][::order]
    assert apply_overrides(tables, changes) == {"router": {"kind": "gumbel", "temperature": 0.7}}
    assert apply_overrides(tables, [("router.kind", "top_k")]) == tables
    whole = [("router", {"kind": "top_k", "top_k": 3}), ("router.kind", "gumbel")]
    assert apply_overrides(tables, whole) == {"router": {"kind": "gumbel", "top_k": 3}}


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
