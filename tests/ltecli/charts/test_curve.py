"""The loss curve in characters."""

from __future__ import annotations

from ltecli.charts.curve import draw_curve, draw_line, draw_overlay


def test_no_points_draw_nothing() -> None:
    assert draw_curve([]) == []


def test_two_levels_fill_and_leave_a_column() -> None:
    assert draw_curve([(1, 3.0), (2, 1.0)], height=1) == ["   3.000 │█▁", "    step └1 2"]


def test_a_flat_curve_is_drawn() -> None:
    lines = draw_curve([(step, 2.0) for step in range(5)])
    assert lines[0].startswith("   2.000 │")


def test_many_steps_share_columns_by_their_mean() -> None:
    lines = draw_curve([(1, 0.0), (2, 2.0), (3, 4.0), (4, 6.0)], width=2, height=1)
    assert lines[0] == "   5.000 │▁█"


def test_a_line_goes_from_the_lowest_to_the_highest() -> None:
    assert draw_line([3.0, 1.0, 2.0]) == "█▁▅"
    assert draw_line([5.0, 5.0]) == "▁▁"
    assert len(draw_line([float(n) for n in range(100)])) == 16


def test_several_curves_share_their_axes() -> None:
    curves = [[(0.0, 2.0), (4.0, 0.0)], [(2.0, 2.0)], []]
    assert [line.plain for line in draw_overlay(curves, "samples", width=5, height=3)] == [
        "   2.000 │a·b",
        "         │  ·",
        "   0.000 │   ·a",
        " samples └0   4",
    ]


def test_an_overlay_of_nothing_is_empty_and_of_one_point_is_drawn() -> None:
    assert draw_overlay([[], []], "step") == []
    assert draw_overlay([[(3.0, 1.0)]], "step")[0].plain == "   1.000 │a"
