"""Curves drawn in characters: bars of block elements for one curve, and points with letters for several at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.text import Text

LEVELS = " ▁▂▃▄▅▆▇█"
WIDTH, HEIGHT = 72, 8
LINE_WIDTH = 16
MARKS = "abcdefghijklmnopqrstuvwxyz"
"""Letters of curves; colours alone would not survive a pipe."""
COLOURS = ("blue", "dark_orange3", "green", "magenta", "red", "cyan", "yellow", "bright_blue")
BETWEEN = "·"
"""Mark of a curve between two of its points."""


def draw_curve(points: Sequence[tuple[int, float]], width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    """Return lines of text that draw (step, value) points as columns; a column is the mean of its points."""
    if not points:
        return []
    columns = _columns(points, width)
    low, high = min(columns), max(columns)
    # A flat curve must not divide by zero.
    span = (high - low) or 1.0
    # The lowest value still gets one eighth, or its column would look empty.
    eighths = [1 + round((value - low) / span * (height * 8 - 1)) for value in columns]
    lines = []
    for row in reversed(range(height)):
        cells = "".join(LEVELS[min(8, max(0, e - row * 8))] for e in eighths)
        label = f"{high:8.3f}" if row == height - 1 else f"{low:8.3f}" if row == 0 else " " * 8
        lines.append(f"{label} │{cells}")
    first, last = str(points[0][0]), str(points[-1][0])
    lines.append(f"{'step':>8} └{first}{' ' * max(1, len(columns) - len(first) - len(last))}{last}")
    return lines


def draw_line(values: Sequence[float], width: int = LINE_WIDTH) -> str:
    """Return one line of text that draws values as blocks, the lowest as the smallest."""
    columns = _columns(list(enumerate(values)), width)
    low, span = min(columns), (max(columns) - min(columns)) or 1.0
    return "".join(LEVELS[1 + round((value - low) / span * (len(LEVELS) - 2))] for value in columns)


def draw_overlay(
    curves: Sequence[Sequence[tuple[float, float]]], axis: str, width: int = WIDTH, height: int = 2 * HEIGHT
) -> list[Text]:
    """Return lines that draw several curves of (x, value) points on the same axes; the nth has the nth letter.

    Where curves meet, the first one is on top. Nothing where no curve has a point.
    """
    points = [point for curve in curves for point in curve]
    if not points:
        return []
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    # Flat curves, and curves of one point, must not divide by zero.
    per_column, per_row = (last - first) / (width - 1) or 1.0, (high - low) / (height - 1) or 1.0
    cells: dict[tuple[int, int], tuple[str, str]] = {}
    topmost_last = [(COLOURS[n % len(COLOURS)], MARKS[n % len(MARKS)], curve) for n, curve in enumerate(curves)][::-1]
    for style, _, curve in topmost_last:
        for (x, y), (next_x, next_y) in pairwise(curve):
            for column in range(round((x - first) / per_column), round((next_x - first) / per_column) + 1):
                share = min(1.0, max(0.0, (first + column * per_column - x) / ((next_x - x) or 1.0)))
                cells[round((high - y - share * (next_y - y)) / per_row), column] = BETWEEN, style
    for style, mark, curve in topmost_last:
        for x, y in curve:
            cells[round((high - y) / per_row), round((x - first) / per_column)] = mark, style
    lines = []
    for row in range(height):
        label = f"{high:8.3f}" if row == 0 else f"{low:8.3f}" if row == height - 1 else " " * 8
        line = Text(f"{label} │")
        for column in range(width):
            line.append(*cells.get((row, column), (" ", "")))
        line.rstrip()
        lines.append(line)
    start, end = f"{first:,.0f}", f"{last:,.0f}"
    lines.append(Text(f"{axis:>8} └{start}{' ' * max(1, width - len(start) - len(end))}{end}"))
    return lines


def _columns(points: Sequence[tuple[int, float]], width: int) -> list[float]:
    count = min(width, len(points))
    edges = [round(index * len(points) / count) for index in range(count + 1)]
    return [sum(v for _, v in points[a:b]) / (b - a) for a, b in pairwise(edges)]
