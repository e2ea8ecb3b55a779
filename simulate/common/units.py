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
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB" if value < 1000 else f"{value:,.0f} TB"


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
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:,.3g} days" if seconds < 864e5 else f"{seconds / 86400:,.0f} days"


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
    return f"{low_s / scale:,.3g}-{number} {unit}"
