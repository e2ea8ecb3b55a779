"""Lines of devices and places in profiles: read by their names and in figures, shared, and refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simulate.common import toml_io
from simulate.common.errors import InputError
from simulate.config.hardware import Profile
from simulate.config.lines import LineFigures, read_line
from simulate.config.profiles import load_profile

MBIT = 125_000.0


@pytest.mark.parametrize(
    ("text", "down", "up", "latency_s"),
    [
        ("50/10 DSL", 50 * MBIT * 0.94, 10 * MBIT * 0.94, 20e-3),
        ("100/40 VDSL", 100 * MBIT * 0.94, 40 * MBIT * 0.94, 20e-3),
        ("1000/50 cable", 1000 * MBIT * 0.94, 50 * MBIT * 0.94, 15e-3),
        ("1G/200 fibre", 1000 * MBIT * 0.94, 200 * MBIT * 0.94, 10e-3),
        ("1G fibre", 1000 * MBIT * 0.94, 1000 * MBIT * 0.94, 10e-3),
        ("10 GbE", 10_000 * MBIT * 0.94, 10_000 * MBIT * 0.94, 0.2e-3),
        ("100 Mbit/s", 100 * MBIT * 0.94, 100 * MBIT * 0.94, 20e-3),
        ("wifi 5", 54e6, 54e6, 3e-3),
    ],
)
def test_a_line_is_read_as_it_is_sold(text: str, down: float, up: float, latency_s: float) -> None:
    assert read_line(text) == pytest.approx(LineFigures(down, up, latency_s))


@pytest.mark.parametrize("text", ["fast", "0/0", "5.5.5/1", "1/2/3", "50/10 DSLL", ""])
def test_what_is_no_line_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        read_line(text)


def friends(**changes: Any) -> toml_io.Table:
    """Return the table of four friends' profile, without lines, its keys changed."""
    table = toml_io.parse(toml_io.dump(load_profile("friends_x4_home").model_dump(exclude_none=True)), "")
    table["device"] = [{k: v for k, v in d.items() if k not in ("link", "place")} for d in table["device"]]
    return {**table, **changes}


def with_keys(*keys: toml_io.Table, **changes: Any) -> Profile:
    table = friends(**changes)
    table["device"] = [{**d, **more} for d, more in zip(table["device"], keys, strict=True)]
    return toml_io.validate(Profile, table, "mine.toml")


def test_a_device_without_a_line_of_its_own_has_the_links_figures() -> None:
    profile = with_keys({"link": "50/10 DSL"}, {}, {}, {"link": {"up_bytes_per_s": "8 Mbit/s", "down_bytes_per_s": 2e6,
                                                                "latency_s": "5 ms"}})  # fmt: skip
    lines = profile.link.lines
    assert [line.up_bytes_per_s for line in lines] == pytest.approx([1.175e6, 4.7e6, 4.7e6, 1e6])
    assert [line.latency_s for line in lines] == [20e-3, 20e-3, 20e-3, 5e-3]


def test_devices_of_one_place_share_its_line() -> None:
    lines = with_keys(
        {}, {"place": "flat"}, {"place": "flat"}, {}, place=[{"name": "flat", "link": "1G fibre"}]
    ).link.lines
    assert [line.place for line in lines] == [None, 0, 0, None]
    assert lines[1].shares_place(lines[2]) and not lines[0].shares_place(lines[3])
    assert lines[1].delay_s(lines[2]) == 20e-3 and lines[1].outer_rates == (4.7e6, 11.75e6)


def test_a_profile_without_lines_is_as_before() -> None:
    profile = toml_io.validate(Profile, friends(), "mine.toml")
    assert profile.link.lines == ()


def test_devices_that_differ_in_their_lines_alone_are_planned_as_one_kind() -> None:
    devices = load_profile("friends_x4_home").devices(4)
    assert len({id(device) for device in devices}) == 1


@pytest.mark.parametrize(
    ("keys", "changes", "words"),
    [
        ({"link": "fast"}, {}, "device[0].link: 'fast' is not a number with a unit"),
        ({"place": "flat"}, {}, "device[0].place = 'flat' is no [[place]] (there is none); add it"),
        ({}, {"place": [{"name": "flat", "link": "1G fibre"}]}, "no device is at place 'flat'"),
        ({"place": "a"}, {"place": [{"name": "a", "link": "1G fibre"}] * 2}, "two places have one name"),
        ({"link": "1G fibre"}, {"link": "ring"}, "lines of their own lead to a hub"),
    ],
)
def test_mistakes_are_one_line(keys: toml_io.Table, changes: dict[str, Any], words: str) -> None:
    if changes.get("link") == "ring":
        changes = {"link": {**friends()["link"], "topology": "ring"}}
    with pytest.raises(InputError) as refused:
        with_keys(keys, {}, {}, {}, **changes)
    assert words in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_lines_are_written_and_read_again(tmp_path: Path) -> None:
    profile = load_profile("friends_x4_home")
    path = tmp_path / "again.toml"
    path.write_text(toml_io.dump(profile.model_dump(exclude_none=True)), encoding="utf-8")
    assert load_profile(str(path)) == profile
    assert load_profile(str(path)).link.lines == profile.link.lines
