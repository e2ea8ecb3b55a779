"""Say who left a launched run and who joined it again, from its events: for `lte report` and `lte watch`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from simulate.common.events import Event

SHOWN = 6
"""Newest changes that are shown."""


def attendance_of(events: Iterable[Event]) -> dict[str, Any]:
    """Return how many devices left and joined, which are away at the end, and each change."""
    counts, away, changes = {"left": 0, "joined": 0}, set[int](), []
    for event in events:
        kind = event["kind"]
        if kind in counts:
            counts[kind] += len(event["devices"])
            away = away | set(event["devices"]) if kind == "left" else away - set(event["devices"])
            changes.append({key: value for key, value in event.items() if key != "version"})
        elif kind in ("start", "resume", "restart"):  # all begin together
            away = set()
    return {**counts, "away": sorted(away), "changes": changes}


def change_text(change: Event) -> str:
    """Return a line about one change."""
    who = devices_text(change["devices"])
    if change["kind"] == "left":
        return f"{who} left at step {change['step']:,}: {change['why']}"
    if change["missed_merges"] is not None:
        missed = change["missed_merges"]
        brought = f"with what it had learned meanwhile ({missed} merge{'' if missed == 1 else 's'} late)"
    elif change["own_step"] is None:
        brought = "with new adapters"
    else:
        brought = f"with its own state of step {change['own_step']:,}"
    return f"{who} joined at step {change['step']:,}, {brought}"


def attendance_lines(attendance: dict[str, Any]) -> list[str]:
    """Return a sentence about all changes, and the newest ones; nothing where there was none."""
    changes = attendance["changes"]
    if not changes:
        return []
    away = f"; away now: {devices_text(attendance['away'])}" if attendance["away"] else ""
    first = f"devices left {attendance['left']} times and joined {attendance['joined']} times{away}"
    hidden = [f"  ({len(changes) - SHOWN} earlier changes in events.jsonl)"] if len(changes) > SHOWN else []
    return [first, *hidden, *(f"  {change_text(change)}" for change in changes[-SHOWN:])]


def devices_text(devices: Iterable[int]) -> str:
    """Return "device 1", or "devices 1, 3"."""
    numbers = [str(device) for device in devices]
    return f"device{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"
