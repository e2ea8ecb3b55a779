"""lte profile: list, show and check hardware profiles."""

from __future__ import annotations

import profiles
from ltecli.console import Output, plain_table
from ltecli.errors import BAD_INPUT
from simulate.common import toml_io
from simulate.common.units import bytes_text, seconds_text
from simulate.config.hardware import LOCAL, Profile
from simulate.config.profile_slips import link_text, rate_text, slips
from simulate.config.profiles import load_profile


def list_command(as_json: bool) -> None:
    """Print one line for each profile."""
    output = Output(as_json)
    loaded = [load_profile(name) for name in (*profiles.names(), LOCAL)]
    table = plain_table("profile", "devices", "memory", "up / down", "description")
    table.columns[-1].justify = "left"
    for profile in loaded:
        # Each size once, in the order of the devices.
        memory = "/".join(dict.fromkeys(bytes_text(device.memory_bytes) for device in profile.device))
        link = link_text(profile, profile.count).replace(" up, ", " / ").removesuffix(" down")
        table.add_row(profile.name, str(profile.count), memory, link, profile.description)
    output.table(table, secondary=("up / down",))
    output.json({"profiles": [_summary(profile) for profile in loaded]})


def show_command(name: str, as_json: bool) -> None:
    """Print a profile as TOML that can be saved, edited and passed back."""
    output = Output(as_json)
    document = load_profile(name).model_dump(exclude_none=True)
    output.text(toml_io.dump(document).rstrip())
    output.json(document)


def check_command(name: str, as_json: bool) -> int:
    """Print a profile in the units that people use, and its slips; returns 2 where there are any."""
    output, profile = Output(as_json), load_profile(name)
    found = list(slips(profile))
    output.heading(f"{profile.name}: {profile.description}" if profile.description else profile.name)
    table = plain_table("device", "memory", "free of system", "host memory", "fp32", "memory rate", "disk")
    for device in profile.device:
        table.add_row(
            f"{device.count} x {device.kind}",
            bytes_text(device.memory_bytes),
            bytes_text(device.usable_bytes - device.reserved_bytes),
            bytes_text(device.host_memory_bytes) if device.host_memory_bytes else "shared",
            f"{device.flop_per_s.fp32 / 1e12:.3g} TFLOP/s",
            f"{bytes_text(device.memory_bytes_per_s)}/s",
            f"{bytes_text(device.disk_write_bytes_per_s)}/s" if device.disk_write_bytes_per_s else "-",
        )
    output.table(table)
    link = profile.link
    output.text(
        f"link: {link.topology}, up {rate_text(link.up_bytes_per_s)}, down {rate_text(link.down_bytes_per_s)}, "
        f"{seconds_text(link.latency_s)} latency" + (", for who has no line of their own" if link.lines else "")
    )
    _show_lines(profile, output)
    for slip in found:
        output.text(f"! {slip}")
    output.json({"profile": profile.model_dump(exclude_none=True), "slips": found})
    return BAD_INPUT if found else 0


def _show_lines(profile: Profile, output: Output) -> None:
    """Print the lines that devices have of their own, and those that a place's devices share."""
    if not profile.link.lines:
        return
    table = plain_table("line of", "devices", "up", "down", "latency")
    owned = [
        (place.name, sum(d.count for d in profile.device if d.place == place.name), place.link)
        for place in profile.place
    ]
    owned += [(d.name or d.kind, d.count, d.link) for d in profile.device if d.link is not None]
    for name, count, line in owned:
        rates = (rate_text(line.up_bytes_per_s), rate_text(line.down_bytes_per_s))
        table.add_row(name, str(count), *rates, seconds_text(line.latency_s))
    output.table(table)


def _summary(profile: Profile) -> dict[str, object]:
    return {
        "name": profile.name,
        "description": profile.description,
        "devices": profile.count,
        "kinds": [device.kind for device in profile.device],
    }
