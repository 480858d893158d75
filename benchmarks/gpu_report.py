"""What the GPU benchmark measured, as rows of one shape: ours, the peer, the floor, the target."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BANDWIDTH = 4.25e12
"""Bytes per second of a large copy on an H200, read and written together; the floor of what moves data."""
MATMUL = 680e12
"""FLOP/s of a bf16 matrix product of 8192³ on an H200; the floor of what multiplies."""


@dataclass(frozen=True)
class Row:
    """One measured quantity.

    Attributes:
        what: the operation, its shape, and which part of it.
        ours: in ``unit``; of "tok/s" more is better, of everything else less.
        peer: the same of ``peer_name``; ``peer_here``: measured in this run, not earlier on the same kind of machine.
        floor: no implementation can be faster: bytes over :data:`BANDWIDTH` or operations over :data:`MATMUL`.
        target: what issue 3 asks for.
        note: anything else, in words.
    """

    what: str
    ours: float
    unit: str = "ms"
    peer: float | None = None
    peer_name: str = ""
    peer_here: bool = False
    floor: float | None = None
    target: float | None = None
    note: str = ""

    @property
    def more_is_better(self) -> bool:
        return self.unit == "tok/s"

    @property
    def reached(self) -> bool | None:
        if self.target is None:
            return None
        return self.ours >= self.target if self.more_is_better else self.ours <= self.target

    @property
    def ratio(self) -> float | None:
        """How many times faster than the peer."""
        if self.peer is None:
            return None
        return self.ours / self.peer if self.more_is_better else self.peer / self.ours

    @property
    def share_of_floor(self) -> float | None:
        """1: as fast as the hardware allows."""
        if self.floor is None:
            return None
        return self.ours / self.floor if self.more_is_better else self.floor / self.ours

    def cells(self) -> list[str]:
        peer = (
            ""
            if self.peer is None
            else f"{number(self.peer)}{'' if self.peer_here else '*'} {self.peer_name}"
        )
        return [
            self.what,
            f"{number(self.ours)} {self.unit}",
            peer,
            "" if self.ratio is None else f"{self.ratio:.2f} ×",
            "" if self.floor is None else number(self.floor),
            "" if self.share_of_floor is None else f"{100 * self.share_of_floor:.0f}%",
            "" if self.target is None else number(self.target),
            {None: "", True: "yes", False: "**no**"}[self.reached],
            self.note,
        ]


HEADINGS = ("", "ours", "peer", "ratio", "floor", "of floor", "target", "reached", "")


def number(value: float) -> str:
    """Write three digits, and large numbers in full."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def show(row: Row) -> Row:
    """Print a row as soon as it is measured, and return it."""
    headings = ("", "", "peer ", "", "floor ", "", "target ", "reached: ", "")
    cells = [h + c for h, c in zip(headings, row.cells(), strict=True) if c]
    print("  ".join(cells).replace("**", ""), flush=True)
    return row


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table; columns that are empty everywhere are left out."""
    used = [i for i in range(len(headings)) if headings[i] or any(row[i] for row in rows)]
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line[i] for i in used) + " |" for line in lines) + "\n"


def markdown(results: dict[str, Any]) -> str:
    """Write all results as one Markdown document."""
    environment = results["environment"]
    described = ", ".join(f"{name} {value}" for name, value in environment.items())
    command = "`make bench-gpu`, its parts in one or several runs,"
    parts = [f"# GPU benchmark\n\n{command} on {described}.\n"]
    if "checks" in results:
        parts.append(_checks(results["checks"]))
    rows = [Row(**row) for name in results if name.startswith("rows ") for row in results[name]]
    if rows:
        explained = (
            "Floor: bytes over 4.25 TB/s or operations over 680 TFLOP/s, both measured on an H200. "
            "\\* measured earlier on the same kind of machine, not in this run.\n"
        )
        parts.append("## Speed\n\n" + explained + "\n" + table(HEADINGS, [row.cells() for row in rows]))
    for profile in results.get("profiles", ()):
        parts.append(_profile(profile))
    return "\n".join(parts)


def _checks(findings: Sequence[dict[str, Any]]) -> str:
    groups = sorted({(f["operation"], f["backend"], f["dtype"]) for f in findings})
    rows = []
    for group in groups:
        own = [f for f in findings if (f["operation"], f["backend"], f["dtype"]) == group]
        worst = max(own, key=lambda f: f["error"] / f["allowed"])
        wrong = sum(bool(f["problems"]) or not f["error"] <= f["allowed"] for f in own)
        found = [f"{worst['error']:.1e}", f"{worst['allowed']:.1e}", f"{worst['quantity']} ({worst['case']})"]
        rows.append([*group, str(len(own)), str(wrong), *found])
    headings = ("operation", "backend", "dtype", "cases", "wrong", "worst error", "allowed", "of")
    return f"## Against the reference in fp64\n\n{len(findings)} checks.\n\n" + table(headings, rows)


def _profile(profile: dict[str, Any]) -> str:
    total = sum(profile["parts"].values())
    rows = [[part, f"{ms:.2f}", f"{100 * ms / total:.0f}%"] for part, ms in profile["parts"].items()]
    rows.append(["kernels in all", f"{total:.2f}", ""])
    rows.append(["step, by the clock", f"{profile['ms_per_step']:.2f}", ""])
    title = f"## A step of {profile['preset']}, batch {profile['batch']} × {profile['length']}\n\n"
    measured = (
        f"{profile['tokens_per_second']:,.0f} tokens/s, {100 * profile['mfu']:.1f}% MFU on active parameters, "
        f"{profile['peak_gb']:.1f} GB, {profile['kernels']} kernels. {profile['loading']}\n\n"
    )
    return title + measured + table(("part", "ms", "share"), rows)


def write(results: dict[str, Any], path: Path) -> None:
    """Write ``path`` as JSON and, beside it, as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(results))


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
