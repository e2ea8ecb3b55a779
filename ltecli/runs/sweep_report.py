"""Read a sweep's or a comparison's folder, and print the table of its finished runs, and which are left.

`lte sweep` and `lte compare` end with it, and `lte report FOLDER` prints it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltecli.console import Output
from ltecli.runs.comparison import incomparable
from ltecli.runs.figures import REPORT_VERSION, RunRecord, figures, read_run
from ltecli.runs.method_comparison import compare_groups, comparison_table, verdict
from ltecli.runs.run_table import group_runs, run_table, table_notes
from ltecli.runs.sweep_folder import Sweep, SweepRun, load_sweep
from simulate.common.run_files import EVENTS_FILE


@dataclass(frozen=True)
class SweepRecords:
    """A sweep and its finished runs."""

    path: Path
    sweep: Sweep
    finished: Sequence[SweepRun]
    records: Sequence[RunRecord]
    """Finished runs, and below their figures, in the order of `finished`."""
    figures: Sequence[dict[str, Any]]

    @property
    def left(self) -> list[str]:
        """Names of the runs that are not finished."""
        done = {run.name for run in self.finished}
        return [run.name for run in self.sweep.run if run.name not in done]


def read_sweep(path: Path, on_skip: Callable[[str], None]) -> SweepRecords:
    """Read a sweep's folder; raises InputError."""
    sweep = load_sweep(path)
    begun = [run for run in sweep.run if (path / run.name / EVENTS_FILE).is_file()]
    read = [(run, record, figures(record)) for run in begun for record in (read_run(path / run.name, on_skip),)]
    done = [(run, record, figure) for run, record, figure in read if figure["steps"] == figure["planned_steps"]]
    return SweepRecords(path, sweep, [run for run, _, _ in done], [r for _, r, _ in done], [f for _, _, f in done])


def report_sweep(runs: SweepRecords, output: Output, failed: dict[str, str] | None = None) -> None:
    """Print the table of a sweep's finished runs. `failed` are runs that just failed, and why."""
    sweep, left = runs.sweep, runs.left
    groups = group_runs([run.settings for run in runs.finished], runs.records, runs.figures)
    comparison = compare_groups(groups, sweep.reference) if sweep.reference else None
    output.json(
        {
            "version": REPORT_VERSION,
            "sweep": str(runs.path),
            "runs": list(runs.figures),
            "groups": [group.to_dict() for group in groups],
            "comparison": comparison and comparison.to_dict(),
            "unfinished": left,
            "failed": failed or {},
        }
    )
    if comparison is not None:
        output.table(*comparison_table(comparison))
        said = verdict(comparison)
        output.text(f"{said[0].upper()}{said[1:]}.")
        output.text(
            "bytes: sent by a device, counted; simulated: the time of the profile's hardware; memory: of one device, "
            "measured; ±: standard deviation over seeds"
        )
    elif groups:
        output.table(*run_table(groups))
        for line in table_notes(groups):
            output.text(line)
    if (reason := incomparable(runs.records)) is not None:
        output.text(reason)
    if left:
        names = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        output.text(f"{len(left)} of {len(sweep.run)} runs are not finished: {names}; to go on: {sweep.command}")
