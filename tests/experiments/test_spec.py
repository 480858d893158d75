"""Experiments as data: what is refused, and how they expand into runs."""

from pathlib import Path

import pytest

from switchmamba.config import apply_overrides, parse_overrides, validate
from switchmamba.errors import ConfigError
from switchmamba.experiments.spec import Experiment, Run, dotted, read_experiment, restrict, shrink
from tests.experiments.synthetic import comparison

TOML = """
name = "two-arms"
claim = "b is better"
expect = ["b < a"]
baseline = "a"
seeds = [3, 4]

[arms.a]
preset = "mamba-tiny"
[arms.b]
preset = "moe-mamba-tiny"
label = "B"
[arms.b.set]
model.layers.moe.num_experts = 6

[set]
training.steps = 7
[sweep]
"training.learning_rate" = [1e-3, 2e-3]
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "two-arms.toml"
    path.write_text(text)
    return path


def test_every_arm_is_searched_at_every_point_with_the_first_seed(tmp_path: Path) -> None:
    experiment = read_experiment(write(tmp_path, TOML))
    assert [run.name for run in experiment.candidates("b")] == [
        "b/learning_rate=0.001/seed=3",
        "b/learning_rate=0.002/seed=3",
    ]
    assert dict(experiment.candidates("b")[1].overrides) == {
        "training.steps": 7,
        "model.layers.moe.num_experts": 6,
        "training.learning_rate": 2e-3,
        "training.seed": 3,
    }


def test_further_seeds_run_at_the_chosen_point(tmp_path: Path) -> None:
    experiment = read_experiment(write(tmp_path, TOML))
    chosen = experiment.candidates("a")[1]
    (repetition,) = experiment.repetitions(chosen)
    assert repetition.name == "a/learning_rate=0.002/seed=4"
    assert dict(repetition.overrides) == dict(chosen.overrides) | {"training.seed": 4}


def test_a_sweep_over_two_fields_is_their_product() -> None:
    experiment = comparison(sweep={"training.learning_rate": [1e-3, 2e-3], "training.batch_size": [4, 8]})
    points = [dict(run.point) for run in experiment.candidates("mamba")]
    assert len(points) == 4
    assert {"training.learning_rate": 2e-3, "training.batch_size": 4} in points


def test_an_arm_may_have_a_search_of_its_own_or_none() -> None:
    arms = {
        "mamba": {"preset": "mamba-demo", "sweep": {}},
        "moe-mamba": {"preset": "moe-mamba-demo", "sweep": {"training.learning_rate": [4e-3]}},
    }
    experiment = comparison(arms=arms)
    assert [run.name for run in experiment.candidates("mamba")] == ["mamba/seed=0"]
    assert [run.name for run in experiment.candidates("moe-mamba")] == [
        "moe-mamba/learning_rate=0.004/seed=0"
    ]


def test_the_command_line_of_a_run_means_its_overrides() -> None:
    values = [
        1e-3,
        1e-05,
        3,
        True,
        None,
        "paper",
        "2/3",
        "1e3",
        ["mamba", "moe"],
        [["mamba", "moe"]],
        "true",
        "a b",
    ]
    fixed = tuple((f"model.field_{i}", value) for i, value in enumerate(values))
    run = Run(arm="a", preset="mamba-tiny", fixed=fixed, point=(), seed=5)
    assert parse_overrides(run.arguments()) == [*fixed, ("training.seed", 5)]


def test_an_arms_own_changes_win_over_the_experiments() -> None:
    arms = {"mamba": {"preset": "mamba-demo", "set": {"training": {"steps": 9}}}}
    experiment = comparison(arms=arms, expect=[], set={"training.steps": 5, "training.batch_size": 2})
    (run, *_) = experiment.candidates("mamba")
    tables = apply_overrides({}, run.overrides)
    assert (tables["training"]["steps"], tables["training"]["batch_size"]) == (9, 2)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("seeds = [3, 4]", "seedz = [3, 4]", "unknown key seedz; did you mean seeds?"),
        ('preset = "mamba-tiny"', 'presett = "mamba-tiny"', "did you mean preset?"),
        ('baseline = "a"', 'baseline = "aa"', "no arm 'aa'; did you mean a?"),
        ('expect = ["b < a"]', 'expect = ["b < c"]', "no arm 'c'"),
        ('expect = ["b < a"]', 'expect = ["b"]', "orders nothing"),
        ('expect = ["b < a"]', 'expect = ["b < a < b"]', "names an arm twice"),
        ("seeds = [3, 4]", "seeds = [3, 3]", "repeat"),
        ('"training.learning_rate"', "training.learning_rate", '"training.learning_rate" = [...]'),
        ('label = "B"', 'label = "a"', "two arms have the same label"),
        ("seeds = [3, 4]", "seeds = []", "seeds"),
        ("[1e-3, 2e-3]", "[]", "has no values"),
        ("[1e-3, 2e-3]", "[1e-3, 0.001]", "lists a value twice"),
        ("training.steps = 7", "training.seed = 7", "training.seed is set by seeds"),
        ("[arms.a]", '[arms."b/c"]', "names a directory"),
        (
            'name = "two-arms"',
            'name = "Two arms"',
            "name = 'Two arms': must be lower-case words, digits and hyphens, such as experts-by-rate",
        ),
        ("[set]", "[set", "not valid TOML"),
    ],
)
def test_a_faulty_file_is_refused_with_file_and_remedy(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    assert before in TOML
    with pytest.raises(ConfigError) as refused:
        read_experiment(write(tmp_path, TOML.replace(before, after, 1)))
    assert message in str(refused.value)
    assert "two-arms.toml" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_preset_that_is_a_file_lies_beside_the_experiment(tmp_path: Path) -> None:
    path = write(tmp_path, TOML.replace('"mamba-tiny"', '"mine.toml"'))
    assert read_experiment(path).arms["a"].preset == str(tmp_path / "mine.toml")


def test_restricting_changes_every_run_and_nothing_else() -> None:
    experiment = comparison()
    shorter = restrict(experiment, [7], [("training.steps", 3)])
    for arm in experiment.arms:
        for old, new in zip(experiment.candidates(arm), shorter.candidates(arm), strict=True):
            assert dict(new.overrides) == dict(old.overrides) | {"training.steps": 3, "training.seed": 7}
    assert restrict(experiment, None, []) == experiment


def test_a_swept_field_cannot_be_overridden() -> None:
    with pytest.raises(ConfigError, match=r"learning_rate is swept"):
        restrict(comparison(), None, [("training.learning_rate", 1.0)])


SMALL = """
[axis]
label = "experts"
[small]
seeds = [5]
[small.presets]
mamba-tiny = "mamba-demo"
[small.set]
training = { steps = 2, batch_size = 3 }
model.layers.moe.num_experts = 3
"""


def shrunk(directory: Path, more: str = "") -> Experiment:
    arm = '[arms.c]\npreset = "mamba-tiny"\nx = 4\nsmall.training.batch_size = 9\nsweep."training.steps" = [8, 9]\n'
    return shrink(read_experiment(write(directory, TOML.replace("[set]", f"{arm}[set]", 1) + SMALL + more)))


def test_the_small_version_cuts_every_arm_down_and_an_arms_own_changes_win(tmp_path: Path) -> None:
    small = shrunk(tmp_path)
    assert {arm: [run.name for run in small.candidates(arm)] for arm in small.arms} == {
        "a": ["a/seed=5"],
        "b": ["b/seed=5"],
        "c": ["c/seed=5"],
    }
    runs = {arm: small.candidates(arm)[0] for arm in small.arms}
    assert {arm: run.preset for arm, run in runs.items()} == {
        "a": "mamba-demo",
        "b": "moe-mamba-tiny",
        "c": "mamba-demo",
    }
    shared = {
        "training.steps": 2,
        "training.batch_size": 3,
        "model.layers.moe.num_experts": 3,
        "training.seed": 5,
    }
    assert dict(runs["b"].overrides) == shared
    assert dict(runs["c"].overrides) == shared | {"training.batch_size": 9}


def test_the_small_version_asks_the_same_and_is_named_after_its_experiment(tmp_path: Path) -> None:
    small = shrunk(tmp_path)
    assert (small.name, small.expect, small.baseline) == ("two-arms-small", ["b < a"], "a")
    assert small.axis is not None
    assert (small.axis.label, small.arms["c"].x, small.label("b")) == ("experts", 4, "B")
    assert small.seeds == [5]
    with pytest.raises(ConfigError, match="two-arms-small has no table 'small'"):
        shrink(small)


def test_the_small_version_may_search_for_itself(tmp_path: Path) -> None:
    small = shrunk(tmp_path, '[small.sweep]\n"training.learning_rate" = [1e-2, 2e-2]\n')
    names = [run.name for arm in small.arms for run in small.candidates(arm)]
    assert names == [f"{arm}/learning_rate={rate}/seed=5" for arm in "abc" for rate in (0.01, 0.02)]


def test_an_arm_that_sets_in_small_what_is_searched_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        shrunk(tmp_path, '[small.sweep]\n"training.batch_size" = [2, 3]\n')
    assert str(refused.value).endswith(
        "two-arms.toml: arm c: its small sets training.batch_size, which [small.sweep] searches; "
        "leave out one of the two"
    )


@pytest.mark.parametrize(
    ("axis", "x", "message"),
    [
        ("", "4", "arm a has x = 4, but there is no axis; add [axis] with a label"),
        (
            'axis = { label = "experts", scale = "words" }',
            "4",
            "arm a: x = 4 does not fit axis.scale = 'words'",
        ),
        ('axis = { label = "experts" }', '"four"', "arm a: x = 'four' does not fit axis.scale = 'log'"),
    ],
)
def test_a_place_that_does_not_fit_the_axis_is_refused(
    tmp_path: Path, axis: str, x: str, message: str
) -> None:
    text = TOML.replace("seeds", f"{axis}\nseeds", 1).replace("[arms.a]", f"[arms.a]\nx = {x}", 1)
    with pytest.raises(ConfigError) as refused:
        read_experiment(write(tmp_path, text))
    assert message in str(refused.value)


def test_an_experiment_survives_being_written_down() -> None:
    experiment = comparison()
    assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment
    assert validate(Experiment, experiment.model_dump(), "dump") == experiment


def test_dotted_flattens_tables_and_keeps_values() -> None:
    assert dotted({"a": {"b": {"c": 1}, "d": [2]}, "e.f": 3}) == (("a.b.c", 1), ("a.d", [2]), ("e.f", 3))
