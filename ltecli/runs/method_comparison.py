"""Compare methods by their validation curves: what each needs to the reference's final loss, and who is best by what.

The reference is the run's own method. A rival's samples, bytes and simulated seconds to the reference's mean final loss
are read off its curve, between evaluations linearly. `lte compare` prints this, and `lte report` of its folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ltecli.console import plain_table
from ltecli.runs.comparison import reached_at
from ltecli.runs.evaluations import Evaluation, evaluations, finite_evaluations
from ltecli.runs.figures import RunRecord
from ltecli.runs.run_table import Group, Spread, Text, cell, loss_cell, loss_text
from simulate.common.units import bytes_text, seconds_text

METHOD = "method.name"
Point = tuple[float, ...]
"""Samples, bytes that a device sent, and simulated seconds, at a moment of a run."""
Reached = tuple[Point, bool]
"""The moment at which a loss was reached, and whether it is only an upper bound."""
AXES: dict[str, Callable[[Evaluation], float]] = {
    "samples": lambda row: row.samples,
    "sent_bytes": lambda row: row.sent_bytes,
    "simulated_s": lambda row: row.simulated_s,
}


@dataclass(frozen=True)
class Contender:
    """A method with its settings, beside the reference."""

    label: str
    group: Group
    to_loss: dict[str, Spread | None]
    """Samples, bytes of a device and simulated seconds to the reference's loss; None where no run reached it."""
    is_bound: bool
    """Whether a run reached it at its first evaluation already, so that it needs at most these."""

    def to_dict(self) -> dict[str, Any]:
        """Return the contender for scripts."""
        reached = {name: spread and spread.to_dict() for name, spread in self.to_loss.items()}
        reached_dict = {**reached, "is_upper_bound": self.is_bound}
        return {"label": self.label, **self.group.to_dict(), "to_reference_loss": reached_dict}


@dataclass(frozen=True)
class Comparison:
    """All contenders, best validation loss first."""

    reference: Contender
    contenders: tuple[Contender, ...]
    samples: int
    """Samples that each was trained on."""

    @property
    def loss(self) -> float:
        """Mean final validation loss of the reference."""
        spread = self.reference.group.spread("val_loss")
        assert spread is not None, "runs evaluate at their end"
        return spread.mean

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison for scripts."""
        return {
            "reference": self.reference.label,
            "reference_loss": self.loss,
            "samples": self.samples,
            "contenders": [contender.to_dict() for contender in self.contenders],
            "verdict": verdict(self),
        }


def compare_groups(groups: Sequence[Group], reference: str) -> Comparison | None:
    """Return the comparison of groups with the reference's; None where that has no finished run yet."""
    own = next((group for group in groups if group.settings.get(METHOD) == reference), None)
    loss = own and own.spread("val_loss")
    if own is None or not isinstance(loss, Spread):
        return None
    contenders = tuple(_contender(group, None if group is own else loss.mean) for group in groups)
    return Comparison(contenders[groups.index(own)], contenders, own.figures[0]["samples"])


def _contender(group: Group, loss: float | None) -> Contender:
    """Return a contender with what it needs to a loss; without one, what its runs needed as a whole."""
    # The reference's own runs end above and below their mean, so that some never reach it.
    found = [end_of(record) if loss is None else to_loss(record, loss) for record in group.records]
    points = [point for point, _ in filter(None, found)]
    reached = {axis: Spread.of([point[i] for point in points]) for i, axis in enumerate(AXES)}
    return Contender(_label(group), group, reached, any(is_bound for _, is_bound in filter(None, found)))


def _label(group: Group) -> str:
    rest = [f"{key.rpartition('.')[2]} {value}" for key, value in group.settings.items() if key != METHOD]
    return ", ".join([group.settings[METHOD], *rest])


def end_of(record: RunRecord) -> Reached:
    """Return samples, bytes of a device and simulated seconds of a whole run."""
    last = evaluations(record)[-1]
    return tuple(axis(last) for axis in AXES.values()), False


def to_loss(record: RunRecord, loss: float) -> Reached | None:
    """Return samples, bytes and simulated seconds until a run's validation loss first was no higher; else None.

    Where the first evaluation is as low already, its figures are a bound.
    """
    rows = finite_evaluations(record)
    found = [reached_at(rows, loss, axis) for axis in AXES.values()]
    point = tuple(value for value in found if value is not None)
    return (point, rows[0].val_loss <= loss) if point else None


def samples_text(value: float) -> str:
    """Return a number of samples."""
    return f"{value:,.0f}"


def comparison_table(comparison: Comparison) -> tuple[Table, list[str]]:
    """Return the table of contenders, and the headers of columns that a narrow terminal leaves out."""
    target = loss_text(comparison.loss)
    headers = ["", f"loss, {comparison.samples:,} samples", f"samples to {target}", "bytes to it", "simulated to it"]
    table = plain_table(*headers, "memory", "planned", "seeds")
    for contender in comparison.contenders:
        group, reached = contender.group, contender.to_loss
        table.add_row(
            contender.label,
            loss_cell(group),
            _reached_text(contender, "samples", samples_text),
            _reached_text(contender, "sent_bytes", bytes_text) if reached["samples"] else "-",
            _reached_text(contender, "simulated_s", seconds_text) if reached["samples"] else "-",
            cell(group.spread("memory_bytes", "measured"), bytes_text),
            cell(group.spread("memory_bytes", "planned"), bytes_text),
            str(len(group.records)),
        )
    return table, ["planned", "seeds"]


def _reached_text(contender: Contender, axis: str, text: Text) -> str:
    spread, runs = contender.to_loss[axis], len(contender.group.records)
    if spread is None:
        return "not reached"
    of = f" ({spread.count} of {runs})" if spread.count < runs else ""
    return f"{'≤ ' if contender.is_bound else ''}{spread.text(text)}{of}"


def verdict(comparison: Comparison) -> str:
    """Return a sentence on which contender is best by what, and where the next one lies within the seeds' spread."""
    loss = f"{comparison.reference.label}'s loss"
    parts = [_best(comparison, "validation loss at equal samples", lambda c: c.group.spread("val_loss"), loss_text)]
    if any(_of_all(c, "samples") for c in comparison.contenders if c is not comparison.reference):
        parts += [
            _best(comparison, f"samples to {loss}", lambda c: _of_all(c, "samples"), samples_text, is_reached=True),
            _best(comparison, f"bytes to {loss}", lambda c: _of_all(c, "sent_bytes"), bytes_text, is_reached=True),
            _best(comparison, f"simulated time to {loss}", lambda c: _of_all(c, "simulated_s"), seconds_text, True),
        ]
    parts.append(_best(comparison, "memory", lambda c: c.group.spread("memory_bytes", "measured"), bytes_text))
    alone = "" if len(parts) > 2 else f"; no other method reached {loss} with all its seeds"
    seeds = min(len(contender.group.records) for contender in comparison.contenders)
    caveat = "" if seeds > 1 else "; of one seed no spread is known, --seeds 3 shows it"
    return f"best by {'; by '.join(part for part in parts if part)}{alone}{caveat}"


def _of_all(contender: Contender, axis: str) -> Spread | None:
    """Return what a contender needs to the loss, where all its seeds reached it."""
    spread = contender.to_loss[axis]
    return spread if spread is not None and spread.count == len(contender.group.records) else None


def _best(
    comparison: Comparison,
    what: str,
    spread_of: Callable[[Contender], Spread | None],
    text: Text,
    is_reached: bool = False,
) -> str:
    """Return who has the least of something, and whom the seeds' spread does not tell apart; "" where nobody has it."""
    pairs = [(spread, contender) for contender in comparison.contenders if (spread := spread_of(contender))]
    if not pairs:
        return ""
    pairs.sort(key=lambda pair: pair[0].mean)
    best, first = pairs[0]
    alike = [contender.label for spread, contender in pairs[1:] if spread.mean == best.mean]
    near = [c.label for spread, c in pairs[1:] if spread.mean != best.mean and spread.overlaps(best)]
    bound = "≤ " if is_reached and first.is_bound else ""
    words = f"{what}: {' and '.join([first.label, *alike])} ({bound}{best.text(text)})"
    return words + (f", with {' and '.join(near)} within the seeds' spread" if near else "")
