"""Print a sweep's or a comparison's folder: the table of its finished runs, and which are left.

`lte sweep` and `lte compare` end with it, and `lte report FOLDER` prints it again.
"""

from __future__ import annotations

from pathlib import Path

from ltecli.console import Output
from ltecli.runs.figures import REPORT_VERSION, figures, read_run
from ltecli.runs.method_comparison import compare_groups, comparison_table, verdict
from ltecli.runs.run_table import group_runs, run_table, table_notes
from ltecli.runs.sweep_folder import load_sweep
from simulate.common.run_files import EVENTS_FILE


def report_sweep(path: Path, output: Output, failed: dict[str, str] | None = None) -> None:
    """Print the table of a sweep's finished runs; raises InputError. `failed` are runs that just failed, and why."""
    sweep = load_sweep(path)
    begun = [run for run in sweep.run if (path / run.name / EVENTS_FILE).is_file()]
    records = [read_run(path / run.name, output.warning) for run in begun]
    documents = [figures(record) for record in records]
    finished = [i for i, figure in enumerate(documents) if figure["steps"] == figure["planned_steps"]]
    groups = group_runs(
        [begun[i].settings for i in finished], [records[i] for i in finished], [documents[i] for i in finished]
    )
    done = {begun[i].name for i in finished}
    left = [run.name for run in sweep.run if run.name not in done]
    comparison = compare_groups(groups, sweep.reference) if sweep.reference else None
    output.json(
        {
            "version": REPORT_VERSION,
            "sweep": str(path),
            "runs": documents,
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
        output.table(*run_table(groups, named=False))
        for line in table_notes(groups):
            output.text(line)
    if left:
        names = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        output.text(f"{len(left)} of {len(sweep.run)} runs are not finished: {names}; to go on: {sweep.command}")
