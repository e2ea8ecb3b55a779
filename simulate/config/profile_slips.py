"""Find figures of a profile that no such hardware has: most often a unit that was left out.

`up_bytes_per_s = 10` is 80 bit/s, and a plan of thousands of days is an odd way to hear of it. `lte profile check`
prints what is found here, and a plan warns of it before anything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from simulate.common.units import bytes_text, seconds_text
from simulate.config.hardware import Device, Link, Profile
from simulate.config.lines import Line


class Plausible(NamedTuple):
    """Range of a figure in hardware that people train on, and how it is written with its unit."""

    low: float
    high: float
    example: str


MEMORY = Plausible(256e6, 2e12, '"11 GB"')
RATES = {
    "up_bytes_per_s": Plausible(12.5e3, 2e12, '"50 Mbit/s"'),
    "down_bytes_per_s": Plausible(12.5e3, 2e12, '"50 Mbit/s"'),
    "shared_bytes_per_s": Plausible(12.5e3, 2e12, '"50 Mbit/s"'),
    "server_up_bytes_per_s": Plausible(12.5e3, 2e12, '"1 Gbit/s"'),
    "server_down_bytes_per_s": Plausible(12.5e3, 2e12, '"1 Gbit/s"'),
    "memory_bytes_per_s": Plausible(1e9, 5e13, '"484 GB/s"'),
    "disk_write_bytes_per_s": Plausible(1e6, 1e12, '"200 MB/s"'),
}
LATENCY = Plausible(0.0, 2.0, '"20 ms"')
OPERATIONS = Plausible(1e9, 1e17, '"11.3 TFLOP/s"')


def slips(profile: Profile) -> Iterator[str]:
    """Yield a line for each figure outside the range of its kind: what it says, and how it would be written."""
    for index, device in enumerate(profile.device):
        yield from _of_device(device, f"device[{index}]")
        if device.link is not None:
            yield from _of_link(device.link, f"device[{index}].link")
    for index, place in enumerate(profile.place):
        yield from _of_link(place.link, f"place[{index}].link")
    yield from _of_link(profile.link, "link")


def _of_device(device: Device, where: str) -> Iterator[str]:
    sizes = {"memory_bytes": device.memory_bytes, "host_memory_bytes": device.host_memory_bytes or None}
    for key, size in sizes.items():
        if size is not None and not MEMORY.low <= size <= MEMORY.high:
            yield f"{where}.{key} = {size} is {bytes_text(size)}; write it like {MEMORY.example}"
    yield from _rates(device, where, ("memory_bytes_per_s", "disk_write_bytes_per_s"))
    for name, rate in device.flop_per_s:
        if rate is not None and not OPERATIONS.low <= rate <= OPERATIONS.high:
            yield f"{where}.flop_per_s.{name} = {rate:g} is {rate / 1e12:g} TFLOP/s; write it like {OPERATIONS.example}"


def _of_link(link: Link | Line, where: str) -> Iterator[str]:
    yield from _rates(link, where, [key for key in RATES if hasattr(link, key)])
    if link.latency_s > LATENCY.high:
        seconds = seconds_text(link.latency_s)
        yield f"{where}.latency_s = {link.latency_s:g} is {seconds}; write it like {LATENCY.example}"


def _rates(table: Device | Link | Line, where: str, keys: list[str] | tuple[str, ...]) -> Iterator[str]:
    for key in keys:
        rate, plausible = getattr(table, key), RATES[key]
        if rate is not None and not plausible.low <= rate <= plausible.high:
            yield f"{where}.{key} = {rate:g} is {rate_text(rate)}; write it like {plausible.example}"


def rate_text(bytes_per_s: float) -> str:
    """Return a rate in bytes and, as networks are sold, in bits."""
    bits = 8 * bytes_per_s
    for limit, unit in ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")):
        if bits >= limit:
            return f"{bytes_text(bytes_per_s)}/s ({bits / limit:.3g} {unit})"
    return f"{bytes_text(bytes_per_s)}/s ({bits:.3g} bit/s)"


def link_text(profile: Profile, devices: int) -> str:
    """Return up and down of the link of so many devices; where they have lines of their own, from the slowest on."""
    link, lines = profile.link, profile.link.lines[:devices]
    if not lines:
        return f"{bytes_text(link.up_bytes_per_s)}/s up, {bytes_text(link.down_bytes_per_s)}/s down"
    ups, downs = zip(*(line.outer_rates for line in lines), strict=True)
    return f"{_span_text(ups)} up, {_span_text(downs)} down"


def _span_text(rates: Sequence[float]) -> str:
    low, high = bytes_text(min(rates)), bytes_text(max(rates))
    return f"{low}/s" if low == high else f"{low}/s to {high}/s"
