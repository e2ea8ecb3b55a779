"""Text of byte counts, seconds and ranges of seconds, for plans, reports and progress lines."""

from __future__ import annotations

import math

Unit = tuple[float, str]
"""Size of a unit in SI, and its name."""
BYTES: tuple[Unit, ...] = ((1, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB"))
SECONDS: tuple[tuple[float, Unit], ...] = (
    (1e-3, (1e-6, "us")), (1, (1e-3, "ms")), (120, (1, "s")), (7200, (60, "min")), (172800, (3600, "h")),
    (math.inf, (86400, "days")),
)  # fmt: skip
"""Seconds below which a unit fits → the unit."""


def bytes_unit(num_bytes: float) -> Unit:
    """Return the decimal unit that fits a number of bytes: 1 MB is 10^6 bytes."""
    return next((unit for unit in BYTES if abs(num_bytes) < 1000 * unit[0]), BYTES[-1])


def seconds_unit(seconds: float) -> Unit:
    """Return the unit that fits a time."""
    return next(unit for limit, unit in SECONDS if seconds < limit or limit == math.inf)


def bytes_text(num_bytes: float | None, unit: Unit | None = None) -> str:
    """Return a number of bytes in a unit, by default the one that fits, or "-" for None."""
    if num_bytes is None:
        return "-"
    size, name = unit or bytes_unit(num_bytes)
    return f"{num_bytes:,.0f} B" if name == "B" else f"{figure_text(num_bytes / size)} {name}"


def figure_text(value: float) -> str:
    """Return three digits of a number, or all those before the point, and never an exponent: 1,283, not 1.28e+03."""
    text = f"{value:.3g}"
    return f"{value:,.0f}" if "e+" in text else text


def seconds_text(seconds: float | None, unit: Unit | None = None) -> str:
    """Return seconds in a unit, by default the one that fits, or "-" for None."""
    if seconds is None:
        return "-"
    size, name = unit or seconds_unit(seconds)
    return f"{figure_text(seconds / size)} {name}"


TIMES = 2.0
"""Ratio from which a change is told as a multiple, not in per cent."""


def change_text(ratio: float, less: str = "less") -> str:
    """Return a ratio in words: 12 % more, 4.2 times fewer."""
    if not 1 / TIMES < ratio < TIMES:
        return f"{figure_text(max(ratio, 1 / ratio))} times {'more' if ratio > 1 else less}"
    return "the same" if round(ratio, 2) == 1 else f"{abs(ratio - 1):.0%} {'more' if ratio > 1 else less}"


ORDERS = (
    (1e-3, "1 ms"), (1e-2, "10 ms"), (0.1, "0.1 s"), (1, "a second"), (10, "10 s"), (60, "a minute"), (600, "10 min"),
    (3600, "an hour"), (36000, "10 h"), (86400, "a day"), (864000, "10 days"), (8.64e6, "100 days"),
)  # fmt: skip


def order_text(seconds: float) -> str:
    """Return the order of magnitude of seconds that are hardly known: about a minute."""
    nearest = min(ORDERS, key=lambda order: abs(math.log(max(seconds, 1e-9) / order[0])))
    beyond = "under" if seconds < ORDERS[0][0] / 3 else "over" if seconds > 3 * ORDERS[-1][0] else "about"
    return f"{beyond} {nearest[1]}"


def range_text(low_s: float, high_s: float, unit: Unit | None = None) -> str:
    """Return a range in a unit, by default that of its upper end: 3.1-5.4 h; a range of equal ends as one figure."""
    if low_s == high_s:
        return seconds_text(low_s, unit)
    size, name = unit or seconds_unit(high_s)
    high = figure_text(high_s / size)
    if unit is None:  # both ends scaled alike, so that their printed ratio is the ranges' own
        size = high_s / float(high.replace(",", ""))
    return f"{figure_text(low_s / size)}-{high} {name}"
