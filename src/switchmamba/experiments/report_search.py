"""The part of a report on the search: what each point came to, and what each arm chose."""

import math
from collections.abc import Sequence

from switchmamba.experiments import plots
from switchmamba.experiments.document import Block, Cell, Heading, Plot, Plots, Table, Text
from switchmamba.experiments.results import ArmResult, Results


def search(results: Results) -> list[Block]:
    """Return the section on the search of the arms that have one: every point's loss, and which was chosen."""
    searched = [arm for arm in results.arms if len(arm.candidates) > 1]
    if not searched:
        return []
    fields = [name.rsplit(".", 1)[-1].replace("_", " ") for name, _ in searched[0].candidates[0].run.point]
    rows: list[list[Cell]] = []
    for arm in searched:
        for result in arm.candidates:
            loss = result.selected_loss(results.experiment.selection)
            state = (
                "diverged" if result.diverged else f"{loss:.3f}" if math.isfinite(loss) else "not finished"
            )
            chosen = arm.chosen is not None and result.run == arm.chosen.run
            rows.append(
                [
                    arm.label,
                    *(f"{value:g}" for _, value in result.run.point),
                    f"**{state}**" if chosen else state,
                ]
            )
    what = "held-out loss" if results.experiment.selection == "validation_loss" else "smoothed training loss"
    at_edge = [arm.label for arm in searched if _at_edge(arm)]
    edge = (
        f" For {_and(at_edge)} the best lies at the edge of the grid: a wider one might end lower."
        if at_edge
        else ""
    )
    points = {tuple(result.run.point for result in arm.candidates) for arm in results.arms}
    same = len(points) == 1
    blocks: list[Block] = [
        Heading(f"The search over {' and '.join(fields)}"),
        Text(
            f"{'The same points for every arm' if same else 'Each arm over points of its own'}, with seed "
            f"{results.experiment.seeds[0]}; the lowest final {what} is chosen (bold), and only it is run with the "
            f"other seeds.{edge}"
        ),
    ]
    if len(fields) == 1 and all(
        isinstance(v, (int, float)) for arm in searched for r in arm.candidates for _, v in r.run.point
    ):
        blocks.append(
            Plots(
                [
                    Plot(
                        "search",
                        plots.search(results),
                        f"Final {what} over the {fields[0]}; the choice is ringed.",
                    )
                ]
            )
        )
    blocks.append(Table(["Arm", *fields, f"Final {what}"], rows))
    return blocks


def _at_edge(arm: ArmResult) -> bool:
    """Tell whether what an arm's search chose is, in some field, the lowest or highest number that was tried."""
    if arm.chosen is None:
        return False
    for name, value in arm.chosen.run.point:
        tried = {dict(result.run.point)[name] for result in arm.candidates}
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in tried)
        if len(tried) > 1 and numbers and value in (min(tried), max(tried)):
            return True
    return False


def _and(names: Sequence[str]) -> str:
    return " and ".join([*filter(None, [", ".join(names[:-1])]), *names[-1:]])
