"""Every shipped profile loads, and says where each of its figures comes from."""

from __future__ import annotations

import pytest

import profiles
from simulate.config.hardware import Device, Link, Profile
from simulate.config.lines import Line
from simulate.config.profiles import load_profile

UNSOURCED = {"count", "device_type", "kind", "link", "name", "place", "source", "sources"}


def figures_without_source(part: Device | Link | Line) -> set[str]:
    """Return a part's figures that are set, not to their default, without words on their origin."""
    given = {
        name for name, field in type(part).model_fields.items()
        if name not in UNSOURCED and getattr(part, name) not in (None, field.default)
    }  # fmt: skip
    return given - {name for name, words in part.sources.items() if words.strip()}


def test_profiles_are_shipped() -> None:
    assert len(profiles.names()) >= 10


@pytest.mark.parametrize("name", profiles.names())
def test_a_shipped_profile_loads_under_its_own_name(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.description
    assert profile.count == len(profile.devices(profile.count))


@pytest.mark.parametrize("name", [*profiles.names(), "local"])
def test_every_figure_has_a_source(name: str) -> None:
    profile: Profile = load_profile(name)
    lines = [owner.link for owner in (*profile.device, *profile.place) if owner.link is not None]
    for part in (*profile.device, profile.link, *lines):
        assert not figures_without_source(part)
        assert set(part.sources) <= set(type(part).model_fields)


def test_a_figure_without_source_is_noticed() -> None:
    device = load_profile("h200").device[0]
    bare = device.model_copy(update={"sources": {**device.sources, "efficiency": " "}})
    assert figures_without_source(bare) == {"efficiency"}


# What torch and nvidia-smi were seen to report in total: less than a card's name says, since the driver keeps a part.
SEEN_GIB = {
    "A100 SXM4 80 GB": 79.25, "H200": 139.81, "T4": 14.56, "V100 SXM2 16 GB": 15.78, "P100 PCIe 16 GB": 15.90,
    "GTX 1080 Ti": 10.92, "RTX 2060": 5.79, "RTX 3060": 11.76, "RTX 3090": 23.70,
}  # fmt: skip


def test_no_card_is_planned_with_more_than_its_driver_gives() -> None:
    checked = set()
    for name in profiles.names():
        for device in load_profile(name).device:
            if "NVIDIA" not in device.kind or device.host_memory_bytes == 0:
                continue
            seen = next(size for card, size in SEEN_GIB.items() if card in device.kind) * 2**30
            # 0.5 GB is the least that a context and its libraries take of what is seen.
            assert device.memory_bytes - device.reserved_bytes <= seen - 0.5e9
            checked.add(device.kind)
    assert len(checked) == len(SEEN_GIB)
