"""Text of byte counts, seconds and ranges of seconds, for plans, reports and progress lines."""

from __future__ import annotations

import math


def bytes_text(num_bytes: float | None) -> str:
    """Return a number of bytes in the decimal unit that fits (1 MB is 10^6 bytes), or "-" for None."""
    if num_bytes is None:
        return "-"
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{figure_text(value)} {unit}"
        value /= 1000
    return f"{figure_text(value)} TB"


def figure_text(value: float) -> str:
    """Return three digits of a number, or all those before the point, and never an exponent: 1,283, not 1.28e+03."""
    text = f"{value:.3g}"
    return f"{value:,.0f}" if "e+" in text else text


def seconds_text(seconds: float | None) -> str:
    """Return seconds in the unit that fits, or "-" for None."""
    if seconds is None:
        return "-"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{figure_text(seconds / size)} {unit}"
    return f"{figure_text(seconds / 86400)} days"


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


def range_text(low_s: float, high_s: float) -> str:
    """Return a range in the unit of its upper end, 3.1-5.4 h; a range of equal ends as one figure."""
    if low_s == high_s:
        return seconds_text(low_s)
    high = seconds_text(high_s)
    number, _, unit = high.rpartition(" ")
    scale = high_s / float(number.replace(",", ""))
    return f"{figure_text(low_s / scale)}-{number} {unit}"
