"""Read figures as people write them: "4 GB", "50 Mbit/s", "20 ms", 4e9, 2.5B.

A slip of a unit is a factor of 8, or of a thousand, in a plan. The schemas of profiles read their figures by these
functions, and so do options of the command line. A bare number is in SI units: bytes, bytes a second, seconds.
MB is 10^6 bytes and MiB 2^20; a lower-case b is refused, since it is read as bits and as bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

_BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
BYTES: Mapping[str, float] = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15, **_BINARY}
_BITS = {"bit/s": 1 / 8, "kbit/s": 125.0, "Mbit/s": 125e3, "Gbit/s": 125e6, "Tbit/s": 125e9}
RATES: Mapping[str, float] = {
    **{f"{unit}/s": size for unit, size in BYTES.items()},
    **_BITS,
    **{unit.replace("bit/s", "bps"): size for unit, size in _BITS.items()},
}
SECONDS: Mapping[str, float] = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
OPERATIONS: Mapping[str, float] = {
    f"{prefix}{unit}": size
    for prefix, size in {"M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}.items()
    for unit in ("FLOP/s", "FLOPS", "flop/s")
}
COUNTS: Mapping[str, float] = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def read_quantity(given: Any, units: Mapping[str, float], example: str) -> Any:
    """Return a figure in SI units, whole where it is; what is no text stays as it is. Raises ValueError."""
    if not isinstance(given, str):
        return given
    match = re.fullmatch(r"\s*([+-]?(?:\d[\d_]*)(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*([^\d\s]\S*)?\s*", given)
    if match is None:
        raise ValueError(f"{given!r} is not a number with a unit; write it like {example!r}")
    number, unit = match.groups()
    if unit is not None and unit not in units:
        raise ValueError(f"{given!r} has an unknown unit {unit!r}; write it like {example!r}, in {', '.join(units)}")
    if re.fullmatch(r"[+-]?\d[\d_]*", number) and (unit is None or isinstance(units[unit], int)):
        return int(number) * int(units[unit] if unit else 1)  # whole numbers stay exact, however large
    value = float(number) * (units[unit] if unit else 1)
    return int(value) if value.is_integer() else value


def _reader(units: Mapping[str, float], example: str) -> BeforeValidator:
    return BeforeValidator(lambda given: read_quantity(given, units, example))


Bytes = Annotated[int, _reader(BYTES, "11 GB")]
BytesPerSecond = Annotated[float, _reader(RATES, "50 Mbit/s")]
Seconds = Annotated[float, _reader(SECONDS, "20 ms")]
FlopRate = Annotated[float, _reader(OPERATIONS, "11.3 TFLOP/s")]


def read_link(text: str) -> tuple[float, float]:
    """Return bytes/s and one-way seconds of a link like "20 Mbit/s, 20 ms" or "20 Mbit/s"; raises ValueError."""
    rate, comma, delay = text.partition(",")
    bytes_per_s = read_quantity(rate.strip(), RATES, "20 Mbit/s")
    latency_s = read_quantity(delay.strip(), SECONDS, "20 ms") if comma else 0.0
    if bytes_per_s <= 0 or latency_s < 0:
        raise ValueError(
            f"{text!r} is no link: its rate must be above 0, its delay not below; write '20 Mbit/s, 20 ms'"
        )
    return float(bytes_per_s), float(latency_s)


def read_count(text: str) -> int:
    """Return a count like 1_000_000, 2e9 or 2.5B (billions); raises ValueError."""
    value = read_quantity(text, COUNTS, "2.5B")
    if not isinstance(value, int):
        raise ValueError(f"{text!r} is not a whole number; write it like 2.5B, 400k or 1_000_000")
    return value
