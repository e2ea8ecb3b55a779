"""Figures of profiles with units, and slips in them: read alike, echoed, and pointed at."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiles import names, read_text
from simulate.common.quantities import RATES
from simulate.config.profile_slips import slips
from simulate.config.profiles import load_profile
from tests.ltecli.command import Lte, Refused


def changed(path: Path, *changes: tuple[str, str]) -> str:
    text = read_text("rtx3060_x4_home")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_units_say_the_same_as_numbers(tmp_path: Path) -> None:
    plain = load_profile("rtx3060_x4_home")
    device, link = plain.device[0], plain.link
    path = changed(
        tmp_path / "units.toml",
        (f"memory_bytes = {device.memory_bytes:_}", f'memory_bytes = "{device.memory_bytes / 2**30:g} GiB"'),
        ("flop_per_s = { fp32 = 12.74e12", 'flop_per_s = { fp32 = "12.74 TFLOP/s"'),
    )
    with_units = load_profile(path)
    assert with_units.device[0].memory_bytes == device.memory_bytes
    assert with_units.device[0].flop_per_s.fp32 == pytest.approx(device.flop_per_s.fp32)
    assert with_units.link == link


@pytest.mark.parametrize("name", names())
def test_shipped_profiles_have_no_slips(name: str) -> None:
    assert list(slips(load_profile(name))) == []


def test_a_slip_is_named_with_what_it_says(lte: Lte, tmp_path: Path) -> None:
    link = load_profile("rtx3060_x4_home").link
    lines = [line for line in read_text("rtx3060_x4_home").splitlines() if line.startswith("up_bytes_per_s")]
    assert len(lines) == 2 and link.up_bytes_per_s > 12.5e3
    path = changed(tmp_path / "slow.toml", (lines[0], "up_bytes_per_s = 10"))
    checked = lte("profile", "check", path)
    assert checked.code == 2
    assert '! link.up_bytes_per_s = 10 is 10 B/s (80 bit/s); write it like "50 Mbit/s"' in checked.stdout
    plan = lte("plan", "--profile", path, "--model", "gpt", "--method", "ddp", "--tokens", "100k")
    assert plan.code == 0 and "80 bit/s" in plan.stdout
    assert lte("profile", "check", "rtx3060_x4_home").code == 0


def test_a_missing_table_comes_with_example_values(lte: Lte, tmp_path: Path) -> None:
    (tmp_path / "half.toml").write_text('name = "half"\n[[device]]\ncount = 2\n', encoding="utf-8")
    said = lte("profile", "check", str(tmp_path / "half.toml"))
    assert said.code == 2
    assert "device[0].memory_bytes is missing; add it, for example memory_bytes = " in said.stderr
    assert 'link is missing; add the table [link], for example with topology = "star", up_bytes_per_s = ' in said.stderr


def test_counts_of_tokens_have_units(lte: Lte, refused: Refused) -> None:
    command = ("plan", "--profile", "laptop_cpu", "--model", "gpt", "--method", "ddp", "--json")
    assert lte(*command, "--tokens", "1.5M").json()["tokens"] == 1_500_000
    refused("plan", "--tokens", "1.5 Mb", words=("--tokens", "write it like '2.5B'"))


def test_a_unit_of_another_kind_is_refused(refused: Refused, tmp_path: Path) -> None:
    memory = load_profile("rtx3060_x4_home").device[0].memory_bytes
    path = changed(tmp_path / "wrong.toml", (f"memory_bytes = {memory:_}", 'memory_bytes = "12 Gbit/s"'))
    refused("profile", "check", path, words=("memory_bytes", "12 Gbit/s", "11 GB"))


def test_a_memory_without_its_unit_is_the_figure_that_is_blamed(refused: Refused, here: Path) -> None:
    memory = f"memory_bytes = {load_profile('rtx3060_x4_home').device[0].memory_bytes:_}"
    path = changed(here / "p.toml", (memory, "memory_bytes = 12"))
    words = ("device[0]: memory_bytes = 12 is 12 B", 'like memory_bytes = "11 GB"')
    assert "reserved_bytes" not in refused("profile", "check", path, words=words)


def test_an_unknown_unit_is_told_all_known_ones(refused: Refused, here: Path) -> None:
    line = next(line for line in read_text("rtx3060_x4_home").splitlines() if line.startswith("up_bytes_per_s"))
    path = changed(here / "p.toml", (line, 'up_bytes_per_s = "50 Mbps/s"'))
    said = refused("profile", "check", path, words=("Mbps/s",))
    assert all(unit in said for unit in RATES)
