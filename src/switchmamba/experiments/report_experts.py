"""The part of a report that looks into routers: which expert takes how many tokens, and which ones."""

from collections.abc import Sequence

import numpy as np

from switchmamba.experiments import plots
from switchmamba.experiments.analysis import read_analysis
from switchmamba.experiments.document import Block, Cell, Heading, Literals, Plot, Plots, Table, Text
from switchmamba.experiments.results import ArmResult, Results

MOST_DETAILED = 3
"""Arms whose experts are looked into."""

MOST_EXPERTS = 40
"""Experts in a table."""


def detailed(shown: Sequence[ArmResult]) -> list[ArmResult]:
    """Return the arms whose experts are shown: the first, the last and one between, where there are many."""
    routed = [arm for arm in shown if arm.runs[0].metrics.load_WE]
    if len(routed) <= MOST_DETAILED:
        return routed
    return [routed[i] for i in np.linspace(0, len(routed) - 1, MOST_DETAILED).round().astype(int)]


def experts_of(results: Results, arm: ArmResult) -> list[Block]:
    """Return the section on an arm's experts: their load, what they specialise in."""
    load_WE = arm.runs[0].metrics.load_WE
    last_E = [load[-max(1, len(load) // 20) :].mean(0) for load in load_WE]
    fullest, emptiest = (
        max(load.max() * load.size for load in last_E),
        min(load.min() * load.size for load in last_E),
    )
    dead = sum(int((load == 0).sum()) for load in last_E)
    counts = sorted({load.size for load in last_E})
    panels = plots.panel_numbers(len(load_WE))
    some = f" {len(panels)} of {len(load_WE)} routers are drawn." if len(panels) < len(load_WE) else ""
    blocks: list[Block] = [
        Heading(f"The experts of {arm.label}"),
        Text(
            f"{len(load_WE)} router{'s' if len(load_WE) > 1 else ''} over {' or '.join(map(str, counts))} experts. At "
            f"the end of training the fullest expert takes {fullest:.2f} times its fair share of tokens, the emptiest "
            f"{emptiest:.2f} times; {dead or 'no'} expert{'s are' if dead > 1 else ' is'} dead."
        ),
    ]
    drawn = [
        Plot(
            f"expert-load-{arm.name}",
            plots.expert_load(arm),
            f"Load of each expert over training; router 1 is the first after the embedding.{some}",
        )
    ]
    analysis = read_analysis(results.directory, arm.runs[0].run)
    if analysis is None or not analysis.specialisation:
        return [*blocks, Plots(drawn)]
    layers = analysis.specialisation
    classes = list(layers[0].experts[0].class_shares)
    if len({len(layer.experts) for layer in layers}) == 1:
        shares = [[[e.class_shares[c] for c in classes] for e in layer.experts] for layer in layers]
        even = 1 / len(layers[0].experts)
        drawn.append(
            Plot(
                f"token-classes-{arm.name}",
                plots.class_shares(np.array(shares), classes),
                f"Which expert takes which kind of token in held-out text; an even split is {even:.0%} each.{some}",
            )
        )
    found = [
        (layer.layer, number, expert)
        for layer in layers
        for number, expert in enumerate(layer.experts, start=1)
    ]
    only = ""
    if len(found) > MOST_EXPERTS:
        strongest = sorted(found, key=lambda e: -sum(token.lift for token in e[2].tokens))[:MOST_EXPERTS]
        found = sorted(strongest, key=lambda e: e[:2])
        only = f" Of all experts only the {MOST_EXPERTS} with the strongest preferences are listed."
    rows: list[list[Cell]] = [
        [f"{layer + 1} · {number}", f"{expert.share:.1%}", Literals([token.text for token in expert.tokens])]
        for layer, number, expert in found
    ]
    known = ", ".join(f"{layer.information:.0%}" for layer in layers)
    return [
        *blocks,
        Plots(drawn),
        Text(
            "**What they specialise in.** How much of the choice of an expert the token alone explains (mutual "
            f"information over the entropy of the choice), router by router: {known}. The table names the tokens "
            "that each expert is given more often than its load explains, in "
            f"{layers[0].assignments:,} held-out tokens.{only}"
        ),
        Table(["Router · expert", "Load", "Most over-represented tokens"], rows, prose=True),
    ]
