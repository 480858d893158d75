"""The report of an experiment: what came out, whichever way, and everything that is needed to get it again."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from switchmamba.config import validate
from switchmamba.experiments import comparison_plots, plot_style, plots
from switchmamba.experiments.analysis import RunAnalysis, read_analysis
from switchmamba.experiments.document import (
    Block,
    Cell,
    Code,
    Document,
    Heading,
    Items,
    Plot,
    Plots,
    Table,
    Text,
)
from switchmamba.experiments.processes import train_command
from switchmamba.experiments.report_accuracy import accuracy, alike, read_how
from switchmamba.experiments.report_experts import detailed, experts_of, routing
from switchmamba.experiments.report_search import search
from switchmamba.experiments.results import ArmResult, Results, RunResult, Spread
from switchmamba.models.accounting import Account, account
from switchmamba.models.config import ModelConfig


@dataclass(frozen=True)
class Sample:
    """Text that a model wrote: after what, which model, and how tokens were drawn."""

    prompt: str
    continuation: str
    model: str
    how: str


@dataclass(frozen=True)
class Report:
    """A report on ``results``.

    Attributes:
        results: what the experiment's directory holds.
        title: default: the experiment's name.
        sample: shown with it, if there is one.
    """

    results: Results
    title: str | None = None
    sample: Sample | None = None

    def document(self) -> Document:
        """Return the report, to be written as HTML or Markdown."""
        shown = [arm for arm in self.results.arms if arm.runs]
        blocks: list[Block] = [*_opening(self.results, shown)]
        if shown:
            blocks += [*_outcome(self.results, shown), *_axis(self.results), *_curves(self.results, shown)]
            blocks += [
                *accuracy(self.results, shown),
                *_hardware(self.results, shown),
                *search(self.results),
            ]
            blocks += routing(self.results, shown)
            blocks += [block for arm in detailed(shown) for block in experts_of(self.results, arm)]
        if self.sample is not None:
            blocks += _sample(self.sample)
        blocks += _method(self.results, shown)
        return Document(self.title or self.results.experiment.name, blocks)

    def summary(self) -> dict[str, Any]:
        """Return the report's numbers as plain values."""
        results = self.results
        return {
            "experiment": results.experiment.name,
            "claim": results.experiment.claim,
            "verdicts": [{"outcome": v.outcome, "sentence": v.sentence} for v in results.verdicts()],
            "arms": {arm.name: _arm_numbers(results, arm) for arm in results.arms if arm.runs},
            "unstable": {result.run.name: asdict(spike) for result, spike in results.unstable},
            "diverged": [result.run.name for result in results.diverged],
            "hardware": results.record.hardware,
        }

    def write(self, path: Path) -> None:
        """Write ``path`` (.html), and the numbers as ``summary.json`` beside it."""
        self.document().write_html(path)
        summary = json.dumps(self.summary(), indent=2, allow_nan=False)
        path.with_name("summary.json").write_text(summary + "\n", encoding="utf-8")


def model_account(result: RunResult) -> Account:
    """Return the costs of the model that a run trains."""
    assert result.config is not None
    return account(validate(ModelConfig, result.config["model"], str(result.directory / "config.json")))


def _opening(results: Results, shown: Sequence[ArmResult]) -> list[Block]:
    experiment = results.experiment
    blocks: list[Block] = [Text(verdict.sentence, lead=True) for verdict in results.verdicts()]
    blocks.append(Text(f"**Claim under test.** {experiment.claim} **{_outcome_word(results)}**"))
    if shown:
        blocks.append(Text(f"**Scale.** {_scale(results, shown)}"))
    if experiment.note is not None:
        blocks.append(Text(f"**Note.** {experiment.note}"))
    for came_back, said in ((True, "rose, and came back"), (False, "rose, and did not come back")):
        rises = "; ".join(
            f"of `{result.run.name}` from {spike.level_before:.2f} to {_loss(spike.loss)} at step {spike.step:,}"
            for result, spike in results.unstable
            if spike.came_back == came_back
        )
        if rises:
            blocks.append(Text(f"**Unstable.** The training loss {said}: {rises}."))
    if results.diverged:
        names = ", ".join(
            f"`{result.run.name}` at step {result.metrics.steps:,}" for result in results.diverged
        )
        blocks.append(
            Text(
                f"**Diverged:** {names}. Numbers leave these runs out; for the claim they ended above all others."
            )
        )
    if results.unfinished:
        names = ", ".join(f"`{result.run.name}`" for result in results.unfinished)
        blocks.append(Text(f"**Not finished:** {names}. The numbers below leave these runs out."))
    return blocks


def _outcome_word(results: Results) -> str:
    outcomes = {verdict.outcome for verdict in results.verdicts()}
    if not outcomes:
        return ""
    single = all(len(verdict.gaps.values) < 2 for verdict in results.verdicts())
    at_this_scale = "at this scale, with a single seed" if single else "at this scale"
    if outcomes == {"holds"}:
        return f"It came out, {at_this_scale}."
    if "open" in outcomes:
        return "Still open: runs are missing."
    if outcomes == {"fails"}:
        return f"It did not come out, {at_this_scale}."
    return f"It came out in part, {at_this_scale}." if "holds" in outcomes else "Undecided: seeds disagree."


def _scale(results: Results, shown: Sequence[ArmResult]) -> str:
    active = sorted(model_account(arm.runs[0]).active_parameters for arm in shown)
    tokens = sorted({arm.runs[0].metrics.tokens for arm in shown})
    seeds = max(len(arm.runs) for arm in shown)
    text = (
        f"{_range(active)} active parameters without embeddings, {_range(tokens)} training tokens each, "
        f"{seeds} seed{'s' if seeds != 1 else ''}. {results.record.corpus}"
    )
    published = results.experiment.published
    if published is not None:
        text += (
            f" The published result ({published.source}) is of another scale: {published.scale}. Losses on different "
            "texts and vocabularies do not compare; directions and speedups do."
        )
    return text


def _outcome(results: Results, shown: Sequence[ArmResult]) -> list[Block]:
    analyses = {arm.name: [read_analysis(results.directory, r.run) for r in arm.runs] for arm in shown}
    columns = ["", "Parameters", "Active", "Training loss", "Held-out loss", "Speedup", "Tokens/s"]
    rows: list[list[Cell]] = []
    for arm in shown:
        counts = model_account(arm.runs[0])
        is_baseline = arm.name == results.experiment.baseline
        rows.append(
            [
                arm.label,
                _short(counts.parameters),
                _short(counts.active_parameters),
                arm.over_seeds("final_loss").text(),
                arm.over_seeds("final_validation_loss").text(),
                "1" if is_baseline else _speedup(results, arm),
                f"{_speed(arm):,.0f}",
            ]
        )
    seeds = sorted({len(arm.runs) for arm in shown})
    by_seed = ", seed by seed" if seeds[-1] > 1 else ""
    over = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])
    spread = f"; ± is the standard deviation over {over} seeds" if seeds[-1] > 1 else "; one seed"
    blocks: list[Block] = [
        Heading("What came out"),
        Table(
            columns,
            rows,
            "Losses in nats per token: training loss smoothed, held-out loss at the last step, on the same windows "
            f"for all{spread}. Parameters leave out embedding and head. Speedup: tokens the baseline needs to reach "
            f"the lowest training loss that both reach ÷ tokens needed{by_seed}. Tokens/s: median while training.",
        ),
    ]
    if all(analysis is not None for own in analyses.values() for analysis in own):
        blocks.append(_evaluation_table(shown, {n: [a for a in own if a] for n, own in analyses.items()}))
    published = results.experiment.published
    if published is not None:
        rows = [
            [arm.label, _number(published.loss.get(arm.name), 2), _number(published.speedup.get(arm.name), 2)]
            for arm in shown
        ]
        blocks.append(
            Table(["Published", "Final loss", "Speedup"], rows, f"{published.source}: {published.scale}.")
        )
    return blocks


def _speedup(results: Results, arm: ArmResult) -> str:
    """Write an arm's speedup; the lowest loss of a run that is lost may be its first, and tells nothing."""
    return "–" if arm.lost or results.baseline.lost else results.seed_speedups(arm).text(2)


def _axis(results: Results) -> list[Block]:
    axis, series = results.experiment.axis, comparison_plots.on_axis(results)
    if axis is None or axis.measure != "loss" or not series or not results.baseline.runs:
        return []
    arms = results.experiment.arms
    gaps = {name: comparison_plots.published_gap(results, name) for name in arms}
    known = any(gap is not None for gap in gaps.values())
    rows: list[list[Cell]] = []
    for name, own in series.items():
        for arm in own:
            published = gaps[arm.name]
            rows.append(
                [
                    name or "–",
                    str(arms[arm.name].x),
                    _short(model_account(arm.runs[0]).parameters),
                    arm.over_seeds("final_validation_loss").text(),
                    _signed(results.gaps_to_baseline(arm).mean),
                    *(["–" if published is None else _signed(published, 2)] if known else []),
                ]
            )
    label = results.baseline.label
    columns = ["Series", axis.label, "Parameters", "Held-out loss", f"− {label}'s"]
    hollow = " The published differences are hollow; they are of another scale." if known else ""
    plot = Plot(
        "over-axis",
        comparison_plots.over_axis(results),
        f"Final held-out loss minus {label}'s; below zero is better.{hollow}",
    )
    return [
        Heading(f"Over {axis.label}"),
        Plots([plot]),
        Table(
            [*columns, "Published difference"] if known else columns,
            rows,
            f"Losses in nats per token, {label}: {results.baseline.over_seeds('final_validation_loss').text()}.",
        ),
    ]


def _hardware(results: Results, shown: Sequence[ArmResult]) -> list[Block]:
    colour_of = plot_style.colours(results)
    speeds = [(arm.label, _speed(arm), arm.peak_memory, colour_of[arm.name]) for arm in shown]
    if len(speeds) < 2:
        return []
    drawn = [
        Plot(
            "speed-and-memory",
            comparison_plots.speed_and_memory(speeds),
            f"Median speed of training and the most memory held. {results.record.hardware}; where there is a GPU, each "
            "run has one to itself, elsewhere runs side by side share memory and cores.",
        )
    ]
    axis = results.experiment.axis
    if axis is not None and axis.scale != "words" and comparison_plots.on_axis(results):
        figure = comparison_plots.speed_over_axis(results, _speed)
        drawn.append(Plot("speed-over-axis", figure, f"The same over {axis.label}."))
    return [Heading("Speed and memory"), Plots(drawn)]


def _evaluation_table(shown: Sequence[ArmResult], analyses: dict[str, list[RunAnalysis]]) -> Table:
    names = (("loss", 3), ("perplexity", 2), ("bits_per_byte", 3), ("accuracy", 3))
    compared = {name: alike(own) for name, own in analyses.items()}
    rows = [
        [
            arm.label,
            *(Spread(tuple(getattr(a, n) for a in compared[arm.name])).text(d) for n, d in names),
        ]
        for arm in shown
    ]
    one = compared[shown[0].name][0]
    how = read_how([(arm.label, evaluation) for arm in shown for evaluation in compared[arm.name]])
    return Table(
        ["All held-out documents", "Loss", "Perplexity", "Bits per byte", "Next-token accuracy"],
        rows,
        f"{one.documents:,} documents, {one.tokens:,} tokens. {how} No expert drops a token.",
    )


def _curves(results: Results, shown: Sequence[ArmResult]) -> list[Block]:
    seeds = max(len(arm.runs) for arm in shown)
    band = "; the band spans the seeds" if seeds > 1 else ""
    averaged = (
        " This is the speedup of the curves averaged over the seeds, not the average of the seeds' speedups that the "
        "table has."
        if seeds > 1
        else ""
    )
    drawn = [
        Plot(
            "training-loss",
            plots.loss_curves(results),
            f"Training loss: faint, every step{' of the first seed' if seeds > 1 else ''}; strong, smoothed to both "
            f"sides{band}. The first steps lie above the frame; a loss above it counts as its top in the strong line.",
        )
    ]
    if any(arm.runs[0].metrics.validation_loss_V.size > 1 for arm in shown):
        drawn.append(
            Plot("held-out-loss", plots.validation_curves(results), f"Held-out loss during training{band}.")
        )
    if results.baseline.runs and len(shown) > 1:
        label = results.baseline.label
        drawn.append(
            Plot(
                "loss-gap",
                plots.loss_gap(results),
                f"Smoothed training loss minus {label}'s at equal tokens{band}. Below zero is better. The frame is "
                "that of the last four fifths; what rises out of it has blown up, or has only begun.",
            )
        )
        drawn.append(
            Plot(
                "speedup",
                plots.speedup_curves(results),
                f"Speedup over loss: how many times as many tokens {label} needs to reach the same smoothed training "
                f"loss. Above one is better.{averaged}",
            )
        )
    return [Heading("Curves"), Plots(drawn)]


def _sample(sample: Sample) -> list[Block]:
    return [
        Heading("A sample"),
        Text(
            f"What {sample.model} wrote after the first line ({sample.how}); nothing is chosen or corrected."
        ),
        Code(sample.prompt + sample.continuation),
    ]


def _method(results: Results, shown: Sequence[ArmResult]) -> list[Block]:
    record = results.record
    facts = [
        f"**Hardware.** {record.hardware}, {record.threads} thread{'s' if record.threads > 1 else ''} a run.",
        f"**Software.** {record.software}.",
        f"**Seeds.** {', '.join(str(seed) for seed in results.experiment.seeds)}.",
    ]
    for arm in shown:
        assert arm.runs[0].config is not None
        training, data = arm.runs[0].config["training"], arm.runs[0].config["data"]
        facts.append(
            f"**{arm.label}.** {training['steps']:,} steps of {training['batch_size']} × {data['context_length']} "
            f"tokens, peak learning rate {training['learning_rate']:g}, warm-up {training['warmup_steps']} steps, "
            f"smoothing of the training loss α = {training['loss_ema_alpha']:g}; {_run_names(arm)}."
        )
    commands = [
        record.command,
        *(
            train_command(r.run, record.data, f"RUN/{arm.name}", record.threads)
            for arm in shown
            for r in arm.runs[:1]
        ),
    ]
    return [
        Heading("How it was made"),
        Items(facts),
        Text("The whole, and by itself the first run of each arm that counts:"),
        Code("\n\n".join(commands), "bash"),
    ]


def _arm_numbers(results: Results, arm: ArmResult) -> dict[str, Any]:
    counts = model_account(arm.runs[0])
    analyses = [read_analysis(results.directory, result.run) for result in arm.runs]
    return {
        "runs": [result.run.name for result in arm.runs],
        "parameters": counts.parameters,
        "active_parameters": counts.active_parameters,
        "tokens": arm.runs[0].metrics.tokens,
        "training_loss": list(arm.over_seeds("final_loss").values),
        "validation_loss": list(arm.over_seeds("final_validation_loss").values),
        "speedup": list(results.seed_speedups(arm).values),
        "tokens_per_second": _speed(arm),
        "peak_memory": _finite(arm.peak_memory),
        "evaluation": [asdict(analysis.evaluation) for analysis in analyses if analysis is not None],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _run_names(arm: ArmResult) -> str:
    names = [f"`{result.run.name}`" for result in arm.runs]
    return f"run{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _speed(arm: ArmResult) -> float:
    return float(median(float(np.median(result.metrics.tokens_per_second_S)) for result in arm.runs))


def _range(values: Sequence[int]) -> str:
    low, high = _short(values[0]), _short(values[-1])
    return low if low == high else f"{low}–{high}"


def _short(count: int) -> str:
    """Write a count with three figures: 1.23M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return str(count)


def _signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _loss(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
