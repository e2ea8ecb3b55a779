"""Rates that were measured on this machine, kept in the cache folder, so that plans on `local` need not guess them.

The end of the first simulated run, `lte validate` and `lte profile measure` measure and `keep` them; load_profile puts
them in the place of the guesses of `local`. A file holds for one machine: its processor, cores, torch and limits.
Nothing here imports torch, since plans load it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from simulate.common import toml_io
from simulate.common.cache_folder import cache_folder
from simulate.common.errors import InputError
from simulate.common.limits import usable_cores
from simulate.common.processor import machine_facts, machine_text
from simulate.config.hardware import Device, Measurement

SWITCH = "LTE_CALIBRATE"
"""Variable that, set to 0, keeps runs and validations from measuring; what was measured is still used."""
VERSION = 1
RATES = (
    "memory_bytes_per_s", "flop_per_s", "efficiency", "kernels", "disk_write_bytes_per_s", "disk_flush_s", "source",
)  # fmt: skip
"""Fields of a device that a measurement replaces; memory is detected anew each time."""


class Calibration(toml_io.Schema):
    """One machine's measured rates."""

    version: Literal[1]
    machine: str
    """The machine that they hold for, as `this_machine` names it."""
    device: Device
    measurement: Measurement

    @field_validator("device")
    @classmethod
    def _was_measured(cls, device: Device) -> Device:
        if device.kernels is None or device.source != "measured":
            raise ValueError("device has no measured kernels; remove the file")
        return device


def this_machine() -> str:
    """Return what rates depend on: processor, instruction sets, cores, torch, and variables that limit them."""
    facts = machine_facts()
    versions = {"torch": facts["versions"].get("torch", "none")}  # others change no rate by much
    return f"{usable_cores()} cores of {machine_text({**facts, 'versions': versions})}"


def calibration_file() -> Path | None:
    """Return the path of this machine's file, whether or not it exists; None where the user has no cache folder."""
    try:
        folder = cache_folder()
    except InputError:  # a container's user without a home: plans go on guessing, as where nothing was measured
        return None
    return folder / f"calibration-{hashlib.sha256(this_machine().encode()).hexdigest()[:16]}.toml"


def find_calibration() -> tuple[Calibration | None, str]:
    """Return this machine's rates, None where there are none; and why a file that exists is ignored, else ""."""
    path = calibration_file()
    if path is None or not path.is_file():
        return None, ""
    try:
        text = path.read_text(encoding="utf-8")
        found = toml_io.validate(Calibration, toml_io.parse(text, str(path)), str(path), text)
    except (InputError, OSError, UnicodeDecodeError) as error:
        return None, f"{path} is ignored ({error}); lte profile measure --quick measures this machine again"
    if found.machine != this_machine():
        return None, f"{path} is ignored, it is of another machine ({found.machine}); lte profile measure --quick"
    return found, ""


def calibrated(device: Device) -> Device:
    """Return a guessed device of this machine with the rates that were measured, where there are any."""
    found, _ = find_calibration()
    if found is None:
        return device
    sources = {key: text for key, text in found.device.sources.items() if key in (*RATES, "kernels")}
    update = {key: getattr(found.device, key) for key in RATES}
    return device.model_copy(update={**update, "sources": {**device.sources, **sources}})


def keep(device: Device, measurement: Measurement) -> str:
    """Keep a measured device's rates for later plans; returns why that was not possible, else ""."""
    table = {
        "version": VERSION,
        "machine": this_machine(),
        "device": device.model_dump(exclude_none=True),
        "measurement": measurement.model_dump(exclude_none=True),
    }
    path = calibration_file()
    if path is None:
        return "this user has no home folder to keep rates in; export LTE_CACHE=FOLDER"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        toml_io.write_atomically(path, toml_io.dump(table).encode())
    except OSError as error:
        return f"{path} cannot be written ({error.strerror}); plans on `local` go on guessing"
    return ""


def is_wanted() -> bool:
    """Whether this machine should be measured now: its rates are missing, and nobody has said not to."""
    return os.environ.get(SWITCH) != "0" and calibration_file() is not None and find_calibration()[0] is None
