"""Diagnostics as rows: every figure that a run has, none that it lacks."""

from __future__ import annotations

from rich.table import Table

from ltecli.charts.diagnostics import LABELS, diagnostics_table, last_rows, number

POINTS = [{"step": 10, "cosine": 0.25, "drift_mean": 2.0}, {"step": 1200, "cosine": 0.125}]


def cells(table: Table) -> list[list[str]]:
    return [list(row) for row in zip(*(column._cells for column in table.columns), strict=True)]  # type: ignore[arg-type]


def test_a_row_has_both_ends_both_extremes_and_the_way_between() -> None:
    table = diagnostics_table(POINTS)
    assert [column.header for column in table.columns[:3]] == ["diagnostics, 2x", "step 10", "step 1,200"]
    assert cells(table) == [
        [LABELS["cosine"], "0.25", "0.125", "0.125", "0.25", "█▁"],
        [LABELS["drift_mean"], "2", "-", "2", "2", "▁"],
    ]


def test_the_newest_of_several_runs_stand_side_by_side() -> None:
    assert last_rows([POINTS, []]) == [("last cosine between heads", ["0.125", "-"])]
    assert last_rows([[], []]) == []


def test_numbers_have_three_digits() -> None:
    assert [number(value) for value in (None, 0.12345, 12.345, 12345.6)] == ["-", "0.123", "12.3", "12,346"]
