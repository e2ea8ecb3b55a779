"""The folder of a sweep or a comparison: sweep.toml, which lists its runs, and a run folder for each of them.

With it the same command goes on where it stopped, and `lte report FOLDER` prints the table again. `lte sweep` and `lte
compare` write it, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ltecli.output_paths import check_absent, unwritable
from ltecli.runs.variants import Variant
from simulate.common import toml_io
from simulate.common.errors import InputError
from simulate.common.run_files import CHECKPOINTS, RUN_FILE
from simulate.config.run import Run, run_fingerprint
from simulate.training.checkpoints import list_checkpoints

SWEEP_FILE = "sweep.toml"


class SweepRun(toml_io.Schema):
    """One run of a sweep."""

    name: str
    """Name of its folder."""
    fingerprint: str
    """Digest of its run.toml."""
    settings: dict[str, str]
    """Values that differ between the runs, by key; without the seed."""


class Sweep(toml_io.Schema):
    """The runs of a sweep or a comparison, and the command that made it."""

    version: Literal[1]
    command: str
    reference: str = ""
    """Method that a comparison holds the others against; "" for a sweep."""
    run: list[SweepRun]


def is_sweep(path: Path) -> bool:
    """Whether a folder is that of a sweep or a comparison."""
    return (path / SWEEP_FILE).is_file()


def load_sweep(path: Path) -> Sweep:
    """Read a sweep's file; raises InputError."""
    file = path / SWEEP_FILE
    text = toml_io.read(file)
    return toml_io.validate(Sweep, toml_io.parse(text, str(file)), str(file), text)


def make_sweep(command: str, variants: Sequence[Variant], reference: str = "") -> Sweep:
    """Return the sweep of these runs."""
    runs = [SweepRun(name=v.name, fingerprint=run_fingerprint(v.run), settings=dict(v.settings)) for v in variants]
    return Sweep(version=1, command=command, reference=reference, run=runs)


def check_sweep(path: Path, sweep: Sweep) -> None:
    """Raise InputError where a sweep's folder holds something else, or a sweep that this one does not contain."""
    if not is_sweep(path):
        check_absent(path, instead="it is no sweep; choose another --out")
        return
    saved, given = load_sweep(path), {run.name: run.fingerprint for run in sweep.run}
    # More values or seeds than before are welcome: the runs that are there already count.
    other = next((run.name for run in saved.run if given.get(run.name) != run.fingerprint), None)
    if other is not None or saved.reference != sweep.reference:
        how = f"its run {other} is not one of these" if other else "it has another reference"
        raise InputError(f"--out {path} has another sweep ({how}): {saved.command}; choose another --out")


def write_sweep(path: Path, sweep: Sweep) -> None:
    """Write a sweep's file, and its folder where that does not exist; raises InputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        toml_io.write_atomically(path / SWEEP_FILE, toml_io.dump(sweep.model_dump()).encode())
    except OSError as error:
        raise unwritable(path, error) from None


def saved_steps(folder: Path, run: Run) -> int:
    """Return the steps of the newest checkpoint of a run's folder; 0 where there is none."""
    saved = list_checkpoints(folder / CHECKPOINTS, run.cluster.devices) if (folder / RUN_FILE).is_file() else []
    return int(saved[-1].name.rpartition("-")[2]) if saved else 0
