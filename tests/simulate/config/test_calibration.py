"""This machine's measured rates: kept, found again, and left aside where they are damaged or another machine's."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulate.common.cache_folder import CACHE_VARIABLE
from simulate.config import calibration
from simulate.config.calibration import SWITCH, calibration_file, find_calibration, is_wanted, keep, this_machine
from simulate.config.hardware import LOCAL, Device, Kernels, Measurement
from simulate.config.profiles import detect_local, load_profile
from simulate.planning.margins import Margins

KERNELS = Kernels(
    products=[[8.0, 1e9]], attention=[[8.0, 1e9]], elementwise=[[64.0, 1e9]], optimizer=[[64.0, 1e9]], step_s=1e-3,
    layer_s=1e-4, adapter_s=1e-4,
)  # fmt: skip
MEASUREMENT = Measurement(
    date="2026-01-01T00:00:00+00:00", host="Linux", torch="2.13", device="cpu", threads=2, quick=True,
    clock="wall clock", seconds=4.0, disk_write_bytes_per_s=1e8, median_s={}, p90_s={},
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and runs that may measure."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(SWITCH)
    return tmp_path / "cache"


def measured() -> Device:
    guess = detect_local().device[0]
    update = {"kernels": KERNELS, "source": "measured", "memory_bytes_per_s": 7e9, "memory_bytes": 12345, "count": 1}
    return guess.model_copy(
        update={**update, "reserved_bytes": 0, "sources": {"memory_bytes_per_s": "measured: a copy"}}
    )


def test_local_is_guessed_until_it_was_measured() -> None:
    before = load_profile(LOCAL).device[0]
    assert (before.source, before.kernels, is_wanted()) == ("guess", None, True)
    assert keep(measured(), MEASUREMENT) == ""
    assert find_calibration()[1] == ""
    after = load_profile(LOCAL).device[0]
    assert (after.source, after.kernels, after.memory_bytes_per_s) == ("measured", KERNELS, 7e9)
    assert not is_wanted()
    # Memory is what is there now, and devices are as many as before.
    assert (after.memory_bytes, after.count) == (before.memory_bytes, before.count)
    assert after.sources["memory_bytes_per_s"] == "measured: a copy"
    assert after.sources["memory_bytes"] == before.sources["memory_bytes"]


def test_measured_times_have_no_margin_and_guesses_are_orders_of_magnitude() -> None:
    guessed = Margins.of(load_profile(LOCAL))
    keep(measured(), MEASUREMENT)
    found = Margins.of(load_profile(LOCAL))
    assert (guessed.is_order, guessed.compute, found.is_order, found.compute) == (True, 1.5, False, 1.0)
    assert found.exchange == 1.5  # nothing here measures links
    assert not Margins.of(load_profile("raspberry_x8")).is_order


@pytest.mark.parametrize("content", [b"", b"not = [toml", b"\xff\xfe", b"version = 9\n", b"\0" * 100])
def test_a_damaged_file_is_ignored_with_a_line(content: bytes) -> None:
    keep(measured(), MEASUREMENT)
    calibration_file().write_bytes(content)
    found, line = find_calibration()
    assert found is None
    assert line.startswith(f"{calibration_file()} is ignored")
    assert "\n" not in line
    assert "lte profile measure" in line
    assert load_profile(LOCAL).device[0].source == "guess"
    assert is_wanted()


def test_another_machines_file_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(measured(), MEASUREMENT)
    theirs = calibration_file().read_bytes()
    monkeypatch.setattr(calibration, "usable_cores", lambda: 999)
    assert find_calibration() == (None, "")  # each machine has a file of its own
    calibration_file().write_bytes(theirs)
    found, line = find_calibration()
    assert found is None
    assert "another machine" in line
    assert "999 cores" in this_machine()


def test_a_guess_is_no_calibration() -> None:
    keep(measured(), MEASUREMENT)
    text = calibration_file().read_text().replace('source = "measured"', 'source = "guess"')
    calibration_file().write_text(text)
    assert find_calibration()[0] is None


def test_a_folder_that_takes_no_files_is_a_line(folder: Path) -> None:
    folder.write_text("a file")
    assert "cannot be written" in keep(measured(), MEASUREMENT)


def test_a_switch_keeps_runs_from_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert not is_wanted()


def test_a_user_without_a_home_is_neither_measured_nor_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LTE_CACHE", "XDG_CACHE_HOME", SWITCH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert calibration_file() is None and find_calibration() == (None, "")
    assert not is_wanted()
