"""Units of axes: one for all points of a figure, so that curves share it."""

from __future__ import annotations

from collections.abc import Iterable

from simulate.common.units import bytes_text, seconds_text

SECONDS = ((120.0, 1.0, "s"), (7200.0, 60.0, "min"), (172_800.0, 3600.0, "h"))
BYTES = ((1e3, 1.0, "B"), (1e6, 1e3, "kB"), (1e9, 1e6, "MB"), (1e12, 1e9, "GB"))
BYTE_TICKS = tuple(10.0**power for power in range(16))
SECOND_TICKS = (
    *(10.0**power for power in range(-6, 2)), 60.0, 600.0, 3600.0, 36_000.0,
    *(86_400.0 * 10**power for power in range(6)),
)  # fmt: skip
ENOUGH_TICKS = 4
"""Ticks from which an axis is not divided further."""


def second_scale(values: Iterable[float | None]) -> tuple[float, str]:
    """Return the seconds of the unit that fits the largest value, and its name."""
    return _scale(values, SECONDS, (86_400.0, "days"))


def byte_scale(values: Iterable[float | None]) -> tuple[float, str]:
    """Return the bytes of the unit that fits the largest value, and its name."""
    return _scale(values, BYTES, (1e12, "TB"))


def _scale(
    values: Iterable[float | None], units: Iterable[tuple[float, float, str]], last: tuple[float, str]
) -> tuple[float, str]:
    largest = max((value for value in values if value is not None), default=0.0)
    return next(((size, name) for limit, size, name in units if largest < limit), last)


def log_ticks(kind: str, low: float, high: float) -> list[tuple[float, str]]:
    """Return round values of a logarithmic axis of bytes or seconds, with their texts; `kind` is one of the two.

    Those of seconds are round in their own units: 10 s, 1 min, 10 min, 1 h.
    """
    ticks: list[tuple[float, str]] = []
    for factors in ((1,), (1, 3), (1, 2, 5)):
        values = [factor * unit for unit in (BYTE_TICKS if kind == "bytes" else SECOND_TICKS) for factor in factors]
        text = bytes_text if kind == "bytes" else _round_text
        ticks = [(value, text(value)) for value in values if low <= value <= high]
        if len(ticks) >= ENOUGH_TICKS:
            break
    return ticks


def _round_text(seconds: float) -> str:
    # Not 60 s or 120 min, which tables have for the sake of their digits.
    size, name = next(((s, n) for s, n in ((86_400, "day"), (3600, "h"), (60, "min")) if seconds >= s), (0, ""))
    if not size:
        return seconds_text(seconds)
    count = seconds / size
    return f"{count:,.0f} {name}{'s' if name == 'day' and count > 1 else ''}"
