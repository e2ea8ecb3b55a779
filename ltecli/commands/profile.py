"""lte profile: list and show hardware profiles."""

from __future__ import annotations

import profiles
from ltecli.console import Output, plain_table
from simulate.common import toml_io
from simulate.common.units import bytes_text
from simulate.config.hardware import LOCAL, Profile
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
        link = f"{bytes_text(profile.link.up_bytes_per_s)}/s / {bytes_text(profile.link.down_bytes_per_s)}/s"
        table.add_row(profile.name, str(profile.count), memory, link, profile.description)
    output.table(table, secondary=("up / down",))
    output.json({"profiles": [_summary(profile) for profile in loaded]})


def show_command(name: str, as_json: bool) -> None:
    """Print a profile as TOML that can be saved, edited and passed back."""
    output = Output(as_json)
    document = load_profile(name).model_dump(exclude_none=True)
    output.text(toml_io.dump(document).rstrip())
    output.json(document)


def _summary(profile: Profile) -> dict[str, object]:
    return {
        "name": profile.name,
        "description": profile.description,
        "devices": profile.count,
        "kinds": [device.kind for device in profile.device],
    }
