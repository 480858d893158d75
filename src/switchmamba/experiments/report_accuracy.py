"""The part of a report that holds accuracy against perplexity (MoE-Mamba, arXiv 2401.04081v2, §4.6)."""

from collections.abc import Callable, Sequence
from statistics import mean

from switchmamba.evaluation.perplexity import Evaluation
from switchmamba.evaluation.repeats import Repeats
from switchmamba.experiments import comparison_plots
from switchmamba.experiments.analysis import RunAnalysis, read_analysis
from switchmamba.experiments.document import Block, Cell, Heading, Plot, Plots, Table
from switchmamba.experiments.results import ArmResult, Results, Spread


def accuracy(results: Results, shown: Sequence[ArmResult]) -> list[Block]:
    """Return the section on accuracy: over perplexity, and on text that comes a second time."""
    analyses = {
        arm.name: [a for r in arm.runs if (a := read_analysis(results.directory, r.run)) is not None]
        for arm in shown
    }
    if sum(map(len, analyses.values())) < 2:
        return []

    def drawn(
        name: str, measure: Callable[[RunAnalysis], float | None], label: str, caption: str
    ) -> Plot | None:
        points = {
            arm: [(a.evaluation.perplexity, share) for a in own if (share := measure(a)) is not None]
            for arm, own in analyses.items()
        }
        if not any(points.values()):
            return None
        figure = comparison_plots.accuracy_against_perplexity(points, results, label)
        return Plot(name, figure, caption)

    plots_drawn = [
        drawn(
            "accuracy-perplexity",
            lambda a: a.evaluation.accuracy,
            "next-token accuracy",
            "Next-token accuracy over perplexity, a point for each run, on all held-out documents. An arm below the "
            "trend of the others predicts well on average but names the right token less often. "
            + read_how([(arm.label, a.evaluation) for arm in shown for a in analyses[arm.name]]),
        ),
        drawn(
            "copying-perplexity",
            lambda a: copying_accuracy(a.repeats),
            "accuracy on repeated spans",
            "Accuracy on the second occurrence of spans of held-out text that were planted a second time, over "
            "perplexity: what a model copies verbatim.",
        ),
    ]
    return [
        Heading("Accuracy against perplexity"),
        Plots([plot for plot in plots_drawn if plot is not None]),
        *_repeats_table(shown, analyses),
    ]


def alike(analyses: Sequence[RunAnalysis]) -> list[Evaluation]:
    """Return the evaluations of an arm's seeds that may be averaged: in pieces, if some were read so and some whole."""
    evaluations = [analysis.evaluation for analysis in analyses]
    in_pieces = [evaluation for evaluation in evaluations if evaluation.context_length is not None]
    return in_pieces or evaluations


def read_how(evaluations: Sequence[tuple[str, Evaluation]]) -> str:
    """Say from how much of its past each token was predicted, given (arm's label, evaluation) of each run."""
    by_length: dict[int | None, dict[str, None]] = {}
    for label, evaluation in evaluations:
        by_length.setdefault(evaluation.context_length, {})[label] = None
    ways = {
        length: "whole, however long"
        if length is None
        else f"in pieces of {length:,} tokens, each from an empty state"
        for length in by_length
    }
    if len(ways) == 1:
        return f"Documents are read {next(iter(ways.values()))}."
    most = max(by_length, key=lambda length: len(by_length[length]))

    def called(label: str) -> str:
        return f"{label} (some seeds)" if sum(label in own for own in by_length.values()) > 1 else label

    named = "; ".join(
        f"of {', '.join(map(called, labels))} {ways[length]}"
        for length, labels in by_length.items()
        if length != most
    )
    return f"Documents are read in different ways, which do not compare: {named}; of the others {ways[most]}."


def copying_accuracy(repeats: Repeats | None) -> float | None:
    """Return the accuracy on the second occurrence of planted spans, averaged over the gaps."""
    planted = [] if repeats is None else repeats.planted
    return mean(plant.second.accuracy for plant in planted) if planted else None


def _repeats_table(shown: Sequence[ArmResult], analyses: dict[str, list[RunAnalysis]]) -> list[Block]:
    asked = {name: [a.repeats for a in own if a.repeats is not None] for name, own in analyses.items()}
    gaps = sorted({plant.gap for own in asked.values() for r in own for plant in r.planted})
    rows: list[list[Cell]] = []
    for arm in shown:
        own = asked[arm.name]
        if not own:
            continue
        first = [[mean(p.first.accuracy for p in r.planted) for r in own if r.planted]] if gaps else []
        second = [[p.second.accuracy for r in own for p in r.planted if p.gap == gap] for gap in gaps]
        natural = [
            [s.accuracy for r in own if (s := getattr(r, n)) is not None] for n in ("elsewhere", "repeated")
        ]
        rows.append([arm.label, *(Spread(tuple(values)).text() for values in (*first, *second, *natural))])
    if not rows:
        return []
    planted = ["First time", *(f"Again after {gap}" for gap in gaps)] if gaps else []
    one = next(r for own in asked.values() for r in own)
    spans = (
        f"Spans of {one.span} tokens of held-out text, read for the first time and again after so many other tokens; "
        f"the first {one.skip} of a span, which cannot be known, are not counted. Right: tokens"
        if gaps
        else f"The windows have no room for planted spans of {one.span} tokens. Tokens"
    )
    return [
        Table(
            ["Accuracy", *planted, "Elsewhere", "Repeated by itself"],
            rows,
            f"{spans} of text as it is that end a sequence of eight or more seen before in the window, and all others.",
        )
    ]
