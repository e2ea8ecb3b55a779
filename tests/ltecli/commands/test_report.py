"""`lte report`: the JSON contract, planned against counted and measured, several runs, damaged folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from simulate.common.processor import machine_facts
from tests.harness import run
from tests.ltecli.command import Lte, Refused, write_run

KEYS = {
    "version", "run", "method", "devices", "steps", "samples", "memory_bytes", "sent_bytes_per_device", "wall_s",
    "step_s", "train_loss", "val_loss",
}  # fmt: skip


def test_the_json_keeps_its_contract(lte: Lte, trained: Path) -> None:
    document = lte("report", trained, "--json").json()
    assert document.keys() >= KEYS
    assert document["memory_bytes"].keys() >= {"planned", "measured"}
    assert document["sent_bytes_per_device"].keys() >= {"planned", "counted", "wire"}
    assert document["wall_s"].keys() >= {"planned", "simulated", "measured"}
    assert document["step_s"].keys() >= {"planned", "simulated", "measured"}
    assert (document["method"], document["devices"], document["steps"], document["samples"]) == ("lte", 2, 8, 32)
    assert document["sent_bytes_per_device"]["wire"] is None


def test_each_figure_comes_from_where_its_label_says(lte: Lte, trained: Path) -> None:
    """All of them differ, which those of a run that goes as planned do not."""
    marks = {"measured_bytes": 1, "sent_bytes": 2 * 2, "simulated_s": 3.0, "wall_s": 4.0}
    events = [json.loads(line) for line in (trained / "events.jsonl").read_text().splitlines()]
    changed = [{**event, **{key: marks[key] for key in marks if key in event}} for event in events]
    (trained / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in changed))
    chosen = json.loads((trained / "plan.json").read_text())["chosen"]
    beside_tensors = ("reserved", "allocator")
    planned_bytes = chosen["memory_bytes"]["total"] - sum(chosen["memory_bytes"][part] for part in beside_tensors)
    document = lte("report", trained, "--json").json()
    memory, sent = document["memory_bytes"], document["sent_bytes_per_device"]
    assert (memory["planned"], memory["measured"]) == (planned_bytes, 1)
    assert (sent["planned"], sent["counted"]) == (pytest.approx(chosen["sent_bytes"]), 2)
    assert document["wall_s"] == {"planned": chosen["wall_s"], "simulated": 3, "measured": 4}
    assert document["step_s"] == {"planned": chosen["wall_s"] / 8, "simulated": 3 / 8, "measured": 4 / 8}


@pytest.mark.parametrize(
    "method",
    [
        {"rank": 2, "merge_every": 3},
        {"rank": 2, "merge_every": 3, "merge_transport": "reduce", "reset": "b"},
        {"rank": 4, "merge_every": 5, "merge_transport": "server", "heads_per_device": 2},
        {"name": "ddp"},
    ],
)
def test_planned_figures_are_met(lte: Lte, here: Path, method: dict[str, object]) -> None:
    run = write_run(
        here / "run.toml",
        method={"name": "lte", **method},
        cluster={"devices": 3, "profile": "jetson_orin_nano_x8_wifi"},
    )
    assert lte("train", run, "--out", "a", "--quiet").code == 0
    document = lte("report", "a", "--json").json()
    sent, wall, memory = (document[key] for key in ("sent_bytes_per_device", "wall_s", "memory_bytes"))
    assert sent["planned"] == pytest.approx(sent["counted"], rel=1e-12)
    assert sent["counted"] > 0
    assert wall["simulated"] == pytest.approx(wall["planned"], rel=1e-9)
    assert memory["measured"] == pytest.approx(memory["planned"], rel=0.03)


def test_plan_and_report_say_which_layers_pick_columns(lte: Lte, here: Path) -> None:
    """Three heads of rank 6 cover the 16 inputs of every layer but the MLP's second, which has 64."""
    method = {"name": "lte", "rank": 6, "draws": "columns"}
    run = write_run(here / "run.toml", method=method, cluster={"devices": 3, "profile": "jetson_orin_nano_x8_wifi"})
    trained = lte("train", run, "--out", "a")
    told = lte("report", "a").stdout
    note = "method.draws = columns: A picks columns in "
    assert (
        note in trained.stderr
        and note in told
        and "; A is drawn jointly in blocks.*.mlp.down, whose inputs are more than 3 heads" in told
    )
    document = lte("report", "a", "--json").json()
    assert document["draws_by_layer"]["joint"] == ["blocks.*.mlp.down"]
    assert "blocks.*.mlp.up" in document["draws_by_layer"]["columns"]
    memory, sent = document["memory_bytes"], document["sent_bytes_per_device"]
    assert memory["measured"] == pytest.approx(memory["planned"], rel=0.03)
    assert sent["planned"] == pytest.approx(sent["counted"], rel=1e-12)


def test_a_run_without_columns_says_nothing_of_them(lte: Lte, trained: Path) -> None:
    assert lte("report", trained, "--json").json()["draws_by_layer"] is None
    assert "draws" not in lte("report", trained).stdout


def test_a_single_device_sends_nothing(lte: Lte, here: Path) -> None:
    run = write_run(here / "run.toml", cluster={"devices": 1})
    lte("train", run, "--out", "a", "--quiet")
    assert lte("report", "a", "--json").json()["sent_bytes_per_device"] == {"planned": 0, "counted": 0, "wire": None}
    assert lte("report", "a").code == 0


def test_a_person_sees_every_label_and_the_curve(lte: Lte, trained: Path) -> None:
    outcome = lte("report", trained)
    for words in (
        "planned",
        "simulated",
        "counted",
        "measured",
        "dense",
        "8 steps (finished)",
        "training loss",
        "▁",
    ):
        assert words in outcome.stdout
    assert outcome.stderr == ""


def test_several_runs_stand_side_by_side(lte: Lte, trained: Path, run_toml: Path) -> None:
    assert lte("train", run_toml, "--out", "other", "--set", "method.rank=4", "--quiet").code == 0
    document = lte("report", trained, "other", "--json").json()
    assert [run["run"] for run in document["runs"]] == [str(trained), "other"]
    settings = {group["runs"][0]: group["settings"]["method.rank"] for group in document["groups"]}
    assert settings == {str(trained): "2", "other": "4"}
    text = lte("report", trained, "other").stdout
    assert "lte rank 2 x 2 heads" in text
    assert "lte rank 4 x 2 heads" in text


def test_runs_that_differ_in_the_seed_alone_are_one_row(lte: Lte, trained: Path, run_toml: Path) -> None:
    assert lte("train", run_toml, "--out", "other", "--set", "train.seed=1", "--quiet").code == 0
    text = lte("report", "done", "other").stdout
    assert "all 2 runs: lte rank 2 x 2 heads" in text
    assert "done, other" in text
    assert "standard deviation over runs" in text
    (group,) = lte("report", trained, "other", "--json").json()["groups"]
    assert (group["settings"], group["val_loss"]["count"]) == ({}, 2)


def test_a_run_that_was_stopped_is_reported_so_far(lte: Lte, trained: Path) -> None:
    lines = (trained / "events.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 4]
    (trained / "events.jsonl").write_text("".join(kept) + '{"version": 1, "ki')
    assert "4 steps (stopped or running, of 8)" in lte("report", trained).stdout
    document = lte("report", trained, "--json").json()
    assert (document["steps"], document["val_loss"]) == (4, None)
    assert document["sent_bytes_per_device"]["planned"] == document["sent_bytes_per_device"]["counted"]


def test_a_run_without_a_step_is_reported(lte: Lte, trained: Path) -> None:
    lines = (trained / "events.jsonl").read_text().splitlines(keepends=True)
    (trained / "events.jsonl").write_text("".join(lines[:2]))
    document = lte("report", trained, "--json").json()
    assert (document["steps"], document["train_loss"], document["wall_s"]["measured"]) == (0, None, None)
    assert lte("report", trained).code == 0


def test_a_run_with_brackets_in_its_name_is_reported(lte: Lte, run_toml: Path) -> None:
    lte("train", run_toml, "--out", "[b]x[/]", "--quiet")
    assert "[b]x[/]" in lte("report", "[b]x[/]", "[b]x[/]").stdout


def test_a_damaged_line_is_located(refused: Refused, trained: Path) -> None:
    lines = (trained / "events.jsonl").read_text().splitlines(keepends=True)
    lines[4] = lines[4][:10] + "\n"
    (trained / "events.jsonl").write_text("".join(lines))
    refused("report", "done", words=("done/events.jsonl:5: not a JSON event", "restore"))


def test_an_event_of_another_version_is_refused(refused: Refused, trained: Path) -> None:
    text = (trained / "events.jsonl").read_text()
    (trained / "events.jsonl").write_text(text.replace('"version": 1', '"version": 2'))
    refused("report", "done", words=("done/events.jsonl:1", "version 1", "use the lte that wrote it"))


@pytest.mark.parametrize(
    ("file", "words"),
    [("run.toml", ("is no run folder",)), ("plan.json", ("no such file",)), ("events.jsonl", ("never took a step",))],
)
def test_a_folder_with_a_file_missing_is_refused(
    refused: Refused, trained: Path, file: str, words: tuple[str, ...]
) -> None:
    (trained / file).unlink()
    refused("report", "done", words=("done", *words))


def test_what_is_no_run_is_refused(refused: Refused, run_toml: Path) -> None:
    refused("report", "nowhere", words=("nowhere is no run folder", "lte train"))
    refused("report", run_toml, words=("is no run folder",))


def test_a_reader_that_leaves_early_is_no_failure(trained: Path) -> None:
    script = f"{sys.executable} -m ltecli report . --json | true; exit ${{PIPESTATUS[0]}}"
    done = run(["bash", "-c", script], cwd=trained)
    assert (done.code, done.stderr) == (0, "")


def test_start_weights_in_host_memory_are_no_part_of_the_devices(lte: Lte, here: Path) -> None:
    run = write_run(here / "run.toml", train={"steps": 3}, cluster={"profile": "gtx1080ti_x8", "devices": 2})
    assert lte("train", run, "--out", "a", "--quiet").code == 0
    memory = json.loads(lte("report", "a", "--json").stdout)["memory_bytes"]
    assert memory["measured"] == pytest.approx(memory["planned"], rel=0.03)


def test_a_report_says_where_the_run_was_trained(lte: Lte, trained: Path) -> None:
    """Each machine once, whatever machine reports; runs of older versions do not know."""
    document = lte("report", trained, "--json").json()
    assert document["machines"] == [machine_facts()]
    events = trained / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    elsewhere = {**machine_facts(), "processor": "Another Processor"}
    lines[0]["machines"] = [elsewhere]
    events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "trained on: Another Processor (" in lte("report", trained).stdout
    assert "Another Processor" in lte("report", trained, trained).stdout
    del lines[0]["machines"]
    events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert lte("report", trained, "--json").json()["machines"] == []
    assert "trained on:" not in lte("report", trained).stdout
