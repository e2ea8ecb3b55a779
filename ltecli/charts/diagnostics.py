"""Tables of a run's diagnostics: first, last, least and largest values, and their course."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from ltecli.charts.curve import draw_line
from ltecli.console import plain_table

LABELS = {
    "cosine": "cosine between heads",
    "grassmann_rad": "Grassmann distance between heads",
    "grassmann_limit_rad": "  where all is orthogonal",
    "effective_rank": "effective rank of the merge",
    "stable_rank": "stable rank of the merge",
    "first_directions_share": "share in the first directions",
    "drift_mean": "drift of a device, mean",
    "drift_max": "drift of a device, largest",
    "noise_scale_samples": "gradient noise scale, samples",
    "noise_scale_tokens": "gradient noise scale, tokens",
    "own_sent_bytes": "bytes sent for these figures, all devices",
}
"""Labels of the rows, in order; simulate.training.diagnostics defines the figures."""


def number(value: float | None) -> str:
    """Return a figure with three digits, "-" for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def diagnostics_table(points: Sequence[dict[str, Any]]) -> Table:
    """Return the table of one run's diagnostics, given oldest first; there must be one."""
    first, last = points[0]["step"], points[-1]["step"]
    table = plain_table(
        f"diagnostics, {len(points)}x", f"step {first:,}", f"step {last:,}", "least", "most", "over the run"
    )
    for key, label in LABELS.items():
        values = [point[key] for point in points if key in point]
        if values:
            ends = (points[0].get(key), points[-1].get(key), min(values), max(values))
            table.add_row(label, *map(number, ends), draw_line(values))
    return table


def last_rows(runs: Sequence[Sequence[dict[str, Any]]]) -> list[tuple[str, list[str]]]:
    """Return rows that compare several runs' newest diagnostics; none where no run was diagnosed."""
    # A run without diagnoses keeps its column, with dashes.
    newest = [points[-1] if points else {} for points in runs]
    return [
        (f"last {label.strip()}", [number(point.get(key)) for point in newest])
        for key, label in LABELS.items()
        if any(key in point for point in newest)
    ]
