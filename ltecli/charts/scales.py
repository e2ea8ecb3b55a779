"""Units of axes: one for all points of a figure, so that curves share it."""

from __future__ import annotations

from collections.abc import Iterable

from simulate.common.units import bytes_text, seconds_text

SECONDS = ((120.0, 1.0, "s"), (7200.0, 60.0, "min"), (172_800.0, 3600.0, "h"))
BYTES = ((1e3, 1.0, "B"), (1e6, 1e3, "kB"), (1e9, 1e6, "MB"), (1e12, 1e9, "GB"))


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

    Powers of ten stand in seconds' own units: 10 s, 1 min, 10 min, 1 h.
    """
    if kind == "bytes":
        values = [10.0**power for power in range(16)]
    else:
        values = [10.0**power for power in range(-6, 2)] + [60.0, 600.0, 3600.0, 36_000.0]
        values += [86_400.0 * 10**power for power in range(6)]
    text = bytes_text if kind == "bytes" else seconds_text
    inside = [value for value in values if low <= value <= high]
    texts = {86_400.0: "1 day", 3600.0: "1 h", 60.0: "1 min"} if kind == "seconds" else {}
    return [(value, texts.get(value) or text(value)) for value in inside]
