"""Drawings of a timeline: bars of characters for a terminal, and an SVG file."""

from __future__ import annotations

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
LEFT, RIGHT, ROW, HEAD, FOOT, BREADTH = 190, 20, 26, 56, 40, 760
"""Sizes of the picture's parts, in pixels."""


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


def svg(timeline: Timeline, title: str, names: dict[int, str]) -> str:
    """Return an SVG document with one row for each drawn device."""
    devices = sorted({span.device for span in timeline.spans})
    end_s = max((span.end_s for span in timeline.spans), default=0.0) or 1.0
    height = HEAD + ROW * len(devices) + FOOT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + BREADTH + RIGHT}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{escape(title)}</text>',
        *_key(),
    ]
    for row, device in enumerate(devices):
        top = HEAD + row * ROW
        lines.append(f'<text x="10" y="{top + 15}">{escape(names.get(device, f"device {device}"))}</text>')
        lines += [_block(span, top, end_s) for span in timeline.spans if span.device == device]
    return "\n".join([*lines, *_axis(HEAD + ROW * len(devices), end_s), "</svg>", ""])


def _key() -> list[str]:
    lines = []
    for column, kind in enumerate(KINDS):
        left = LEFT + 110 * column
        lines.append(f'<rect x="{left}" y="30" width="12" height="12" fill="{COLOURS[kind]}"/>')
        lines.append(f'<text x="{left + 17}" y="41">{kind}</text>')
    return lines


def _block(span: Span, top: int, end_s: float) -> str:
    left, breadth = LEFT + BREADTH * span.start_s / end_s, BREADTH * (span.end_s - span.start_s) / end_s
    label = f"{span.kind}, {seconds_text(span.end_s - span.start_s)}"
    return (
        f'<rect x="{left:.2f}" y="{top}" width="{breadth:.2f}" height="{ROW - 6}" fill="{COLOURS[span.kind]}">'
        f"<title>{escape(label)}</title></rect>"
    )


def _axis(top: int, end_s: float) -> list[str]:
    lines = []
    for part in range(5):
        left = LEFT + BREADTH * part / 4
        lines.append(
            f'<line x1="{left:.1f}" y1="{HEAD}" x2="{left:.1f}" y2="{top}" stroke="#868e96" stroke-width="0.5"/>'
        )
        label = seconds_text(end_s * part / 4) if part else "0"
        lines.append(f'<text x="{left:.1f}" y="{top + 18}" text-anchor="middle">{escape(label)}</text>')
    return lines
