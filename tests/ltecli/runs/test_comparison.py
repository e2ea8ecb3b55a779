"""Words about several runs: may they be compared, which is first to the same loss, and names that tell them apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ltecli.runs.comparison import common_loss, incomparable, reached_at, run_labels, verdict
from ltecli.runs.evaluations import Evaluation
from ltecli.runs.figures import figures, read_run
from tests.ltecli.charts.runs import copied, with_evaluations
from tests.ltecli.command import Lte


def evaluated(*losses: float, each_s: float = 10.0) -> list[Evaluation]:
    """Return evaluations `each_s` apart with these losses."""
    return [
        Evaluation("a", n, n, 100.0 * n, each_s * n, None, None, loss, None) for n, loss in enumerate(losses, start=1)
    ]


def test_the_time_of_a_loss_lies_between_two_evaluations() -> None:
    rows = evaluated(4.0, 3.0, 2.0)
    assert reached_at(rows, 2.5, lambda row: row.simulated_s) == 25.0
    assert reached_at(rows, 2.5, lambda row: row.sent_bytes) == 250.0
    assert reached_at(rows, 5.0, lambda row: row.simulated_s) == 10.0  # from the first evaluation on
    assert reached_at(rows, 1.0, lambda row: row.simulated_s) is None
    assert reached_at(rows, 2.5, lambda row: row.measured_s) is None


def test_the_common_loss_is_the_worst_of_the_best() -> None:
    assert common_loss([evaluated(3.0, 2.0, 2.5), evaluated(2.2)]) == 2.2
    assert common_loss([evaluated(3.0), []]) is None


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["x/a", "y/a"], ["x/a", "y/a"]),
        (["runs/a", "runs/a"], ["a (1)", "a (2)"]),
        (["a", "runs/a"], ["a", "runs/a"]),
        (["/"], ["/"]),
    ],
)
def test_labels_are_as_long_as_they_must_be(paths: list[str], labels: list[str]) -> None:
    assert run_labels([Path(path) for path in paths]) == labels


def with_run(folder: Path, name: str, change: Callable[[str], str], **start: Any) -> Path:
    """Copy a run folder with another run.toml, and other facts in its start event."""
    target = copied(folder, name, lambda event: {**event, **(start if event["kind"] == "start" else {})})
    (target / "run.toml").write_text(change((target / "run.toml").read_text()))
    return target


@pytest.mark.parametrize(
    ("change", "start", "words"),
    [
        (
            lambda toml: toml.replace('tokenizer = "bytes"', 'tokenizer = "bpe:256"'),
            {},
            "tokenizer (done: bytes; other:",
        ),
        (lambda toml: toml.replace("vocab = 256", "vocab = 300"), {}, "vocabulary (done: 256 tokens; other: 300"),
        (str, {"data_sha256": "f" * 64}, "ffffffffffff"),
    ],
)
def test_what_cannot_be_compared_is_said(
    lte: Lte, trained: Path, change: Callable[[str], str], start: dict[str, Any], words: str
) -> None:
    other = with_run(trained, "other", change, **start)
    text = lte("report", trained, other, "--html", "out.html").stdout
    assert "cannot be compared: they differ in" in text and words in text
    assert "first to a validation loss" not in text
    assert "cannot be compared" in Path("out.html").read_text(encoding="utf-8")


def test_the_same_data_elsewhere_is_comparable(trained: Path) -> None:
    moved = with_run(trained, "moved", str, data="elsewhere/prose.txt")
    assert incomparable([read_run(trained), read_run(moved)]) is None
    # Runs of old versions have no digest, so that the names decide.
    old = with_run(trained, "old", str, data="elsewhere/prose.txt", data_sha256=None)
    assert "elsewhere/prose.txt" in (incomparable([read_run(trained), read_run(old)]) or "")


def test_the_verdict_names_who_is_first(lte: Lte, trained: Path) -> None:
    """Of two runs with equal curves the one with the faster clock, twice."""
    slow = with_evaluations(trained, "slow", 20)
    fast = copied(slow, "fast", lambda event: {k: v / 2 if k == "simulated_s" else v for k, v in event.items()})
    records = [read_run(slow), read_run(fast)]
    said = verdict(records, [figures(record) for record in records])
    assert said.startswith("fast is first to a validation loss of")
    assert "slow takes 2 times as long" in said
    assert said in lte("report", slow, fast).stdout


def test_a_run_without_evaluations_is_left_out_and_named(trained: Path) -> None:
    new = copied(trained, "new", lambda event: event if event["step"] < 2 else None)
    records = [read_run(path) for path in (trained, new, with_evaluations(trained, "more", 9))]
    said = verdict(records, [figures(record) for record in records])
    assert "both runs reached" in said and said.endswith("Not evaluated yet: new.")
    assert "nothing to compare yet" in verdict(records[:2], [figures(record) for record in records[:2]])


def test_losses_that_are_no_numbers_are_left_out(lte: Lte, trained: Path) -> None:
    """A diverged run's evaluations stay in the CSV."""
    bad = copied(trained, "bad", lambda event: {k: float("nan") if k == "val_loss" else v for k, v in event.items()})
    assert "NaN" in json.dumps(read_run(bad).last("evaluate"))
    assert lte("report", bad, trained, "--html", "out.html", "--csv", "out.csv").code == 0
    assert "nan" in Path("out.csv").read_text()


def test_many_runs_have_a_row_each(lte: Lte, trained: Path) -> None:
    runs = [with_evaluations(trained, f"run{number}", 6 + number) for number in range(6)]
    lines = [line.split() for line in lte("report", *runs).stdout.splitlines()]
    header = next(number for number, line in enumerate(lines) if line[:4] == ["run", "steps", "validation", "loss"])
    rows = lines[header + 1 : header + 7]
    assert sorted(row[:2] for row in rows) == sorted([str(path), str(6 + n)] for n, path in enumerate(runs))
    losses = [float(row[2]) for row in rows]
    assert losses == sorted(losses)
