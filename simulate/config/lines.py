"""Access lines as they are sold: "50/10 DSL", "1G fibre", "wifi 5", and whose line a device uses.

Friends have different lines, and know them by the names on their bills. Profiles take a line for each device
(`[[device]] link`) and for each place whose devices share one (`[[place]]`), as a name or in figures; simulate.config.
hardware gives them to the link that all costs read, and `lte init` reads its answers here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from simulate.common import toml_io
from simulate.common.errors import near_match
from simulate.common.quantities import RATES, BytesPerSecond, Seconds, read_quantity

Source = Literal["datasheet", "measured", "guess"]
MOST_LINE_BYTES_PER_S = 10**15
"""Largest rate of a line: more than a petabyte a second is a typing error."""
PAYLOAD_SHARE = 0.94
"""Share of a line's rate that TCP keeps of frames of 1500 bytes."""
MEGABIT = 125_000.0
HOME_LATENCY_S, ROOM_LATENCY_S, WIFI_LATENCY_S = 20e-3, 0.2e-3, 3e-3
"""Guesses: two access lines of about 8 ms and a backbone within one country; a switch; an access point between
stations."""
LATENCIES_S = {"dsl": HOME_LATENCY_S, "vdsl": HOME_LATENCY_S, "cable": 15e-3, "fibre": 10e-3, "fiber": 10e-3}
"""Guesses of the one-way delay between two homes with such a line, by technology: DSL interleaves its error correction,
cable waits for its turn to send, and fibre adds little to the backbone's delay."""
ROOM = {"1 GbE": 1000.0, "2.5 GbE": 2500.0, "10 GbE": 10_000.0, "100 Mbit Ethernet": 100.0}
"""Mbit/s of links in one room, by name (IEEE 802.3 line rates)."""
WIFI_BYTES_PER_S = {"wifi": 4e6, "wifi5": 54e6}
"""Payload rates of a station. wifi: one of eight at an access point, as profiles/jetson_orin_nano_x8_wifi.toml guesses
it. wifi 5: alone, two streams of 80 MHz, 866.7 Mbit/s by IEEE 802.11ac, half of which reaches TCP (a guess)."""
LINE_EXAMPLES = "'1 GbE', '50/10 DSL' (Mbit/s down/up), '1G fibre', '100 Mbit/s', 'wifi 5'"


class LineFigures(NamedTuple):
    """Payload rates and delay of a line."""

    down_bytes_per_s: float
    up_bytes_per_s: float
    latency_s: float


def read_line(text: str) -> LineFigures:
    """Return the figures of a line as it is sold; raises ValueError for one that cannot be read."""
    word = _plain(text)
    named = next((rate for name, rate in ROOM.items() if _plain(name) == word), None)
    if named is not None:
        figures = _sold(named * MEGABIT, named * MEGABIT, ROOM_LATENCY_S)
    elif word in WIFI_BYTES_PER_S:
        rate = WIFI_BYTES_PER_S[word]
        figures = LineFigures(rate, rate, WIFI_LATENCY_S)
    else:
        figures = _access_line(text)
    if min(figures.down_bytes_per_s, figures.up_bytes_per_s) <= 0:
        raise ValueError(f"{text!r} must be faster than 0; write it like {LINE_EXAMPLES}")
    return figures


def _access_line(text: str) -> LineFigures:
    """Return the figures of `50/10 DSL`, `1G fibre` or a rate for both ways."""
    number = r"([\d.]+\s*G?)"
    match = re.fullmatch(rf"\s*{number}(?:\s*/\s*{number})?(?:\s*Mbit/s)?(?:\s+([A-Za-z]+))?\s*", text)
    # A single number needs its technology: "100" alone might be anything.
    if match is None or (match[2] is None and _plain(match[3] or "") not in LATENCIES_S):
        try:
            rate = float(read_quantity(text, RATES, "100 Mbit/s"))
        except ValueError as error:
            raise ValueError(f"{error}; or {LINE_EXAMPLES}") from None
        return _sold(rate, rate, HOME_LATENCY_S)
    technology = _plain(match[3] or "")
    if technology and technology not in LATENCIES_S:  # its delay would be a silent guess
        raise ValueError(f"{text!r}: {match[3]} is not known; {near_match(technology, LATENCIES_S)}")
    down = _megabits(match[1]) * MEGABIT
    up = _megabits(match[2]) * MEGABIT if match[2] else down
    return _sold(down, up, LATENCIES_S.get(technology, HOME_LATENCY_S))


def _megabits(text: str) -> float:
    digits = text.strip()
    try:
        return 1000 * float(digits[:-1]) if digits.endswith("G") else float(digits)
    except ValueError:
        raise ValueError(f"{text!r} is not a number; write a line like {LINE_EXAMPLES}") from None


def _sold(down_bytes_per_s: float, up_bytes_per_s: float, latency_s: float) -> LineFigures:
    return LineFigures(down_bytes_per_s * PAYLOAD_SHARE, up_bytes_per_s * PAYLOAD_SHARE, latency_s)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def line_sources(text: str) -> dict[str, str]:
    """Return where the figures of a line that was given by its name come from, by key."""
    said = f"guess: {text}" + ("" if _plain(text) in WIFI_BYTES_PER_S else f", x {PAYLOAD_SHARE} for TCP")
    return {"up_bytes_per_s": said, "down_bytes_per_s": said, "latency_s": f"guess, of lines like {text}"}


class Line(toml_io.Schema):
    """The line of one device, or of a place; payload rates after protocol overhead, as in [link]."""

    up_bytes_per_s: BytesPerSecond = Field(gt=0, le=MOST_LINE_BYTES_PER_S)
    down_bytes_per_s: BytesPerSecond = Field(gt=0, le=MOST_LINE_BYTES_PER_S)
    latency_s: Seconds = Field(ge=0)
    """One-way delay of a message between two such lines; between unlike ones it is the mean of both."""
    source: Source = "guess"
    sources: dict[str, str] = Field(default_factory=dict)

    def __hash__(self) -> int:
        # Written out because `sources` is a dict, which has no hash.
        return hash((self.up_bytes_per_s, self.down_bytes_per_s, self.latency_s))


def _as_figures(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    return {**read_line(given)._asdict(), "source": "guess", "sources": line_sources(given)}


NamedLine = Annotated[Line, BeforeValidator(_as_figures)]
"""A line in figures, or by the name that it is sold under."""


class Place(toml_io.Schema):
    """A home, a lab or a room whose devices share one line to all others."""

    name: str = Field(min_length=1)
    """Name by which `[[device]] place` calls it."""
    link: NamedLine
    """Line that messages into and out of the place cross; those between its devices do not."""


@dataclass(frozen=True)
class DeviceLine:
    """The lines between one device and the others: its own, and its place's, if it has one."""

    up_bytes_per_s: float
    down_bytes_per_s: float
    latency_s: float
    place: int | None = None
    """Number of its place; None where its own line leads to all others."""
    place_up_bytes_per_s: float = 0.0
    place_down_bytes_per_s: float = 0.0
    place_latency_s: float = 0.0

    @classmethod
    def of(cls, own: Line | None, defaults: LineFigures, place: Place | None, number: int | None) -> DeviceLine:
        """Return a device's lines; `defaults` are the figures of a device without a line of its own."""
        down, up, latency_s = (own.down_bytes_per_s, own.up_bytes_per_s, own.latency_s) if own else defaults
        if place is None:
            return cls(up, down, latency_s)
        shared = place.link
        return cls(up, down, latency_s, number, shared.up_bytes_per_s, shared.down_bytes_per_s, shared.latency_s)

    def times(self, up: float = 1.0, down: float = 1.0, latency: float = 1.0) -> DeviceLine:
        """Return the lines with rates and delays multiplied."""
        return replace(
            self,
            up_bytes_per_s=up * self.up_bytes_per_s,
            down_bytes_per_s=down * self.down_bytes_per_s,
            latency_s=latency * self.latency_s,
            place_up_bytes_per_s=up * self.place_up_bytes_per_s,
            place_down_bytes_per_s=down * self.place_down_bytes_per_s,
            place_latency_s=latency * self.place_latency_s,
        )

    def shares_place(self, other: DeviceLine) -> bool:
        """Whether messages between the two devices stay within one place."""
        return self.place is not None and self.place == other.place

    def delay_s(self, other: DeviceLine) -> float:
        """Return the one-way delay of a message to another device: the mean of the two lines that it crosses."""
        if self.shares_place(other):
            return (self.latency_s + other.latency_s) / 2
        return (self.outer_latency_s + other.outer_latency_s) / 2

    @property
    def outer_rates(self) -> tuple[float, float]:
        """Bytes/s up and down to devices elsewhere, while no other device of its place sends or receives."""
        if self.place is None:
            return self.up_bytes_per_s, self.down_bytes_per_s
        up, down = self.place_up_bytes_per_s, self.place_down_bytes_per_s
        return min(self.up_bytes_per_s, up), min(self.down_bytes_per_s, down)

    @property
    def outer_latency_s(self) -> float:
        """Delay that counts outside of its place; a place's line is so much slower that its room adds nothing."""
        return self.latency_s if self.place is None else max(self.latency_s, self.place_latency_s)


def repeated(lines: Sequence[DeviceLine], devices: int) -> tuple[DeviceLine, ...]:
    """Return the lines of the first `devices`; more than there are repeat them, with places of their own."""
    if devices <= len(lines):
        return tuple(lines[:devices])
    places = 1 + max((line.place for line in lines if line.place is not None), default=-1)
    numbered = (divmod(index, len(lines)) for index in range(devices))
    copies = ((lines[index], again * places) for again, index in numbered)
    return tuple(line if line.place is None else replace(line, place=line.place + more) for line, more in copies)
