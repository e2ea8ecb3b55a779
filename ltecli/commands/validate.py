"""lte validate: compare predictions of memory, bytes and time with measurements on this machine.

Plans are only as good as their forecasts, and every machine is different. simulate.measure.accuracy collects the rows;
this module chooses them, prints tables with mean and worst errors, and writes them as markdown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ltecli.console import Output, plain_table
from ltecli.output_paths import check_file, write_file
from ltecli.runs.calibrating import calibrate_here
from simulate.common.errors import InputError, near_match
from simulate.common.processor import machine_facts, machine_text
from simulate.common.units import bytes_text, seconds_text
from simulate.config.profiles import load_profile
from simulate.measure.random_runs import AUTOCASTS, Sample
from simulate.models.families.table import FAMILIES

if TYPE_CHECKING:
    from simulate.measure.accuracy import Errors, Row

VALIDATION_VERSION = 1


@dataclass(frozen=True)
class ValidateArgs:
    """Choice of the random runs to validate."""

    quick: bool = False
    shapes: int | None = None
    """Random runs of each kind of measurement."""
    seed: int = 0
    family: str | None = None
    autocast: str = "none"

    def check(self) -> None:
        """Raise InputError for an unknown family or format."""
        for option, given, known in (("family", self.family, FAMILIES), ("autocast", self.autocast, AUTOCASTS)):
            if given is not None and given not in known:
                raise InputError(f"--{option} {given!r} is not known; {near_match(given, known)}")

    def sample(self, count: int, quick_count: int) -> Sample:
        """Return the choice of random runs: `count` of them, or `quick_count`, unless --shapes gives a number."""
        number = self.shapes or (quick_count if self.quick else count)
        return Sample(number, self.seed, self.family, self.autocast, small=self.quick)


@dataclass(frozen=True)
class Section:
    """One kind of prediction: its description, its rows, and the format of its figures."""

    about: str
    collect: Callable[[ValidateArgs], list[Row]]
    figure: Callable[[float], str]


def _memory(args: ValidateArgs) -> list[Row]:
    from simulate.measure.accuracy import allocated_rows, tracked_rows

    return [*tracked_rows(args.sample(68, 8)), *allocated_rows(args.sample(17, 4))]


def _bytes(args: ValidateArgs) -> list[Row]:
    from simulate.measure.accuracy import byte_rows

    return list(byte_rows(args.sample(34, 6)))


def _time(args: ValidateArgs) -> list[Row]:
    from simulate.measure.accuracy import time_rows

    return list(time_rows(args.sample(12, 4)))


SECTIONS: dict[str, Section] = {
    "memory": Section("planned peak of one device, in bytes", _memory, bytes_text),
    "bytes": Section("planned bytes that all devices send", _bytes, bytes_text),
    "time": Section("planned seconds of a step on `local`, as measured here before, else guessed", _time, seconds_text),
}
"""Kinds of predictions by their names, which --only takes."""


def _on_profile(name: str) -> Section:
    """Return the section of times on a measured profile, over networks that its measurement did not use."""
    profile = load_profile(name)

    def collect(args: ValidateArgs) -> list[Row]:
        from simulate.measure.accuracy import Row
        from simulate.measure.step_times import held_out_times

        return [Row(case, "steps", planned, took) for case, planned, took in held_out_times(profile, args.quick)]

    return Section(f"planned seconds of a step on {profile.name}", collect, seconds_text)


def validate_command(
    only: str | None, args: ValidateArgs, out: Path | None, as_json: bool, quiet: bool, profile: str | None = None
) -> int:
    """Print each section's rows and errors, and write them to `out`; returns the exit code."""
    if only is not None and only not in SECTIONS:
        raise InputError(f"--only {only!r} is no section; {near_match(only, SECTIONS)}")
    args.check()
    # A measured profile is compared on given networks, which no option changes.
    if profile is not None and args != ValidateArgs(quick=args.quick):
        raise InputError(
            "--profile times steps of given networks, and --shapes, --seed, --family and --autocast choose random "
            "ones; leave one or the other away"
        )
    if out is not None:
        check_file(out, force=True, example="validation.md")  # tables are made anew, so they may be replaced
    # A measured profile replaces the guessed rates of `local`, and with them the rows.
    sections = SECTIONS if profile is None else {**SECTIONS, "time": _on_profile(profile)}
    from simulate.measure.accuracy import errors_of

    output, results = Output(as_json, quiet), {}
    machine = machine_facts()
    for name in [only] if only else sections:
        output.hint(f"{name}: {sections[name].about}")
        # Each section prints as soon as it is there, since they take minutes.
        results[name] = rows = sections[name].collect(args)
        if out is not None:  # before it is printed: a reader may leave early, as head does
            parts = (_markdown(key, sections[key].about, found, errors_of(found)) for key, found in results.items())
            write_file(out, "\n".join([*parts, f"On {machine_text(machine)}.\n"]))
        _show(output, name, rows, errors_of(rows))
    output.text(f"on: {machine_text(machine)}")
    output.json(
        {
            "version": VALIDATION_VERSION,
            **asdict(args),
            "machine": machine,
            **{
                name: {
                    "errors": asdict(errors_of(rows)),
                    "rows": [{**asdict(row), "error": row.error} for row in rows],
                }
                for name, rows in results.items()
            },
        }
    )
    if out is not None:
        output.hint(f"wrote {out}")
    calibrate_here(output)
    return 0


def _show(output: Output, name: str, rows: Sequence[Row], errors: Errors) -> None:
    table = plain_table(name, "predicted", "measured", "difference", "by")
    figure = SECTIONS[name].figure
    for row in rows:
        table.add_row(row.name, figure(row.predicted), figure(row.measured), f"{row.error:+.2%}", row.how)
    output.table(table)
    output.text(f"{name}: {_summary(errors)}")


def _summary(errors: Errors) -> str:
    return (
        f"{errors.rows} runs, mean error {errors.mean:.2%}, worst {errors.worst:.2%}, furthest under "
        f"{errors.furthest_under:.2%}, {errors.share_under:.0%} under"
    )


def _markdown(name: str, about: str, rows: Sequence[Row], errors: Errors) -> str:
    figure = SECTIONS[name].figure
    lines = [
        f"## {name.capitalize()}: {about}", "", f"{_summary(errors)}.", "",
        "| run | by | predicted | measured | difference |", "|---|---|---|---|---|",
        *(f"| {r.name} | {r.how} | {figure(r.predicted)} | {figure(r.measured)} | {r.error:+.2%} |" for r in rows),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
