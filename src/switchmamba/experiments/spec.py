"""What an experiment is: arms that differ in one thing, a search equal for all, seeds, and the claim under test.

An experiment is a TOML file and nothing else. It expands into runs of ``switchmamba train`` in two stages:
every arm is trained at every point of its ``sweep`` with the first seed; then, per arm, the point with the
lowest final validation loss is trained with the remaining seeds. A file whose runs take GPUs and hours says in its
table ``small`` what becomes of it on a laptop. This module knows no model and imports no torch.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from switchmamba.config import Config, Tables, nearest, read_toml, validate
from switchmamba.errors import ConfigError

SEED_FIELD = "training.seed"
"""The configuration field that a run's seed sets."""

Override = tuple[str, Any]
"""A dotted configuration name and its value."""


class Arm(Config):
    """One of the things compared: a preset, and what is changed in it.

    Attributes:
        preset: name of a preset, or path of a configuration file relative to the experiment file.
        label: how plots and tables call it; default: the arm's name.
        set: changes to the preset, as tables or dotted names; they come after the experiment's own ``set``.
        sweep: search of this arm alone, instead of the experiment's; an empty table searches nothing.
        series: the line or the colour of bars that it belongs to, in plots over the experiment's ``axis``.
        x: where it stands on that axis: a number, or a word on an axis of words.
        small: changes to this arm alone in the small version, after the experiment's own.
    """

    preset: str
    label: str | None = None
    set: Tables = Field(default_factory=dict)
    sweep: dict[str, list[Any]] | None = None
    series: str | None = None
    x: int | float | str | None = None
    small: Tables = Field(default_factory=dict)


class Axis(Config):
    """What the arms are lined up along.

    Attributes:
        label: such as "experts".
        scale: "log" doubles from tick to tick, "linear" does not, "words" draws bars.
        measure: what the experiment asks for along it; "speed" leaves the losses out of its plots.
    """

    label: str
    scale: Literal["log", "linear", "words"] = "log"
    measure: Literal["loss", "speed"] = "loss"


class Small(Config):
    """The experiment on a laptop: the same arms, each model and run cut down in the same way.

    Attributes:
        presets: preset → the smaller one that stands in for it; others stay.
        set: changes to every arm, after its own.
        sweep: the search instead of every other one; none by default.
        seeds: instead of the experiment's.
    """

    presets: dict[str, str] = Field(default_factory=dict)
    set: Tables = Field(default_factory=dict)
    sweep: dict[str, list[Any]] = Field(default_factory=dict)
    seeds: list[int] = Field(default=[0], min_length=1)


class Published(Config):
    """What a paper reports for the same arms, shown beside our numbers and never mixed with them.

    Attributes:
        source: where it stands.
        scale: at what size, on what text: numbers of another scale compare in direction only.
        loss: final loss in nats per token, by arm.
        speedup: speedup over the baseline at the end of training, by arm.
    """

    source: str
    scale: str
    loss: dict[str, float] = Field(default_factory=dict)
    speedup: dict[str, float] = Field(default_factory=dict)


class Experiment(Config):
    """A comparison as data.

    Attributes:
        name: lower-case words joined by hyphens.
        claim: the sentence under test.
        expect: the claim in numbers: ``"a < b"`` says that arm a ends with a lower validation loss than arm
            b; chains such as ``"a < b < c"`` are read pairwise.
        baseline: the arm that speedups and differences are taken against.
        arms: what is compared, by name.
        set: changes to every arm's preset.
        sweep: dotted name → values: the search, one run for each combination, equal for all arms.
        seeds: the first is used in the search, all of them at the point it chose.
        selection: what the search minimises: the last ``validation_loss``, or the last smoothed training loss.
        published: the paper's numbers, if it has any.
        note: what a reader of the report should know beside its numbers.
        axis: what arms with an ``x`` are lined up along; plots and a table over it.
        small: its version for a laptop.
    """

    name: str
    claim: str
    expect: list[str] = Field(default_factory=list)
    baseline: str
    arms: dict[str, Arm] = Field(min_length=1)
    set: Tables = Field(default_factory=dict)
    sweep: dict[str, list[Any]] = Field(default_factory=dict)
    seeds: list[int] = Field(default=[0], min_length=1)
    selection: Literal["validation_loss", "loss_ema"] = "validation_loss"
    published: Published | None = None
    note: str | None = None
    axis: Axis | None = None
    small: Small | None = None

    @field_validator("name")
    @classmethod
    def _name_is_words(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
            raise ValueError("must be lower-case words, digits and hyphens, such as experts-by-rate")
        return name

    @field_validator("sweep", mode="before")
    @classmethod
    def _sweep_names_are_quoted(cls, sweep: Any) -> Any:
        for name, value in sweep.items() if isinstance(sweep, Mapping) else ():
            if isinstance(value, Mapping):
                inner = next(iter(value), "…")
                raise ValueError(f'dotted names stand in quotes here: "{name}.{inner}" = [...]')
        return sweep

    @field_validator("arms")
    @classmethod
    def _arm_names_are_file_names(cls, arms: dict[str, Arm]) -> dict[str, Arm]:
        for name in arms:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f"{name!r} names a directory: letters, digits, '.', '_' and '-' only")
        return arms

    @model_validator(mode="after")
    def _refer_to_arms_that_exist(self) -> Self:
        published = self.published or Published(source="", scale="")
        compared = [arm for pair in self.expected_orders() for arm in pair]
        for name in [self.baseline, *published.loss, *published.speedup, *compared]:
            if name not in self.arms:
                raise ValueError(f"no arm {name!r}{nearest(name, sorted(self.arms))}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeat; list each once")
        labels = [self.label(name) for name in self.arms]
        if len(set(labels)) < len(labels):
            raise ValueError(
                f"two arms have the same label, of {labels}: the report could not tell them apart"
            )
        for name, values in [pair for s in self._sweeps() for pair in s.items()]:
            if not values:
                raise ValueError(f"sweep {name} has no values; leave it out or list some")
        fixed = [
            name for tables in (self.set, *(a.set for a in self.arms.values())) for name, _ in dotted(tables)
        ]
        if SEED_FIELD in [*fixed, *(name for s in self._sweeps() for name in s)]:
            raise ValueError(f"{SEED_FIELD} is set by seeds; remove it from set and sweep")
        self._places_fit_the_axis()
        self._small_arms_set_nothing_searched()
        for arm in self.arms:
            names = [run.name for run in self.candidates(arm)]
            if len(set(names)) < len(names):
                raise ValueError(f"sweep of arm {arm} lists a value twice, to six digits; list each once")
        return self

    def _places_fit_the_axis(self) -> None:
        for name, arm in self.arms.items():
            if arm.x is not None and self.axis is None:
                raise ValueError(
                    f"arm {name} has x = {arm.x!r}, but there is no axis; add [axis] with a label"
                )
            if arm.x is not None and self.axis and isinstance(arm.x, str) != (self.axis.scale == "words"):
                raise ValueError(
                    f"arm {name}: x = {arm.x!r} does not fit axis.scale = {self.axis.scale!r}; words stand on an axis "
                    "of words, numbers on the others"
                )

    def _small_arms_set_nothing_searched(self) -> None:
        """Refuse what the search would silently overrule."""
        for name, arm in self.arms.items():
            for key, _ in dotted(arm.small):
                if self.small is not None and key in self.small.sweep:
                    raise ValueError(
                        f"arm {name}: its small sets {key}, which [small.sweep] searches; leave out one of the two"
                    )

    def _sweeps(self) -> list[dict[str, list[Any]]]:
        return [self.sweep, *(arm.sweep for arm in self.arms.values() if arm.sweep is not None)]

    def expected_orders(self) -> list[tuple[str, str]]:
        """Return the pairs (lower, higher) of arms that ``expect`` names."""
        chains = [[name.strip() for name in order.split("<")] for order in self.expect]
        for chain, order in zip(chains, self.expect, strict=True):
            if len(chain) < 2:
                raise ValueError(f"expect {order!r} orders nothing; write 'arm < arm'")
            if len(set(chain)) < len(chain):
                raise ValueError(f"expect {order!r} names an arm twice; no arm ends below itself")
        return [pair for chain in chains for pair in pairwise(chain)]

    def label(self, arm: str) -> str:
        """Return what plots and tables call an arm."""
        return self.arms[arm].label or arm

    def search_of(self, arm: str) -> dict[str, list[Any]]:
        """Return the sweep that applies to an arm."""
        own = self.arms[arm].sweep
        return self.sweep if own is None else own

    def candidates(self, arm: str) -> list["Run"]:
        """Return an arm's runs of the first stage: every point of its search, with the first seed."""
        search = self.search_of(arm)
        points = product(*([(name, value) for value in values] for name, values in search.items()))
        return [self._run(arm, point, self.seeds[0]) for point in points]

    def repetitions(self, candidate: "Run") -> list["Run"]:
        """Return the runs of the second stage: the chosen candidate with every further seed."""
        return [self._run(candidate.arm, candidate.point, seed) for seed in self.seeds[1:]]

    def _run(self, arm: str, point: tuple[Override, ...], seed: int) -> "Run":
        fixed = (*dotted(self.set), *dotted(self.arms[arm].set))
        return Run(arm=arm, preset=self.arms[arm].preset, fixed=fixed, point=point, seed=seed)


@dataclass(frozen=True)
class Run:
    """One training run of an experiment.

    Attributes:
        arm: name of the arm it belongs to.
        preset: what it starts from.
        fixed: changes that do not vary within the arm.
        point: the values of the sweep that it uses.
        seed: its seed.
    """

    arm: str
    preset: str
    fixed: tuple[Override, ...]
    point: tuple[Override, ...]
    seed: int

    @property
    def name(self) -> str:
        """Stable and readable; also its directory: ``moe-mamba/learning_rate=0.001/seed=0``."""
        point = ",".join(f"{name.rsplit('.', 1)[-1]}={_plain(value)}" for name, value in self.point)
        return "/".join(part for part in (self.arm, point, f"seed={self.seed}") if part)

    @property
    def overrides(self) -> tuple[Override, ...]:
        """Every change to the preset, later ones winning."""
        return tuple(dict([*self.fixed, *self.point, (SEED_FIELD, self.seed)]).items())

    def arguments(self) -> list[str]:
        """Return the overrides as ``switchmamba train`` takes them."""
        return [text for name, value in self.overrides for text in (f"--{name}", command_line_value(value))]


def read_experiment(path: Path) -> Experiment:
    """Read an experiment file; :class:`ConfigError` names file, key and the nearest right one.

    A preset that ends in ``.toml`` is a path relative to the file.
    """
    experiment = validate(Experiment, read_toml(path), str(path))

    def located(arm: Arm) -> Arm:
        preset = str(path.parent / arm.preset) if arm.preset.endswith(".toml") else arm.preset
        return arm.model_copy(update={"preset": preset})

    arms = {name: located(arm) for name, arm in experiment.arms.items()}
    return experiment.model_copy(update={"arms": arms})


def shrink(experiment: Experiment) -> Experiment:
    """Return the experiment's version for a laptop; ConfigError if its file describes none."""
    small = experiment.small
    if small is None:
        raise ConfigError(
            f"experiment {experiment.name} has no table 'small'; run it as it is, or add one to its file"
        )
    arms = {
        name: {
            **arm.model_dump(),
            "preset": small.presets.get(arm.preset, arm.preset),
            "set": dict([*dotted(arm.set), *dotted(small.set), *dotted(arm.small)]),
            "sweep": None,
            "small": {},
        }
        for name, arm in experiment.arms.items()
    }
    changes = {
        "name": f"{experiment.name}-small",
        "arms": arms,
        "sweep": small.sweep,
        "seeds": small.seeds,
        "small": None,
    }
    return validate(
        Experiment, {**experiment.model_dump(), **changes}, f"experiment {experiment.name}, small"
    )


def restrict(
    experiment: Experiment, seeds: Sequence[int] | None, overrides: Sequence[Override]
) -> Experiment:
    """Return the experiment with other seeds or with further changes to all arms (a shorter run, for instance).

    An override that names a swept field is refused: it would silently be the same for every point of the
    search.
    """
    changes: dict[str, Any] = {}
    if seeds is not None:
        changes["seeds"] = list(seeds)
    for name, _ in overrides:
        if any(name in experiment.search_of(arm) for arm in experiment.arms):
            raise ConfigError(
                f"--{name} is swept by experiment {experiment.name}; change its values in the file"
            )
    if overrides:
        changes["arms"] = {
            name: {**arm.model_dump(), "set": dict([*dotted(arm.set), *overrides])}
            for name, arm in experiment.arms.items()
        }
    return validate(Experiment, {**experiment.model_dump(), **changes}, f"experiment {experiment.name}")


def dotted(tables: Mapping[str, Any], prefix: str = "") -> tuple[Override, ...]:
    """Flatten nested tables: ``{"a": {"b": 1}}`` → ``(("a.b", 1),)``."""
    pairs: list[Override] = []
    for name, value in tables.items():
        if isinstance(value, Mapping) and value:
            pairs.extend(dotted(value, f"{prefix}{name}."))
        else:
            pairs.append((f"{prefix}{name}", value))
    return tuple(pairs)


def command_line_value(value: Any) -> str:
    """Write a value as :func:`switchmamba.config.parse_overrides` reads it back."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return repr(value)
    return value if isinstance(value, str) and _reads_back(value) else json.dumps(value)


def _reads_back(text: str) -> bool:
    """Tell whether a bare string stays a string on the command line: it looks like a word and like no TOML value."""
    return re.fullmatch(r"[A-Za-z_][\w/.-]*", text) is not None and text.lower() not in {
        "true", "false", "none", "inf", "nan",
    }  # fmt: skip


def _plain(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]", "_", text)
