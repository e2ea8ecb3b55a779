"""Who left and who joined, in words."""

from __future__ import annotations

from ltecli.runs.attendance import attendance_lines, attendance_of, change_text

EVENTS = [
    {"kind": "start", "step": 0},
    {"kind": "left", "step": 20, "devices": [1, 2], "why": "process 1 on node 0 ended"},
    {"kind": "joined", "step": 35, "devices": [1], "own_step": 15, "missed_merges": None},
    {"kind": "left", "step": 50, "devices": [3], "why": "late"},
    {"kind": "joined", "step": 55, "devices": [3], "own_step": 49, "missed_merges": 1},
]


def test_changes_are_counted_and_told() -> None:
    attendance = attendance_of(EVENTS)
    assert (attendance["left"], attendance["joined"], attendance["away"]) == (3, 2, [2])
    assert attendance_lines(attendance) == [
        "devices left 3 times and joined 2 times; away now: device 2",
        "  devices 1, 2 left at step 20: process 1 on node 0 ended",
        "  device 1 joined at step 35, with its own state of step 15",
        "  device 3 left at step 50: late",
        "  device 3 joined at step 55, with what it had learned meanwhile (1 merge late)",
    ]


def test_a_device_without_a_state_has_new_adapters() -> None:
    change = {"kind": "joined", "step": 1000, "devices": [1], "own_step": None, "missed_merges": None}
    assert change_text(change) == "device 1 joined at step 1,000, with new adapters"


def test_only_the_newest_changes_are_shown_and_a_new_start_has_all() -> None:
    many = [{"kind": "left", "step": step, "devices": [0], "why": "late"} for step in range(9)]
    lines = attendance_lines(attendance_of(many))
    assert lines[1] == "  (3 earlier changes in events.jsonl)"
    assert len(lines) == 8
    assert attendance_of([*many, {"kind": "restart", "step": 9}])["away"] == []
    assert attendance_lines(attendance_of([])) == []
