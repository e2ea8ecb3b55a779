"""lte sweep: train every combination of values, with several seeds, and print one table.

First it says how many runs there are and how long they take, and refuses what run.toml's rules refuse. The same command
goes on where it stopped. `lte compare` runs its methods through `train_variants`, too.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ltecli.charts.page import HTML_OPTION, check_html
from ltecli.charts.report_page import report_html
from ltecli.commands.doctor import check_machine
from ltecli.commands.simulation_fits import check_simulation_fits, host_memory_bytes
from ltecli.console import Output
from ltecli.errors import DONE, FAILED, INTERRUPTED
from ltecli.output_paths import write_file
from ltecli.runs.calibrating import calibrate_here
from ltecli.runs.lock import lock_folder
from ltecli.runs.many_runs import Work, plan_work, train_all
from ltecli.runs.run_folder import RUNS, check_trainable, interrupted_by_sigterm, run_name
from ltecli.runs.sweep_folder import Sweep, check_sweep, is_sweep, make_sweep, write_sweep
from ltecli.runs.sweep_report import read_sweep, report_sweep
from ltecli.runs.variants import Refusal, Variant, expand, read_lists, refuse
from simulate.config.run import Run, load_given_run, with_absolute_paths
from simulate.data.load import check_data

if TYPE_CHECKING:
    import torch

SHOWN = 20
"""Runs that --dry-run lists; --json has all."""


@dataclass(frozen=True)
class SweepArgs:
    """Options of `lte sweep` and `lte compare`."""

    assignments: Sequence[str] = ()
    """Keys, as table.key=value, or table.key=a,b,c to try several."""
    seeds: int = 1
    out: Path | None = None
    parallel: int | None = None
    """Runs at a time; None: as many as this machine bears."""
    device: str = "auto"
    skip_refused: bool = False
    """Whether to leave out combinations that are refused."""
    ignore_memory: bool = False
    dry_run: bool = False
    html: Path | None = None
    """Page to write at the end."""
    force: bool = False
    """Whether the page may replace an existing file."""

    def words(self) -> list[str]:
        """Return the options that tell a sweep from others, as words of a command line."""
        words = [word for assignment in self.assignments for word in ("--set", assignment)]
        words += ["--seeds", str(self.seeds)] if self.seeds > 1 else []
        words += ["--out", str(self.out)] if self.out is not None else []
        words += ["--html", str(self.html)] if self.html is not None else []
        words += ["--device", self.device] if self.device != "auto" else []
        return words + ["--skip-refused"] * self.skip_refused + ["--ignore-memory"] * self.ignore_memory


def sweep_command(given: Path, args: SweepArgs, as_json: bool, quiet: bool) -> int:
    """Train all combinations; returns the exit code."""
    with interrupted_by_sigterm():
        output = Output(as_json, quiet or as_json)
        lists, check = read_lists(args.assignments), run_check(args)
        variants, refused = expand(
            lambda assignments: with_absolute_paths(load_given_run(given, assignments)), lists, args.seeds, check
        )
        command = shlex.join(["lte", "sweep", str(given), *args.words()])
        path = args.out or RUNS / f"{run_name(given)}-sweep"
        return train_variants(path, variants, refused, command, "", args, output)


def run_check(args: SweepArgs) -> Callable[[Run], None]:
    """Return the check of a run before anything starts: packages, data, and memory for a simulation here."""
    from simulate.layers import accelerator

    device = accelerator.choose(args.device)

    def check(run: Run) -> None:
        check_trainable(run)
        check_data(run)
        if not args.ignore_memory:
            check_simulation_fits(run, device, is_tiny=True)  # --tiny is no option here

    return check


def train_variants(
    path: Path,
    variants: Sequence[Variant],
    refused: Sequence[Refusal],
    command: str,
    reference: str,
    args: SweepArgs,
    output: Output,
) -> int:
    """Train the runs of a sweep or a comparison that are left, and print the table; returns the exit code."""
    if args.html is not None:
        check_html(args.html, args.force)
    if not (args.skip_refused and variants):
        refuse(refused, bool(variants))
    sweep = make_sweep(command, variants, reference)
    check_sweep(path, sweep)
    from simulate.layers import accelerator

    device = accelerator.choose(args.device)
    warnings = check_machine(variants[0].run, args.device, None)
    work = plan_work(path, variants, device.type, args.parallel, lambda run: host_memory_bytes(run, device))
    for refusal in refused:
        output.hint(f"left out: {refusal.name}: {refusal.reason}")
    if args.dry_run:
        return _report_plan(work, refused, output)
    for warning in warnings:
        output.warning(warning)
    return _train(work, sweep, device, args, output)


def _train(work: Work, sweep: Sweep, device: torch.device, args: SweepArgs, output: Output) -> int:
    output.hint(work.text())
    is_new = not is_sweep(work.path)
    write_sweep(work.path, sweep)
    try:
        with lock_folder(work.path):
            if is_new:
                output.hint(f"Ctrl-C saves all and stops; the same command goes on: {sweep.command}")
            outcome = train_all(work, args.device, output)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; what was saved stays, to go on: {sweep.command}") from None
    if outcome.is_interrupted:
        output.hint(f"interrupted, all saved; to go on: {sweep.command}")
        return INTERRUPTED
    runs = read_sweep(work.path, output.warning)
    if args.html is not None and runs.records:
        write_file(args.html, report_html(runs.records, runs.figures, sweep.command), HTML_OPTION)
        output.hint(f"wrote {args.html}")
    report_sweep(runs, output, outcome.failed)
    output.hint(f"next: lte report {work.path}")
    if outcome.failed:
        return FAILED
    if device.type == "cpu" and work.left:
        calibrate_here(output)
    return DONE


def _report_plan(work: Work, refused: Sequence[Refusal], output: Output) -> int:
    """Print what would be trained."""
    output.text(work.text())
    for variant in work.variants[:SHOWN]:
        output.text(f"  {variant.name}{'' if variant.name in work.left else ' (finished)'}")
    if len(work.variants) > SHOWN:
        output.text(f"  and {len(work.variants) - SHOWN} more; --json has all")
    low_s, high_s = work.seconds
    output.json(
        {
            "version": 1,
            "sweep": str(work.path),
            "runs": [
                {"name": v.name, "settings": dict(v.settings), "seed": v.run.train.seed, "left": v.name in work.left}
                for v in work.variants
            ],
            "refused": [{"name": refusal.name, "reason": refusal.reason} for refusal in refused],
            "parallel": work.parallel,
            "threads": work.threads,
            "seconds_low": low_s,
            "seconds_high": high_s,
        }
    )
    return DONE
