"""One table for many runs: a row for each setting, mean ± standard deviation over its seeds, best first.

`lte report` of several runs and `lte sweep` print it. Runs are grouped by what differs between them; those that differ
in nothing but the seed are one row.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from ltecli.console import plain_table
from ltecli.runs.figures import RunRecord
from ltecli.runs.variants import SEED, short_keys
from simulate.common.units import bytes_text, seconds_text
from simulate.config.run import Run

Figures = dict[str, Any]
Text = Callable[[float], str]
SMALL, SMALL_SHARE = 5e-6, 5e-3
"""Standard deviation, as a share of the mean, below which four decimals of a loss, or whole per cents, hide it."""
MOST_CHARACTERS = 20
"""Longest path of a run that stands in the table; longer ones stand below it."""
MOST_KEYS = 5
"""Differing keys that get a column each."""
EVALUATED = "train.evaluate_samples"


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of a figure over runs."""

    mean: float
    std: float | None
    """None for a single run."""
    count: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        """Return the spread of the finite values; None where there is none."""
        known = [float(value) for value in values if value is not None and math.isfinite(value)]
        if not known:
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))

    def text(self, text: Text) -> str:
        """Return mean ± standard deviation, of bytes and seconds in per cent; the mean alone where it is lost."""
        relative = text in (bytes_text, seconds_text)
        if self.std is None or self.std <= (SMALL_SHARE if relative else SMALL) * abs(self.mean):
            return text(self.mean)
        if relative:  # "± 16.3 kB" would make the widest column of a table
            return f"{text(self.mean)} ± {self.std / self.mean:.0%}"
        return f"{text(self.mean)} ± {text(self.std)}"

    def overlaps(self, other: Spread) -> bool:
        """Whether two means are no further apart than two runs of one setting each would be, by both deviations."""
        if self.std is None or other.std is None:
            return False
        return abs(self.mean - other.mean) <= math.hypot(self.std, other.std)

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the spread for scripts."""
        return {"mean": self.mean, "std": self.std, "count": self.count}


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed, and their figures."""

    settings: Mapping[str, str]
    """Values that differ from other groups', by key."""
    records: tuple[RunRecord, ...]
    figures: tuple[Figures, ...]

    def spread(self, *path: str) -> Spread | None:
        """Return the spread of a figure, named by its keys in `lte report --json`."""
        values: list[Any] = list(self.figures)
        for key in path:
            values = [value and value.get(key) for value in values]
        return Spread.of(values)

    def to_dict(self) -> dict[str, Any]:
        """Return the group for scripts."""
        paths = {
            "val_loss": ("val_loss",),
            "val_accuracy": ("val_accuracy",),
            "sent_bytes_per_device": ("sent_bytes_per_device", "counted"),
            "simulated_s": ("wall_s", "simulated"),
            "measured_s": ("wall_s", "measured"),
            "memory_bytes_planned": ("memory_bytes", "planned"),
            "memory_bytes_measured": ("memory_bytes", "measured"),
        }
        spreads = {name: self.spread(*path) for name, path in paths.items()}
        return {
            "settings": dict(self.settings),
            "runs": [str(record.path) for record in self.records],
            **{name: spread and spread.to_dict() for name, spread in spreads.items()},
        }


def loss_text(value: float) -> str:
    """Return a loss with four decimals."""
    return f"{value:.4f}"


def accuracy_text(value: float) -> str:
    """Return an accuracy in per cent."""
    return f"{value:.2%}"


def cell(spread: Spread | None, text: Text) -> str:
    """Return a spread for a table; "-" where there is none."""
    return "-" if spread is None else spread.text(text)


def loss_cell(group: Group) -> str:
    """Return a group's validation loss for a table, and of how many runs where not all have a finite one."""
    spread, runs = group.spread("val_loss"), len(group.records)
    return cell(spread, loss_text) + (f" ({spread.count} of {runs})" if spread and spread.count < runs else "")


def differences(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return the keys in which runs differ, with each one's values; without the seed, and without what is not set.

    Keys that only some methods have count where those differ in them.
    """
    flat = [
        {f"{table}.{key}": value for table, keys in run.model_dump().items() for key, value in keys.items()}
        for run in runs
    ]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    differing = [key for key in keys if key != SEED and len({repr(v[key]) for v in flat if key in v}) > 1]
    return [{key: str(values[key]) for key in differing if values.get(key) is not None} for values in flat]


def group_runs(
    settings: Sequence[Mapping[str, str]], records: Sequence[RunRecord], figures: Sequence[Figures]
) -> list[Group]:
    """Return the groups of runs with equal settings and steps done, those with the lowest validation loss first."""
    found: dict[Any, list[int]] = {}
    for index, (values, figure) in enumerate(zip(settings, figures, strict=True)):
        found.setdefault((tuple(values.items()), figure["steps"], figure["planned_steps"]), []).append(index)
    groups = [
        Group(settings[members[0]], tuple(records[i] for i in members), tuple(figures[i] for i in members))
        for members in found.values()
    ]

    def loss(group: Group) -> float:
        spread = group.spread("val_loss")
        return math.inf if spread is None else spread.mean

    return sorted(groups, key=loss)


def run_table(groups: Sequence[Group], named: bool = False) -> tuple[Table, list[str]]:
    """Return the table of groups, and the headers of columns that a narrow terminal leaves out.

    With `named` its first column has the runs' paths.
    """
    labels = _labels(groups)
    told = short_keys(_keys(groups)[:MOST_KEYS])
    unfinished = any(f["steps"] < f["planned_steps"] for group in groups for f in group.figures)
    columns: list[tuple[str, Callable[[Group], str]]] = []
    if named:
        columns.append(("run", lambda g: labels[g.records[0].path]))
    columns += [(name, partial(_setting_text, key)) for key, name in told.items()]
    if any(len(group.records) > 1 for group in groups):
        columns.append(("runs" if named else "seeds", lambda g: str(len(g.records))))
    if unfinished or ("train.steps" not in _keys(groups) and len({g.figures[0]["steps"] for g in groups}) > 1):
        columns.append(("steps", lambda g: f"{g.figures[0]['steps']:,} of {g.figures[0]['planned_steps']:,}"))
    columns.append(("validation loss", loss_cell))
    if any(group.spread("val_accuracy") for group in groups):
        columns.append(("top-1 accuracy", lambda g: cell(g.spread("val_accuracy"), accuracy_text)))
    columns += [
        ("sent", lambda g: cell(g.spread("sent_bytes_per_device", "counted"), bytes_text)),
        ("simulated", lambda g: cell(g.spread("wall_s", "simulated"), seconds_text)),
        ("memory", lambda g: cell(g.spread("memory_bytes", "measured"), bytes_text)),
    ]
    secondary: list[tuple[str, Callable[[Group], str]]] = [
        ("memory planned", lambda g: cell(g.spread("memory_bytes", "planned"), bytes_text)),
        ("time here", lambda g: cell(g.spread("wall_s", "measured"), seconds_text)),
    ]
    table = plain_table(*(header for header, _ in (*columns, *secondary)))
    for group in groups:
        table.add_row(*(text(group) for _, text in (*columns, *secondary)))
    return table, [header for header, _ in secondary]


def _keys(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(key for group in groups for key in group.settings))


def _setting_text(key: str, group: Group) -> str:
    return group.settings.get(key, "-")


def _labels(groups: Sequence[Group]) -> dict[Path, str]:
    """Return what each group's first run is called: its path, or a number where a path is too long for a column."""
    paths = [group.records[0].path for group in groups]
    if all(len(str(path)) <= MOST_CHARACTERS for path in paths):
        return {path: str(path) for path in paths}
    return {path: f"#{number}" for number, path in enumerate(paths, 1)}


LEGEND = (
    "best validation loss first; sent: by a device, counted; simulated: the time of the profile's hardware; memory: of "
    "a device, measured"
)
"""Line under the table."""


def table_notes(groups: Sequence[Group], named: bool = False) -> list[str]:
    """Return lines on the table: its columns, its ±, and the keys without a column; with `named` its runs, too."""
    most = max(len(group.records) for group in groups)
    lines = [LEGEND + (f"; ±: standard deviation over {'runs' if named else 'seeds'}" if most > 1 else "")]
    labels = _labels(groups)
    for group in groups if named else ():
        path, *others = (str(record.path) for record in group.records)
        if others or labels[group.records[0].path] != path:
            lines.append(f"{labels[group.records[0].path]}: {', '.join([path, *others])}")
    keys = _keys(groups)
    if more := keys[MOST_KEYS:]:
        lines.append(f"different, too: {', '.join(more)}")
    if EVALUATED in keys:
        lines.append(f"losses are of different {EVALUATED}: less samples, more noise")
    return lines
