"""A document of headings, text, tables, plots and code, as one self-contained HTML page or as Markdown with PNGs.

Text is plain, with two marks: ``**strong**`` and backticks for code. The page needs no network, no scripts
and no fonts; it is legible on a phone and follows the reader's light or dark setting.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from switchmamba.experiments.plot_style import INKS, png, svg


@dataclass(frozen=True)
class Heading:
    """A heading of the second level; the title has the first."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; ``lead`` sets the one that a hurried reader should read."""

    text: str
    lead: bool = False


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Literals:
    """A table cell that holds pieces of text as they are, spaces and line breaks made visible."""

    pieces: Sequence[str]


Cell = str | Literals


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first column is left-aligned, the others too if ``prose``, else right-aligned."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    prose: bool = False


@dataclass(frozen=True)
class Plot:
    """A figure. ``name`` is its file name in Markdown; ``caption`` says what to see."""

    name: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class Plots:
    """Plots that stand side by side where there is room."""

    plots: Sequence[Plot]


@dataclass(frozen=True)
class Code:
    """Text as it is; ``language`` for Markdown's highlighting."""

    text: str
    language: str = ""


Block = Heading | Text | Items | Table | Plots | Code


@dataclass(frozen=True)
class Document:
    """A title and what follows it."""

    title: str
    blocks: Sequence[Block]

    def html(self) -> str:
        """Return the page."""
        body = "\n".join(_html_block(block) for block in self.blocks)
        return _PAGE.format(title=html.escape(self.title), light=_inks(1), dark=_inks(2), body=body)

    def markdown(self, images: str) -> tuple[str, Mapping[str, bytes]]:
        """Return the text, and the PNG files it shows by name; ``images`` is their folder as the text names it."""
        parts = [f"# {self.title}", *(_markdown_block(block, images) for block in self.blocks)]
        plots = [plot for block in self.blocks if isinstance(block, Plots) for plot in block.plots]
        return "\n\n".join(parts) + "\n", {f"{plot.name}.png": png(plot.figure) for plot in plots}

    def write_html(self, path: Path) -> None:
        """Write the page to ``path``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")

    def write_markdown(self, path: Path) -> None:
        """Write the text to ``path``, and its plots into the folder of the same name beside it."""
        folder = path.with_suffix("")
        text, images = self.markdown(folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in images.items():
            (folder / name).write_bytes(content)
        path.write_text(text, encoding="utf-8")


def visible(piece: str) -> str:
    """Make white space visible: ``·`` for a space (``·×8`` for many), ``⏎`` for a line break, ``⇥`` for a tab."""
    shortened = re.sub(r" {5,}", lambda spaces: f"·×{len(spaces[0])}", piece)
    return shortened.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def _inks(index: int) -> str:
    return " ".join(f"--{name}: {values[index]};" for name, values in INKS.items())


def _inline(text: str) -> str:
    escaped = html.escape(text, quote=False)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped)


def _html_block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{_inline(text)}</h2>"
        case Text(text, lead):
            return f'<p class="lead">{_inline(text)}</p>' if lead else f"<p>{_inline(text)}</p>"
        case Items(items):
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Code(text):
            return f"<pre><code>{html.escape(text, quote=False)}</code></pre>"
        case Plots(plots):
            return '<div class="plots">' + "".join(_html_plot(plot) for plot in plots) + "</div>"
        case Table():
            return _html_table(block)


def _html_plot(plot: Plot) -> str:
    # Identifiers inside an SVG are global to the page: two figures must not share them.
    drawing = re.sub(r'((?:id="|href="#|url\(#))', rf"\g<1>{plot.name}-", svg(plot.figure))
    label = html.escape(plot.caption)
    drawing = drawing.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f"<figure>{drawing}<figcaption>{_inline(plot.caption)}</figcaption></figure>"


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{_inline(column)}</th>" for column in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{_html_cell(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    # The note stands outside the box that scrolls, or a phone would cut it off with the table's right side.
    note = f'<p class="note">{_inline(table.caption)}</p>' if table.caption else ""
    kind = ' class="prose"' if table.prose else ""
    # A box that scrolls is reached by the keyboard only with a tab stop.
    content = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="wide" tabindex="0"><table{kind}>{content}</table></div>{note}'


def _html_cell(cell: Cell) -> str:
    if isinstance(cell, Literals):
        return " ".join(f"<code>{html.escape(visible(piece), quote=False)}</code>" for piece in cell.pieces)
    return _inline(cell)


def _markdown_block(block: Block, images: str) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Text(text, lead):
            return f"**{text.replace('**', '')}**" if lead else text
        case Items(items):
            return "\n".join(f"- {item}" for item in items)
        case Code(text, language):
            return f"```{language}\n{text}\n```"
        case Plots(plots):
            return "\n\n".join(
                f"![{plot.name.replace('-', ' ')}]({images}/{plot.name}.png)\n\n*{plot.caption}*"
                for plot in plots
            )
        case Table():
            return _markdown_table(block)


def _markdown_table(table: Table) -> str:
    others = " --- |" if table.prose else " ---: |"
    lines = [
        f"| {' | '.join(table.columns)} |",
        "| --- |" + others * (len(table.columns) - 1),
        *(f"| {' | '.join(_markdown_cell(cell) for cell in row)} |" for row in table.rows),
    ]
    caption = f"\n\n*{table.caption}*" if table.caption else ""
    return "\n".join(lines) + caption


def _markdown_cell(cell: Cell) -> str:
    if isinstance(cell, Literals):
        return " ".join(_markdown_literal(visible(piece)) for piece in cell.pieces)
    return cell.replace("|", "\\|")


def _markdown_literal(piece: str) -> str:
    escaped = piece.replace("|", "\\|")
    return f"`` {escaped} ``" if "`" in escaped else f"`{escaped}`"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ {light} --paper: #fdfcfa; --panel: #f4f2ee; color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} --paper: #16181b; --panel: #212428; }} }}
html {{ -webkit-text-size-adjust: 100%; }}
body {{ margin: 0 auto; max-width: 66rem; padding: clamp(1.2rem, 4vw, 3.5rem) clamp(1rem, 4vw, 2.5rem) 4rem;
  background: var(--paper); color: var(--ink);
  font: 1.06rem/1.6 Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, "Liberation Serif", serif;
  text-rendering: optimizeLegibility; hanging-punctuation: first last; }}
h1 {{ font-size: clamp(1.7rem, 1.2rem + 2.4vw, 2.5rem); line-height: 1.15; font-weight: 600; letter-spacing: -0.012em;
  margin: 0 0 1rem; text-wrap: balance; }}
h2 {{ font-size: 1.35rem; line-height: 1.25; font-weight: 600; margin: 2.8rem 0 .7rem; padding-top: 1.1rem;
  border-top: 1px solid var(--rule); }}
p, ul, figcaption {{ max-width: 44rem; text-wrap: pretty; }}
p {{ margin: .7rem 0; }}
p.lead {{ font-size: 1.2rem; line-height: 1.5; }}
ul {{ padding-left: 1.2rem; }}
li {{ margin: .25rem 0; }}
table, figure, .note {{
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.6rem 2.4rem;
  align-items: start; margin: 1.4rem 0; }}
figure {{ margin: 0; }}
figure svg {{ display: block; width: 100%; height: auto; max-width: 36rem; }}
figcaption, .note {{ color: var(--soft); font-size: .86rem; line-height: 1.45; margin-top: .5rem; }}
.wide {{ overflow-x: auto; margin: 1.2rem 0 0;
  background: linear-gradient(to left, var(--paper) 40%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--soft), transparent) right / .5rem 100% no-repeat scroll; }}
table {{ border-collapse: collapse; font-size: .88rem; line-height: 1.4;
  font-variant-numeric: tabular-nums lining-nums; min-width: min(100%, 44rem); }}
th {{ font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--soft); vertical-align: bottom; }}
th, td {{ padding: .4rem .9rem .4rem 0; text-align: right; }}
th:first-child, td:first-child, .prose th, .prose td {{ text-align: left; }}
th:first-child, td:first-child {{ position: sticky; left: 0; background: var(--paper); }}
td {{ white-space: nowrap; }}
.prose td:last-child {{ white-space: normal; }}
td {{ border-bottom: 1px solid var(--rule); vertical-align: top; }}
code {{ font: .86em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: var(--panel); padding: .08em .32em; border-radius: .25em;
  white-space: pre-wrap; overflow-wrap: anywhere; }}
.prose td code {{ display: inline-block; margin: .08rem 0; }}
pre {{ background: var(--panel); padding: .9rem 1.1rem; border-radius: .4rem; overflow-x: auto;
  font-size: .92rem; line-height: 1.5; }}
pre code {{ background: none; padding: 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
@media print {{ body {{ max-width: none; }} figure {{ break-inside: avoid; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
