"""Drawings of a timeline: bars of characters for a terminal, and an SVG file.

Waiting shows at one glance in a picture, and hides in a table. `lte plan --timeline` prints the bars, and
--timeline-svg writes the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from rich.text import Text

from simulate.common.units import seconds_text
from simulate.timeline.engine import KINDS, Span, Timeline

MARKS = {"compute": "█", "exchange": "▒", "wait": "·", "away": " "}
STYLES = {"compute": "green", "exchange": "blue", "wait": "yellow", "away": "dim"}
COLOURS = {"compute": "#2f9e44", "exchange": "#1c7ed6", "wait": "#f08c00", "away": "#dee2e6"}
BAR = 60
"""Width of a bar, in characters."""
LEFT, RIGHT, ROW, HEAD, FOOT, BREADTH = 190, 20, 26, 56, 60, 760
"""Sizes of the picture's parts, in pixels; LEFT grows with the longest label, BREADTH with the title."""
CHARACTER, TITLE_CHARACTER = 7.5, 8.5
"""Pixels of a character of a label and of the title, with room to spare in most sans-serif fonts."""


def bars(timeline: Timeline, width: int = BAR) -> dict[int, Text]:
    """Return a bar for each drawn device; a character shows what it did for most of that slot of time."""
    end_s = max((span.end_s for span in timeline.spans), default=0.0)
    devices = sorted({span.device for span in timeline.spans})
    return {device: _bar([s for s in timeline.spans if s.device == device], end_s, width) for device in devices}


def _bar(spans: Sequence[Span], end_s: float, width: int) -> Text:
    text, slot_s = Text(), end_s / width
    for slot in range(width):
        start_s, stop_s = slot * slot_s, (slot + 1) * slot_s
        shares = dict.fromkeys(KINDS, 0.0)
        for span in spans:
            shares[span.kind] += max(0.0, min(span.end_s, stop_s) - max(span.start_s, start_s))
        kind = max(shares, key=lambda name: shares[name])
        # No span touches the slot: the device was away.
        kind = kind if shares[kind] else "away"
        text.append(MARKS[kind], style=STYLES[kind])
    return text


def legend() -> str:
    """Return the meaning of a bar's characters."""
    return ", ".join(f"{MARKS[kind]} {kind}" for kind in KINDS if kind != "away") + ", blank: away"


def devices_text(timeline: Timeline) -> str:
    """Return a line that says which devices are not drawn; empty where all are."""
    drawn = sorted({span.device for span in timeline.spans})
    if len(drawn) == timeline.devices:
        return ""
    return f"drawn are {len(drawn)} of {timeline.devices:,} devices: {', '.join(map(str, drawn))}"


def svg(timeline: Timeline, title: str, names: dict[int, str]) -> str:
    """Return an SVG document with one row for each drawn device."""
    devices = sorted({span.device for span in timeline.spans})
    labels = [names.get(device, f"device {device}") for device in devices]
    left = max(LEFT, math.ceil(20 + CHARACTER * max(map(len, labels), default=0)))
    # What follows takes the breadth as it is, so the title widens it.
    breadth = max(BREADTH, math.ceil(TITLE_CHARACTER * len(title)) - left)
    end_s = max((span.end_s for span in timeline.spans), default=0.0) or 1.0
    height = HEAD + ROW * len(devices) + FOOT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + breadth + RIGHT}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{escape(title)}</text>',
        *_key(left),
    ]
    pixels_per_s = breadth / end_s
    for row, (device, text) in enumerate(zip(devices, labels, strict=True)):
        top = HEAD + row * ROW
        lines.append(f'<text x="10" y="{top + 15}">{escape(text)}</text>')
        lines += [_block(span, left, top, pixels_per_s) for span in timeline.spans if span.device == device]
    lines += _axis(left, HEAD + ROW * len(devices), breadth, end_s)
    if left_out := devices_text(timeline):
        lines.append(f'<text x="10" y="{height - 10}">{escape(left_out)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _key(left: int) -> list[str]:
    lines = []
    for column, kind in enumerate(KINDS):
        start = left + 110 * column
        lines.append(f'<rect x="{start}" y="30" width="12" height="12" fill="{COLOURS[kind]}"/>')
        lines.append(f'<text x="{start + 17}" y="41">{kind}</text>')
    return lines


def _block(span: Span, start: int, top: int, pixels_per_s: float) -> str:
    left, breadth = start + pixels_per_s * span.start_s, pixels_per_s * (span.end_s - span.start_s)
    label = f"{span.kind}, {seconds_text(span.end_s - span.start_s)}"
    return (
        f'<rect x="{left:.2f}" y="{top}" width="{breadth:.2f}" height="{ROW - 6}" fill="{COLOURS[span.kind]}">'
        f"<title>{escape(label)}</title></rect>"
    )


def _axis(start: int, top: int, breadth: int, end_s: float) -> list[str]:
    lines = []
    for part in range(5):
        left = start + breadth * part / 4
        lines.append(
            f'<line x1="{left:.1f}" y1="{HEAD}" x2="{left:.1f}" y2="{top}" stroke="#868e96" stroke-width="0.5"/>'
        )
        label = seconds_text(end_s * part / 4) if part else "0"
        anchor = "end" if part == 4 else "middle"  # the drawing ends close behind the last one
        lines.append(f'<text x="{left:.1f}" y="{top + 18}" text-anchor="{anchor}">{escape(label)}</text>')
    return lines
