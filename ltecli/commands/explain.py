"""Explanations of lte plan: --why explains the choice, --timeline simulates its rounds, --timeline-svg draws them, and
--html puts all on a page.

`lte plan` imports this module only where one of them is asked for, since the simulation loads numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltecli.charts.page import HTML_OPTION, check_html
from ltecli.charts.plan_page import plan_html
from ltecli.charts.timeline import bars, devices_text, legend, svg
from ltecli.console import Output, plain_table
from ltecli.output_paths import check_file, write_file
from simulate.common.errors import InputError
from simulate.common.units import seconds_text
from simulate.planning.candidate import Candidate, describe
from simulate.planning.explain import Why, explain
from simulate.planning.planner import Plan
from simulate.planning.what_if import (
    CHURN_PER_HOUR,
    DRAWN_ROUNDS,
    ROUNDS,
    UPGRADE_MATTERS,
    WORTH_GAIN,
    Churn,
    Outlook,
    look_ahead,
)

MOST_ROUNDS = 100_000
SVG_OPTION = "--timeline-svg"


@dataclass(frozen=True)
class ExplainArgs:
    """Options of the explanations."""

    why: bool = False
    timeline: bool = False
    rounds: int | None = None
    svg: Path | None = None
    force: bool = False
    html: Path | None = None
    """A page, which has all explanations."""

    @property
    def wants_timeline(self) -> bool:
        """Whether rounds must be simulated."""
        return self.timeline or self.svg is not None or self.html is not None

    @property
    def files(self) -> dict[str, Path | None]:
        """Files to write, by option."""
        return {SVG_OPTION: self.svg, HTML_OPTION: self.html}

    def check(self) -> None:
        """Raise InputError for options that cannot be met; called before anything is planned."""
        if self.rounds is not None and not 1 <= self.rounds <= MOST_ROUNDS:
            raise InputError(f"--rounds {self.rounds}: must be from 1 to {MOST_ROUNDS:,}")
        if self.rounds is not None and not self.wants_timeline:
            raise InputError(f"--rounds {self.rounds} counts the rounds of --timeline; add it, or leave --rounds away")
        if self.svg is not None:
            if self.svg.suffix.lower() != ".svg":
                raise InputError(f"{SVG_OPTION} {self.svg}: the drawing is an SVG; name it {self.svg.stem}.svg")
            check_file(self.svg, self.force, "timeline.svg", SVG_OPTION)
        if self.html is not None:
            check_html(self.html, self.force)


@dataclass(frozen=True)
class Explained:
    """The explanations; None where one was not asked for, or the plan has no choice."""

    why: Why | None = None
    outlook: Outlook | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the explanations' keys in the plan's JSON."""
        return {
            "why": self.why and self.why.to_dict(),
            "timeline": self.outlook and self.outlook.to_dict(),
        }


def explain_plan(plan: Plan, args: ExplainArgs) -> Explained:
    """Return the explanations that were asked for."""
    if plan.chosen is None:
        return Explained()
    # Each explanation takes seconds, so only what was asked for is computed.
    why = explain(plan, plan.chosen) if args.why or args.html is not None else None
    outlook = look_ahead(plan, plan.chosen, args.rounds or ROUNDS) if args.wants_timeline else None
    return Explained(why, outlook)


def show_explained(plan: Plan, explained: Explained, args: ExplainArgs, output: Output) -> None:
    """Print the explanations."""
    if plan.chosen is None:
        return
    if explained.why is not None and args.why:
        _show_why(explained.why, output)
    # The page has both; who asks for it alone sees the verdict.
    if explained.outlook is not None and (args.timeline or args.svg is not None):
        _show_outlook(plan.chosen, explained.outlook, output)
    for path in (args.svg, args.html):
        if path is not None:
            output.hint(f"wrote {path}")


def write_page(plan: Plan, explained: Explained, args: ExplainArgs, command: str) -> None:
    """Write the page, where one is asked for; raises InputError where it cannot be written."""
    if args.html is None:
        return
    outlook = explained.outlook
    told = [shares_text(outlook), *outlook_lines(outlook)] if outlook else []
    write_file(args.html, plan_html(plan, explained.why, outlook, told, command), HTML_OPTION)


def write_picture(plan: Plan, explained: Explained, args: ExplainArgs) -> None:
    """Write the SVG file, where one is asked for; raises InputError where it cannot be written."""
    if plan.chosen is None or explained.outlook is None or args.svg is None:
        return
    timeline = explained.outlook.timeline
    # Device numbers mean little in a picture.
    kinds = [device.kind for device in plan.profile.devices(plan.chosen.run.cluster.devices)]
    names = {span.device: f"{span.device}: {kinds[span.device]}" for span in timeline.spans}
    title = f"{describe(plan.chosen.run)} on {len(kinds):,} x {plan.profile.name}"
    write_file(args.svg, svg(timeline, title, names), SVG_OPTION)


def _show_why(why: Why, output: Output) -> None:
    """Print what limits the choice, how other hardware would change it, and why its neighbours lost."""
    output.text("")
    output.heading(f"why: {why.summary}")
    output.text(why.reason)
    for choice in why.choices:
        output.text(str(choice))
    table = plain_table("with", "gain", "chosen then")
    table.columns[2].justify = "left"
    for change in why.changes:
        gain = "-" if change.gain is None else f"{change.gain:.2f}x"
        chosen = "cannot be planned" if change.chosen is None else describe(change.chosen.run)
        table.add_row(change.what, gain, "the same" if change.same else chosen)
    output.table(table)
    table = plain_table("neighbour", "instead", "not chosen because")
    table.columns[2].justify = "left"
    for neighbour in why.neighbours:
        table.add_row(neighbour.key, neighbour.value, neighbour.reason)
    output.table(table)


def _show_outlook(chosen: Candidate, outlook: Outlook, output: Output) -> None:
    """Print the simulated rounds, and what more devices, faster links and lost devices would change."""
    timeline = outlook.timeline
    output.text("")
    counts = (timeline.rounds, "round"), (timeline.devices, "device")
    rounds, devices = (f"{count:,} {what}{'s' if count > 1 else ''}" for count, what in counts)
    output.heading(
        f"timeline: {rounds} of {devices}: {seconds_text(timeline.wall_s)}, {timeline.wall_s / outlook.planned_s:.3f}x "
        f"the closed form; the whole run {seconds_text(outlook.run_wall_s)}"
    )
    output.text(shares_text(outlook))
    # A bar of many rounds would show nothing but noise.
    drawn = min(DRAWN_ROUNDS, timeline.rounds)
    if left_out := devices_text(timeline):
        output.text(left_out)
    table = plain_table("device", f"{drawn} round{'s' if drawn > 1 else ''} ({legend()})")
    table.columns[1].justify = "left"
    for device, bar in bars(timeline).items():
        table.add_row(str(device), bar)
    output.table(table)
    for line in outlook_lines(outlook):
        output.text(line)


def outlook_lines(outlook: Outlook) -> list[str]:
    """Return in words what more devices, faster links and lost devices would change."""
    timeline = outlook.timeline
    lines = [_worth_text(outlook), _upgrade_text(outlook), _churn_text(outlook.churn, timeline.devices)]
    if timeline.leaves:
        whole = timeline.devices * timeline.steps
        lines.append(
            f"by the profile, devices left {timeline.leaves:,} times: {timeline.device_steps / whole:.1%} trained"
        )
    return lines


def shares_text(outlook: Outlook) -> str:
    """Return a line with the shares of a device's time."""
    timeline = outlook.timeline
    shares = {kind: seconds / timeline.wall_s for kind, seconds in timeline.seconds.items()}
    return "a device's time: " + ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items())


def _worth_text(outlook: Outlook) -> str:
    """Return a line about how many devices are worth adding."""
    steps = ", ".join(f"{d.devices:,}: {d.gain:.2f}x" for d in outlook.doublings)
    rule = f"a doubling is worth it from {WORTH_GAIN - 1:.0%} less time to equal loss"
    if not outlook.doublings:
        return "devices: more cannot be planned for these data, or are more than is simulated"
    if outlook.worth_devices == outlook.timeline.devices:
        return f"devices: no more are worth adding ({rule}; {steps})"
    return f"devices: worth adding up to {outlook.worth_devices:,} ({rule}; each doubling gains {steps})"


def _upgrade_text(outlook: Outlook) -> str:
    """Return a line about the link to upgrade first."""
    links = [upgrade for upgrade in outlook.upgrades if upgrade.what.startswith("link")]
    # Printed beside the links: where faster devices gain more, no link is worth its money.
    devices = next(upgrade for upgrade in outlook.upgrades if not upgrade.what.startswith("link"))
    best = links[0]
    beside = f"devices twice as fast: {devices.speedup:.2f}x"
    if best.speedup < UPGRADE_MATTERS:
        return f"links: none is worth an upgrade, the best ({best.what}) makes it {best.speedup:.3f}x as fast; {beside}"
    rest = "; ".join(f"{u.what}: {u.speedup:.2f}x" for u in links[1:] if u.speedup >= UPGRADE_MATTERS)
    return f"links: first {best.what}: {best.speedup:.2f}x as fast" + (f"; {rest}" if rest else "") + f"; {beside}"


def _churn_text(churn: Churn, devices: int) -> str:
    """Return a line about the time that devices cost which leave and come back."""
    share = churn.elastic_factor - 1
    # With losses faster than rounds, a run that repeats each of them gets nowhere.
    redo = "would never end" if churn.redo_factor is None else f"takes {churn.redo_factor - 1:.1%} longer"
    launched = "which has a quorum, goes on" if churn.drops_lost else f"which repeats the round, {redo}"
    return (
        f"churn: {CHURN_PER_HOUR:.0%} of {devices:,} devices leaving an hour, back after {seconds_text(churn.join_s)}, "
        f"cost {share:.2%} where the others continue; a launched run, {launched}"
    )
