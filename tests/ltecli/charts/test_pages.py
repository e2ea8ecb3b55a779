"""Pages of runs and plans: their figures, size and safety, without a browser; and the CSV beside them."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest

from ltecli.charts.page import POLICY
from ltecli.charts.report_page import report_page
from ltecli.charts.scales import byte_scale, log_ticks, second_scale
from ltecli.charts.thinning import thinned
from tests.ltecli.charts.runs import ATTACKS, Elements, copied, figures_of, with_evaluations
from tests.ltecli.command import Lte, Refused, events_of

MOST_BYTES = 2_000_000
PLAN = ("plan", "--tokens", "400_000", "--profile", "rtx3060_x4_home")


def test_thinning_keeps_ends_and_extremes() -> None:
    assert thinned([3.0, 1.0, 2.0], 4) == [0, 1, 2]
    values = [5.0, 4, 9, 4, 4, 4, 0, 4, 4, 3]
    assert thinned(values, 6) == [0, 1, 2, 5, 6, 9]  # lowest and highest of the first and the second half, and the ends
    assert len(thinned([float(n % 7) for n in range(10_000)], 400)) <= 400


def test_axes_have_the_unit_of_the_largest_value() -> None:
    assert second_scale([3.0, None, 300.0]) == (60.0, "min")
    assert byte_scale([]) == (1.0, "B")
    assert byte_scale([2.5e12]) == (1e12, "TB")


def test_ticks_are_round_in_their_units() -> None:
    assert [text for _, text in log_ticks("bytes", 5e5, 2e9)] == ["1 MB", "10 MB", "100 MB", "1 GB"]
    assert log_ticks("seconds", 50, 4000) == [
        (60.0, "1 min"), (180.0, "3 min"), (600.0, "10 min"), (1800.0, "30 min"), (3600.0, "1 h"),
    ]  # fmt: skip


def test_a_page_of_several_runs_has_their_evaluations(lte: Lte, trained: Path) -> None:
    other = with_evaluations(trained, "other", 30)
    assert lte("report", trained, other, "--html", "out.html").code == 0
    figure = figures_of(Path("out.html"))["val-loss"]
    own, others = figure["traces"]
    evaluated = events_of(trained, "evaluate")
    assert own["name"] == "done" and others["name"] == "other"
    assert own["columns"]["val_loss"] == pytest.approx([event["val_loss"] for event in evaluated], rel=1e-5)
    assert own["columns"]["samples"] == [event["tokens"] // 8 for event in evaluated]
    assert len(others["columns"]["val_loss"]) == 30
    assert [view["label"] for view in figure["views"]] == ["samples", "bytes sent", "simulated time", "measured time"]


def test_a_page_sends_for_nothing_and_says_what_made_it(lte: Lte, trained: Path) -> None:
    assert lte("report", trained, "--html", "out.html").code == 0
    text = Path("out.html").read_text(encoding="utf-8")
    page = Elements(text)
    assert not [attributes for _, attributes in page.tags if "src" in attributes]
    assert [attributes["href"] for tag, attributes in page.tags if tag == "link"] == ["data:,"]
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}) in page.tags
    assert f"lte report {trained} --html out.html" in page.texts["code"]
    assert len(text.encode()) < MOST_BYTES


@pytest.mark.parametrize("number", range(len(ATTACKS)))
def test_a_name_is_text_wherever_it_stands(lte: Lte, trained: Path, number: int) -> None:
    attack = copied(trained, f"runs/{ATTACKS[number]}")
    harmless = copied(trained, "runs/harmless")
    assert lte("report", attack, harmless, "--html", "out.html").code == 0
    assert lte("report", harmless, "--html", "plain.html").code == 0
    page, plain = (Elements(Path(name).read_text(encoding="utf-8")) for name in ("out.html", "plain.html"))
    assert {tag for tag, _ in page.tags} - {tag for tag, _ in plain.tags} <= {"nav", "button", "i"}
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert any(str(attack) in text for text in page.texts["td"])
    # Plotly reads tags in names.
    assert all("<" not in trace["name"] for trace in figures_of(Path("out.html"))["val-loss"]["traces"])


@pytest.mark.parametrize(("steps", "words"), [(0, "not taken a step"), (3, "at step 3 of 8"), (6, "at step 6 of 8")])
def test_a_run_in_progress_has_a_page(lte: Lte, trained: Path, steps: int, words: str) -> None:
    copied(trained, "part", lambda event: event if event["step"] <= steps else None)
    assert lte("report", "part", "--html", "out.html").code == 0
    assert any(words in text for text in Elements(Path("out.html").read_text(encoding="utf-8")).texts["p"])
    assert lte("report", "part", trained, "--html", "both.html").code == 0


def test_an_interrupted_run_says_so(lte: Lte, trained: Path) -> None:
    copied(trained, "part", lambda event: event if event["step"] <= 4 else None)
    with Path("part/events.jsonl").open("a") as file:
        file.write(json.dumps({"version": 1, "kind": "interrupt", "step": 4}) + "\n")
    assert lte("report", "part", "--html", "out.html").code == 0
    assert "part was interrupted at step 4 of 8" in Path("out.html").read_text(encoding="utf-8")


def test_a_diagnosed_run_shows_its_diagnostics(lte: Lte, run_toml: Path) -> None:
    assert lte("train", run_toml, "--out", "a", "--diagnostics", "--quiet").code == 0
    assert lte("report", "a", "--html", "out.html").code == 0
    figure = figures_of(Path("out.html"))["diagnostics"]
    keys = [view["y"] for view in figure["views"]]
    found = events_of(Path("a"), "diagnostics")
    assert {"cosine", "drift_mean"} <= set(keys)
    for key in keys:
        assert figure["traces"][0]["columns"][key] == pytest.approx([event[key] for event in found], rel=1e-5)


def test_time_is_divided_as_the_clock_charged_it(lte: Lte, trained: Path) -> None:
    assert lte("report", trained, "--html", "out.html").code == 0
    last = events_of(trained, "step")[-1]
    total = lte("report", trained, "--json").json()["wall_s"]["simulated"]
    figure = figures_of(Path("out.html"))["time"]
    row = figure["rows"].index("simulated")
    shares = {t["name"]: dict(zip(t["columns"]["row"], t["columns"]["share"], strict=True)) for t in figure["traces"]}
    assert last["simulated_pause_s"] > 0 and last["simulated_exchange_s"] > 0
    assert shares["exchange"][row] == pytest.approx(100 * last["simulated_exchange_s"] / total, rel=1e-4)
    assert shares["compute"][row] + shares["exchange"][row] + shares["pauses"][row] == pytest.approx(100, rel=1e-4)
    # A run that goes as planned: the planned bar has the same parts.
    assert shares["pauses"][figure["rows"].index("planned")] == pytest.approx(shares["pauses"][row], rel=1e-4)


def test_a_run_of_an_earlier_version_is_divided_as_far_as_it_can_be(lte: Lte, trained: Path) -> None:
    gone = ("simulated_pause_s",)
    copied(trained, "old", lambda event: {key: value for key, value in event.items() if key not in gone})
    assert lte("report", "old", "--html", "out.html").code == 0
    names = [trace["name"] for trace in figures_of(Path("out.html"))["time"]["traces"]]
    assert "compute and pauses" in names


def test_many_long_runs_stay_small(trained: Path) -> None:
    folders = [with_evaluations(trained, f"long{number}", 3000 if number < 2 else 600) for number in range(24)]
    report_page(folders, Path("out.html"), title="A sweep", command="lte sweep run.toml")
    assert Path("out.html").stat().st_size < MOST_BYTES
    page = Elements(Path("out.html").read_text(encoding="utf-8"))
    assert page.texts["h1"] == ["A sweep"] and "lte sweep run.toml" in page.texts["code"]
    ends = [trace["columns"]["step"][-1] for trace in figures_of(Path("out.html"))["val-loss"]["traces"]]
    assert ends == [3000] * 2 + [600] * 22


def test_settings_that_differ_are_listed(lte: Lte, trained: Path, run_toml: Path) -> None:
    assert lte("train", run_toml, "--out", "other", "--set", "method.rank=4", "--quiet").code == 0
    assert lte("report", trained, "other", "--html", "out.html").code == 0
    page = Elements(Path("out.html").read_text(encoding="utf-8"))
    assert "method.rank" in page.texts["span"] and "method.merge_every" not in page.texts["span"]


def test_evaluations_are_tidy_rows(lte: Lte, trained: Path) -> None:
    other = with_evaluations(trained, "other", 5)
    assert lte("report", trained, other, "--csv", "out.csv").code == 0
    rows = list(csv.DictReader(io.StringIO(Path("out.csv").read_text())))
    assert list(rows[0]) == [
        "run", "step", "samples", "sent_bytes", "simulated_s", "measured_s", "train_loss", "val_loss", "val_accuracy",
    ]  # fmt: skip
    assert [row["run"] for row in rows] == [str(trained)] * 2 + ["other"] * 5
    evaluated, steps = events_of(trained, "evaluate")[-1], events_of(trained, "step")
    last = rows[1]
    assert float(last["sent_bytes"]) == evaluated["sent_bytes"] / 2  # of one of two devices
    assert float(last["val_loss"]) == evaluated["val_loss"] and float(last["train_loss"]) == steps[-1]["train_loss"]
    assert float(last["measured_s"]) == evaluated["wall_s"] and last["val_accuracy"] == ""
    assert lte("report", trained, other, "--csv", "-").stdout == Path("out.csv").read_text()


@pytest.mark.usefixtures("two_batches")
def test_a_plan_has_one_row_a_candidate(lte: Lte, here: Path) -> None:
    assert lte(*PLAN, "--csv", "out.csv", "--html", "out.html").code == 0
    rows = list(csv.DictReader(io.StringIO(Path("out.csv").read_text())))
    document = lte(*PLAN, "--json").json()
    assert len(rows) == sum(len(document[key]) for key in ("candidates", "rivals", "rejected"))
    (chosen,) = (row for row in rows if row["chosen"] == "True")
    assert float(chosen["memory_bytes_total"]) == document["chosen"]["memory_bytes"]["total"]
    assert [row["place"] for row in rows if row["place"]] == [str(n + 1) for n in range(len(document["candidates"]))]
    figure = figures_of(here / "out.html")["candidates"]
    drawn = [trace for trace in figure["traces"] if trace["kind"] in ("dots", "diamonds")]
    assert sum(len(trace["columns"]["time"]) for trace in drawn) == sum(row["fits"] == "True" for row in rows)
    assert (here / "out.html").stat().st_size < MOST_BYTES


def test_a_plan_page_says_when_nothing_fits(lte: Lte, here: Path) -> None:
    pins = ("--method", "lte", "--rank", "8")
    assert lte("plan", "--model", "llama_7b", "--profile", "raspberry_x8", *pins, "--html", "new/out.html").code == 3
    page = Elements((here / "new/out.html").read_text(encoding="utf-8"))
    assert any(text.startswith("It does not fit: nearest is") for text in page.texts["p"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--html", "old.html"), ("--html old.html exists", "--force")),
        (("--csv", "old.html"), ("--csv old.html exists", "--force")),
        (("--html", "out.png"), ("the page is HTML", "out.html")),
        (("--html", "old.html/out.html"), ("old.html is no folder",)),
        (("--html", "new.html", "--csv", "new.html"), ("new.html is the file of --", "too")),
        (("--csv", "-", "--json"), ("both write to stdout",)),
    ],
)
@pytest.mark.parametrize("command", ["report", "plan"])
def test_what_cannot_be_written_is_refused(
    refused: Refused, trained: Path, command: str, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    Path("old.html").write_text("mine")
    refused(*(("report", trained) if command == "report" else PLAN), *options, words=words)


def test_force_replaces_a_page_whole(lte: Lte, trained: Path) -> None:
    Path("old.html").write_text("mine")
    assert lte("report", trained, "--html", "old.html", "--force").code == 0
    assert Path("old.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(os.listdir()) == ["done", "old.html", "prose.txt", "tiny.toml"]  # noqa: PTH208
