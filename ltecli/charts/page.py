"""Self-contained HTML pages: text, tables and figures, with plotly's basic bundle and all data inside the file.

`lte report --html` (report_page.py) and `lte plan --html` (plan_page.py) say what is on a page; this module makes the
document. A browser that opens it sends no request: a content security policy forbids them. Python computes the figures,
assets/page.js draws them, and assets/page.css has the colours of the light and the dark scheme.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from ltecli.output_paths import check_file
from simulate.common.errors import InputError

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
HTML_OPTION = "--html"
SIGNIFICANT = 6
"""Digits of a drawn number: more than a screen shows."""


@dataclass(frozen=True)
class Trace:
    """Points of one kind in a figure: a curve, dots or bars."""

    name: str
    colour: str
    """Name of a colour in page.css, without its dashes."""
    columns: dict[str, list[float | None]]
    """Coordinates by name; a view takes two of them."""
    kind: str = "line"
    """line (with its points), course (a line alone), dots, diamonds, ring, bar, or front (a frontier)."""
    text: list[str] = field(default_factory=list)
    """Words of each point, shown when it is hovered over."""
    run: int | None = None
    """Number of the run that it belongs to, which the key above the figures can hide."""
    label: str = ""
    """Label beside the last point."""
    only: int | None = None
    """The only view that shows it; None: all do."""


@dataclass(frozen=True)
class View:
    """A choice of coordinates of a figure; a figure with several has a switch."""

    label: str
    x: str
    y: str
    x_title: str
    y_title: str
    x_log: bool = False
    y_log: bool = False
    x_kind: str = ""
    """bytes or seconds, whose points are told in the unit that fits each."""
    x_scale: float = 1.0
    """Bytes or seconds of one unit of the axis."""
    y_kind: str = ""
    y_scale: float = 1.0
    x_ticks: Sequence[tuple[float, str]] = ()
    """Ticks of a logarithmic axis, in units of the axis; none: as the library sets them."""
    y_ticks: Sequence[tuple[float, str]] = ()
    x_limit: tuple[float, str] | None = None
    """A line across the figure, and its words."""


@dataclass(frozen=True)
class Figure:
    """A figure of a page, drawn by page.js."""

    name: str
    """Identifier in the document."""
    views: Sequence[View]
    traces: Sequence[Trace]
    about: str
    """The figure in a sentence, for readers who cannot see it."""
    rows: Sequence[str] = ()
    """Labels of bars; the y coordinate of a bar is its number."""
    groups: Sequence[tuple[float, str]] = ()
    """Titles above groups of bars, and their y coordinates."""
    notes: Sequence[tuple[dict[str, float], float, str]] = ()
    """Words at the ends of bars: x by the name of its coordinate, y, text."""
    key: Sequence[tuple[str, str]] = ()
    """Colours and what they mean, listed above the figure."""
    height: int = 380
    switch: str = ""
    """Label of the switch between views."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figure as page.js reads it; empty parts are left out."""
        document = {
            "views": [_filled(vars(view)) for view in self.views],
            "traces": [
                {
                    **_filled(
                        {**vars(trace), "columns": None, "text": [escape(text, quote=False) for text in trace.text]}
                    ),
                    # Plotly reads tags in texts, so that names must not have any.
                    "name": escape(trace.name, quote=False),
                    "label": escape(trace.label, quote=False),
                    "columns": {key: [_rounded(v) for v in values] for key, values in trace.columns.items()},
                }
                for trace in self.traces
            ],
            "rows": [escape(row, quote=False) for row in self.rows],
            "groups": [(y, escape(text, quote=False)) for y, text in self.groups],
            "notes": [
                ({key: _rounded(value) for key, value in x.items()}, y, escape(text, quote=False))
                for x, y, text in self.notes
            ],
            "height": self.height,
        }
        return _filled(document)


def _filled(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None and value not in ("", [], (), False)}


def _rounded(value: float | None) -> float | None:
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.{SIGNIFICANT}g}")


@dataclass(frozen=True)
class Section:
    """A part of a page; all strings but `html` are plain text."""

    title: str
    lead: str = ""
    figure: Figure | None = None
    html: str = ""
    """Further content as HTML, of `table` or `listing`."""
    command: str = ""
    """Command line that prints the figures."""


@dataclass(frozen=True)
class Page:
    """A whole page; all strings are plain text."""

    title: str
    verdict: str
    sections: Sequence[Section]
    command: str
    """Command line that made the page."""
    kind: str
    """Heading of small print above the title."""
    alarm: str = ""
    """A caveat under the verdict."""
    runs: Sequence[tuple[str, str]] = ()
    """Colours and names of several runs, for the key that hides and shows them."""
    made: str = ""
    """Versions and date, at the foot."""

    def html(self) -> str:
        """Return the document."""
        figures = {section.figure.name: section.figure.to_dict() for section in self.sections if section.figure}
        # Within a script element only this character could end it.
        data = json.dumps(figures, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        alarm = f'<p class="alarm">{escape(self.alarm)}</p>' if self.alarm else ""
        return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="lte">
<link rel="icon" href="data:,">
<title>{escape(self.title)}</title>
<style>
{_asset("page.css")}</style>
</head>
<body>
<main>
<header>
<p class="kind">{escape(self.kind)}</p>
<h1>{escape(self.title)}</h1>
<p class="verdict">{escape(self.verdict)}</p>
{alarm}
</header>
<noscript><p class="alarm">The figures need JavaScript; texts and tables are complete without it.</p></noscript>
{self._key()}
{"".join(_section_html(section) for section in self.sections)}
<footer>
<p>This page was made by</p>
{_command_html(self.command)}
<p>{escape(self.made)}</p>
</footer>
</main>
<script type="application/json" id="figures">{data}</script>
<script>
{_asset("plotly-basic.min.js")}
</script>
<script>
{_asset("page.js")}</script>
</body>
</html>
"""

    def _key(self) -> str:
        if len(self.runs) < 2:
            return ""
        chips = "".join(
            f'<button type="button" class="chip" data-run="{number}" aria-pressed="true" title="hide or show">'
            f"{_swatch(colour)}{escape(name)}</button>"
            for number, (colour, name) in enumerate(self.runs)
        )
        return f'<nav class="key" aria-label="runs">{chips}</nav>'


def _asset(name: str) -> str:
    return (files("ltecli.charts") / "assets" / name).read_text(encoding="utf-8")


def _swatch(colour: str) -> str:
    return f'<i class="swatch" style="background:var(--{colour})"></i>'


def _section_html(section: Section) -> str:
    lead = f"<p>{escape(section.lead)}</p>" if section.lead else ""
    figure = _figure_html(section.figure) if section.figure else ""
    command = _command_html(section.command) if section.command else ""
    return f"<section><h2>{escape(section.title)}</h2>{lead}{figure}{section.html}{command}</section>\n"


def _command_html(command: str) -> str:
    return f'<pre class="command"><code>{escape(command)}</code></pre>'


def _figure_html(figure: Figure) -> str:
    switch = ""
    if len(figure.views) > 1:
        choices = "".join(
            f'<label><input type="radio" name="{figure.name}-view" value="{number}"{" checked" if not number else ""}>'
            f"<span>{escape(view.label)}</span></label>"
            for number, view in enumerate(figure.views)
        )
        switch = (
            f'<fieldset class="switch" data-figure="{figure.name}"><legend>{escape(figure.switch)}</legend>'
            f"{choices}</fieldset>"
        )
    key = "".join(f"<li>{_swatch(colour)}{escape(text)}</li>" for colour, text in figure.key)
    return (
        f"<figure>{switch}{f'<ul class=legend>{key}</ul>' if key else ''}"
        f'<div class="plot" id="{figure.name}" style="height:{figure.height}px" role="img" '
        f'aria-label="{escape(figure.about)}"></div></figure>'
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> str:
    """Return a table as HTML; columns after the first are right-aligned, unless they hold `words`.

    On a phone a table of words becomes a list, which needs each cell's heading beside it.
    """
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = ""
    for first, *rest in rows:
        cells = "".join(
            f'<td data-label="{escape(name)}">{escape(cell)}</td>' for name, cell in zip(header[1:], rest, strict=True)
        )
        body += f'<tr><th scope="row"><span>{escape(first)}</span></th>{cells}</tr>'
    kind = "grid words" if words else "grid"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def answers(rows: Sequence[tuple[str, str, str]]) -> str:
    """Return questions with their answers and reasons as HTML."""
    return (
        "<dl>"
        + "".join(
            f"<div><dt>{escape(q)}</dt><dd><strong>{escape(a)}</strong> {escape(why)}</dd></div>" for q, a, why in rows
        )
        + "</dl>"
    )


def listing(lines: Sequence[str]) -> str:
    """Return lines of text as an HTML list; nothing without lines."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def folded(summary: str, html: str) -> str:
    """Return HTML that a click on the summary unfolds."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def check_html(out: Path, force: bool) -> None:
    """Raise InputError where a page cannot be written to a path, or would be named for something else."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{HTML_OPTION} {out}: the page is HTML; name it {out.stem or 'page'}.html")
    check_file(out, force, "page.html", HTML_OPTION)
