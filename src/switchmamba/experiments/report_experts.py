"""The part of a report that looks into routers: which expert takes how many tokens, and which ones."""

from collections.abc import Sequence

import numpy as np

from switchmamba.experiments import plots
from switchmamba.experiments.analysis import read_analysis
from switchmamba.experiments.curves import Floats
from switchmamba.experiments.document import Block, Cell, Heading, Literals, Plot, Plots, Table, Text
from switchmamba.experiments.results import ArmResult, Results, Spread

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


def routing(results: Results, shown: Sequence[ArmResult]) -> list[Block]:
    """Return the section that compares the routers of all arms: how even their loads are, what they drop."""
    routed = [arm for arm in shown if arm.runs[0].metrics.load_WE]
    if not routed:
        return []
    rows: list[list[Cell]] = []
    for arm in routed:
        load_WE = arm.runs[0].metrics.load_WE
        rows.append(
            [
                arm.label,
                f"{len(load_WE)} × {_counts(load_WE)}",
                _dropped(arm),
                arm.over_seeds("fullest_load").text(2),
                arm.over_seeds("emptiest_load").text(2),
                arm.over_seeds("dead_experts").text(0 if len(arm.runs) == 1 else 1),
            ]
        )
    noted = sorted({result.metrics.noted_at_end for arm in routed for result in arm.runs})
    partly = any(0 < len(arm.noting_drops) < len(arm.runs) for arm in routed)
    of_those = ", of the runs that noted it" if partly else ""
    caption = (
        f"At the end of training, mean over {' or '.join(f'{n:,}' for n in noted)} step{'s' if noted != [1] else ''}. "
        f"Dropped: share of assignments that an expert had no room for, mean over the routers{of_those}. Fullest and "
        "emptiest: load of an expert over its fair share, in the router where it is most uneven. Dead: experts that no "
        "token goes to, of all routers."
    )
    columns = ["", "Routers × experts", "Dropped", "Fullest", "Emptiest", "Dead"]
    blocks: list[Block] = [Heading("Routing"), Table(columns, rows, caption)]
    dropping = [arm for arm in routed if any(np.nanmax(m.dropped_W) > 0 for m in arm.noting_drops)]
    if dropping:
        drawn = plots.dropped(results, dropping)
        band = "; the band spans the seeds" if any(len(arm.noting_drops) > 1 for arm in dropping) else ""
        words = f"Share of assignments dropped, mean over the routers{band}."
        blocks.append(Plots([Plot("dropped", drawn, words)]))
    return blocks


def _counts(load_WE: Sequence[Floats]) -> str:
    return " or ".join(str(count) for count in sorted({load.shape[1] for load in load_WE}))


def _dropped(arm: ArmResult) -> str:
    """Write what its runs dropped, of those that noted it."""
    percent = Spread(tuple(100 * metrics.final_dropped for metrics in arm.noting_drops))
    return f"{percent.text(1)}%" if percent.values else "–"


def experts_of(results: Results, arm: ArmResult) -> list[Block]:
    """Return the section on an arm's experts: their load, what they specialise in."""
    metrics = arm.runs[0].metrics
    load_WE, dead = metrics.load_WE, metrics.dead_experts
    panels = plots.panel_numbers(len(load_WE))
    some = f" {len(panels)} of {len(load_WE)} routers are drawn." if len(panels) < len(load_WE) else ""
    blocks: list[Block] = [
        Heading(f"The experts of {arm.label}"),
        Text(
            f"{len(load_WE)} router{'s' if len(load_WE) > 1 else ''} over {_counts(load_WE)} experts. At the end of "
            f"training the fullest expert takes {metrics.fullest_load:.2f} times its fair share of tokens, the "
            f"emptiest {metrics.emptiest_load:.2f} times; "
            f"{dead or 'no'} expert{'s are' if dead > 1 else ' is'} dead."
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
        even = 100 / len(layers[0].experts)
        drawn.append(
            Plot(
                f"token-classes-{arm.name}",
                plots.class_shares(np.array(shares), classes),
                f"Which expert takes which kind of token in held-out text; an even split is {even:.3g}% each.{some}",
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
