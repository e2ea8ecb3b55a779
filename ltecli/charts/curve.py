"""Loss curves drawn in characters: block elements give eight levels in each line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

LEVELS = " ▁▂▃▄▅▆▇█"
WIDTH, HEIGHT = 72, 8
LINE_WIDTH = 16


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


def _columns(points: Sequence[tuple[int, float]], width: int) -> list[float]:
    count = min(width, len(points))
    edges = [round(index * len(points) / count) for index in range(count + 1)]
    return [sum(v for _, v in points[a:b]) / (b - a) for a, b in pairwise(edges)]
