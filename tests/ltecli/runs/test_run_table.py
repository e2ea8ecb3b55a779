"""Tables of many runs: mean and spread by hand, groups, and what a rival needs to the reference's loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from ltecli.runs.figures import RunRecord
from ltecli.runs.method_comparison import compare_groups, comparison_table, to_loss, verdict
from ltecli.runs.run_table import Group, Spread, differences, group_runs, loss_text, run_table, table_notes
from simulate.common.events import Event
from simulate.common.units import bytes_text
from simulate.config.run import Run, build_run


def a_run(**method: Any) -> Run:
    return build_run(
        {
            "model": {"layers": 1, "width": 16, "attention_heads": 2, "context": 8},
            "train": {"steps": 4, "micro_batch": 2, "seed": method.pop("seed", 0)},
            "method": {"name": "lte", "rank": 2, **method} if "name" not in method else method,
            "cluster": {"devices": 2},
        }
    )


def record(name: str, losses: list[float], sent_bytes: float = 100.0) -> RunRecord:
    """Return a run that evaluated after 10 samples, 20 and so on; a device sends `sent_bytes` until each."""
    events: list[Event] = [
        {
            "kind": "evaluate", "step": i, "val_loss": loss, "tokens": 8 * 10 * i, "sent_bytes": 2 * sent_bytes * i,
            "simulated_s": 3.0 * i,
        }
        for i, loss in enumerate(losses, 1)
    ]  # fmt: skip
    return RunRecord(Path(name), a_run(name=name) if name != "lte" else a_run(), {}, tuple(events))


def figure(record: RunRecord, loss: float, steps: int = 4) -> dict[str, Any]:
    return {
        "run": str(record.path), "steps": steps, "planned_steps": 4, "samples": 40, "val_loss": loss,
        "val_accuracy": None, "sent_bytes_per_device": {"counted": 200.0}, "wall_s": {"simulated": 6.0, "measured": 1},
        "memory_bytes": {"planned": 1000, "measured": 2000},
    }  # fmt: skip


def group_of(name: str, curves: list[list[float]], sent_bytes: float = 100.0) -> Group:
    records = tuple(record(name, losses, sent_bytes) for losses in curves)
    return Group({"method.name": name}, records, tuple(figure(r, c[-1]) for r, c in zip(records, curves, strict=True)))


def cells(table: Table) -> list[list[str]]:
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]  # type: ignore[arg-type]


def test_a_spread_is_mean_and_sample_deviation() -> None:
    spread = Spread.of([1.0, None, 2.0, 3.0])
    assert spread == Spread(2.0, 1.0, 3)
    assert spread.text(loss_text) == "2.0000 ± 1.0000"
    assert Spread(2.0, None, 1).text(loss_text) == Spread(2.0, 0.0, 3).text(loss_text) == "2.0000"
    assert Spread(2000.0, 100.0, 3).text(bytes_text) == "2 kB ± 5%"
    assert Spread(2000.0, 5.0, 3).text(bytes_text) == "2 kB"
    assert Spread.of([None]) is None


def test_spreads_overlap_up_to_both_deviations() -> None:
    """The deviation of a difference of two runs: 0.3 and 0.4 make 0.5."""
    assert Spread(1.0, 0.3, 3).overlaps(Spread(1.49, 0.4, 3))
    assert not Spread(1.0, 0.3, 3).overlaps(Spread(1.51, 0.4, 3))
    assert not Spread(1.0, None, 1).overlaps(Spread(1.0, 0.4, 3))


def test_runs_are_told_by_what_differs() -> None:
    runs = [a_run(), a_run(rank=4), a_run(rank=4, seed=1), a_run(name="ddp")]
    assert differences(runs) == [
        {"method.name": "lte", "method.rank": "2", "method.alpha": "128.0"},
        {"method.name": "lte", "method.rank": "4", "method.alpha": "256.0"},
        {"method.name": "lte", "method.rank": "4", "method.alpha": "256.0"},
        {"method.name": "ddp"},
    ]


def test_groups_come_best_first_and_unfinished_runs_stand_alone() -> None:
    records = [record("lte", [5.0]) for _ in range(4)]
    settings = [{"method.rank": "2"}, {"method.rank": "4"}, {"method.rank": "4"}, {"method.rank": "4"}]
    figures = [figure(records[0], 3.0), figure(records[1], 2.0), figure(records[2], 2.2), figure(records[3], 2.5, 2)]
    groups = group_runs(settings, records, figures)
    assert [len(group.records) for group in groups] == [2, 1, 1]
    table, secondary = run_table(groups, named=False)
    assert [column.header for column in table.columns][:4] == ["rank", "seeds", "steps", "validation loss"]
    assert [row[:4] for row in cells(table)] == [
        ["4", "2", "4 of 4", f"2.1000 ± {math.sqrt(0.02):.4f}"],
        ["4", "1", "2 of 4", "2.5000"],
        ["2", "1", "4 of 4", "3.0000"],
    ]
    assert secondary == ["memory planned", "time here"]


def test_many_differences_are_told_below_the_table() -> None:
    settings = [{f"method.k{i}": value for i in range(7)} for value in "ab"]
    records = [record("lte", [5.0]) for _ in settings]
    groups = group_runs(settings, records, [figure(r, 3.0) for r in records])
    assert [column.header for column in run_table(groups, named=False)[0].columns][4:6] == ["k4", "validation loss"]
    assert "different, too: method.k5, method.k6" in table_notes(groups)


def test_losses_of_different_samples_are_told() -> None:
    records = [record("lte", [5.0]) for _ in range(2)]
    settings = [{"train.evaluate_samples": "8"}, {"train.evaluate_samples": "64"}]
    groups = group_runs(settings, records, [figure(records[0], 3.0), figure(records[1], 2.0)])
    assert any(note.startswith("losses are of different train.evaluate_samples") for note in table_notes(groups))
    groups = group_runs([{"method.rank": "2"}, {"method.rank": "4"}], records, [figure(r, 3.0) for r in records])
    assert len(table_notes(groups)) == 1


def test_a_loss_that_is_not_finite_is_left_out_and_told() -> None:
    records = [record("lte", [5.0]) for _ in range(3)]
    (group,) = group_runs(
        [{}] * 3, records, [figure(r, loss) for r, loss in zip(records, (2.0, math.nan, 3.0), strict=True)]
    )
    table, _ = run_table([group])
    assert f"2.5000 ± {math.sqrt(0.5):.4f} (2 of 3)" in cells(table)[0]


def test_a_loss_is_reached_between_two_evaluations() -> None:
    """From 3.0 after 10 samples to 2.0 after 20: 2.25 is three quarters of the way."""
    reached = to_loss(record("ddp", [3.0, 2.0, 1.0]), 2.25)
    assert reached is not None
    assert reached[0] == pytest.approx((17.5, 175.0, 5.25))
    assert not reached[1]
    assert to_loss(record("ddp", [3.0, 2.0]), 3.5) == ((10.0, 100.0, 3.0), True)
    assert to_loss(record("ddp", [3.0, 2.0]), 1.9) is None


def test_methods_are_held_against_the_reference() -> None:
    own = group_of("lte", [[4.0, 3.0, 2.9], [4.0, 3.0, 3.1]])
    fast = group_of("ddp", [[4.0, 2.0, 1.0], [3.5, 2.0, 1.1]], sent_bytes=1000.0)
    slow = group_of("diloco", [[5.0, 4.0, 3.2], [5.0, 4.0, 2.9]])
    comparison = compare_groups([fast, own, slow], "lte")
    assert comparison is not None
    assert comparison.loss == pytest.approx(3.0)
    # (4.0 - 3.0) / 2.0 of the way from 10 to 20 samples, and (3.5 - 3.0) / 1.5 of it.
    samples = [15.0, 10 + 10 / 3]
    reached = comparison.contenders[0].to_loss["samples"]
    assert reached is not None
    assert reached.mean == pytest.approx(sum(samples) / 2)
    third = 20 + 10 * (4.0 - 3.0) / (4.0 - 2.9)
    assert comparison.contenders[2].to_loss["samples"] == Spread(pytest.approx(third), None, 1)
    table, _ = comparison_table(comparison)
    rows = {row[0]: row for row in cells(table)}
    assert [column.header for column in table.columns][1:3] == ["loss, 40 samples", "samples to 3.0000"]
    assert rows["diloco"][2] == "29 (1 of 2)"
    assert rows["lte"][2:5] == ["30", "300 B", "9 s"]
    said = verdict(comparison)
    assert said.startswith("best by validation loss at equal samples: ddp (1.0500 ± 0.0707)")
    assert "; by bytes to lte's loss: lte (300 B)" in said
    assert "; by memory: ddp and lte and diloco (2 kB)" in said
    assert "no spread" not in said


def test_a_method_that_is_not_told_apart_is_named() -> None:
    own = group_of("lte", [[4.0, 3.0], [4.0, 3.2]])
    near = group_of("ddp", [[4.0, 3.1], [4.0, 3.2]])
    comparison = compare_groups([own, near], "lte")
    assert comparison is not None
    assert "equal samples: lte (3.1000 ± 0.1414), with ddp within the seeds' spread" in verdict(comparison)


def test_one_seed_has_no_spread_and_a_loss_never_reached_is_said() -> None:
    comparison = compare_groups([group_of("lte", [[4.0, 3.0]]), group_of("ddp", [[4.0, 3.5]])], "lte")
    assert comparison is not None
    assert verdict(comparison).endswith("; of one seed no spread is known, --seeds 3 shows it")
    rows = {row[0]: row for row in cells(comparison_table(comparison)[0])}
    assert rows["ddp"][2:5] == ["not reached", "-", "-"]
    assert "; no other method reached lte's loss with all its seeds; " in verdict(comparison)
    assert "samples to" not in verdict(comparison)
    assert compare_groups([group_of("ddp", [[4.0]])], "lte") is None
