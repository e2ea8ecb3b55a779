"""Everything recorded is as it was; and the check can fail: it names the figure that is other."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.frozen import keys, plans, record, resume, runs
from tests.frozen.command import lte, scratch_folder
from tests.frozen.compare import differences, load


@pytest.mark.slow
@pytest.mark.parametrize("part", record.PARTS)
def test_nothing_that_is_recorded_has_changed(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = record.main(["--check", "--only", part])
    assert code == 0, capsys.readouterr().out


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    """One of the recorded plans, made now."""
    return plans.make_plan(plans.PLANS["diloco"])


def changed(document: Any, *place: str | int, by: Any) -> Any:
    """Return a copy of which the value at one place is other."""
    copied = json.loads(json.dumps(document))
    *outer, last = place
    inner = copied
    for key in outer:
        inner = inner[key]
    inner[last] = by(inner[last])
    return copied


def test_a_plan_is_as_recorded(plan: dict[str, Any]) -> None:
    assert list(plans.plan_differences(load("plans")["diloco"], plan)) == []


def test_a_changed_figure_of_the_choice_is_named(plan: dict[str, Any]) -> None:
    other = changed(plan, "chosen", "memory_bytes", "optimizer", by=lambda size: size + 1)
    (line,) = plans.plan_differences(load("plans")["diloco"], other)
    was = plan["chosen"]["memory_bytes"]["optimizer"]
    assert line == f"chosen.memory_bytes.optimizer: {was} was recorded, now {was + 1}"


@pytest.mark.parametrize("name", ["candidates", "rejected"])
def test_a_changed_figure_of_a_candidate_is_named_with_it(plan: dict[str, Any], name: str) -> None:
    recorded = plans.summary({**plan, "rejected": [{"candidate": c, "reason": "-"} for c in plan["candidates"]]})
    inner: tuple[str, ...] = () if name == "candidates" else ("candidate",)
    entries = {**plan, "rejected": [{"candidate": c, "reason": "other words"} for c in plan["candidates"]]}
    other = changed(entries, name, 3, *inner, "wall_s", by=lambda seconds: seconds * (1 + 1e-15))
    (line,) = plans.plan_differences(recorded, other)
    assert line.startswith(f"{name}: {'.'.join((*inner, 'wall_s'))} differ in 1 of {len(entries[name])}, first in")
    assert f"{name}[3] (method diloco, quantize none, merge_every {plan['candidates'][3]['merge_every']}, " in line


def test_a_candidate_that_is_gone_is_counted(plan: dict[str, Any]) -> None:
    count = len(plan["candidates"])
    (line,) = plans.plan_differences(load("plans")["diloco"], {**plan, "candidates": plan["candidates"][1:]})
    assert line == f"candidates: {count} were recorded, now {count - 1}"


def test_changed_words_and_new_keys_of_a_plan_are_no_difference(plan: dict[str, Any]) -> None:
    other = {**plan, "notes": [note + "!" for note in plan["notes"]], "more": 1}
    other["candidates"] = [{**candidate, "more": 1} for candidate in plan["candidates"]]
    assert list(plans.plan_differences(load("plans")["diloco"], other)) == []


@pytest.mark.parametrize(
    ("place", "by", "tolerance", "words"),
    [
        (("losses", "train_loss", 23), lambda x: x * (1 + 1e-15), 0.0, "losses.train_loss[23]: "),
        (("losses", "device_losses", 5, 2), lambda x: x * (1 + 1e-11), runs.FP64, "losses.device_losses[5][2]: "),
        (("counted", "sent_bytes", 3), lambda x: x + 1, 1.0, "counted.sent_bytes[3]: "),
        (("report", "memory_bytes", "planned"), lambda x: x + 1, 1.0, "report.memory_bytes.planned: "),
        (("clocked", "simulated_s"), lambda x: x[:-1], 1.0, "clocked.simulated_s: 24 entries were recorded, now 23"),
    ],
)  # fmt: skip
def test_a_changed_figure_of_a_run_is_named(place: tuple[Any, ...], by: Any, tolerance: float, words: str) -> None:
    recorded = load("runs")["runs"]["lte"]
    assert list(runs.run_differences(recorded, recorded, 0.0)) == []
    (line,) = runs.run_differences(recorded, changed(recorded, *place, by=by), tolerance)
    assert line.startswith(words)


def test_losses_of_another_processor_may_differ_in_their_last_bits() -> None:
    recorded = load("runs")["runs"]["lte"]
    other = changed(recorded, "losses", "train_loss", 23, by=lambda loss: loss * (1 + 1e-14))
    assert list(runs.run_differences(recorded, other, runs.FP64)) == []


def test_a_resumed_run_with_another_tensor_is_named() -> None:
    recorded = load("resume")["runs"]["powersgd"]
    name = next(iter(recorded["tensors"]))
    other = changed(recorded, "tensors", name, "sha256", by=lambda digest: "0" * 12)
    (line,) = resume.end_differences(recorded, other, 0.0)
    assert line.startswith(f"checkpoint {name}.sha256: ")
    assert list(resume.end_differences(recorded, other, resume.FP64)) == []
    gone = {**recorded, "tensors": {key: value for key, value in recorded["tensors"].items() if key != name}}
    assert name in next(iter(resume.end_differences(recorded, gone, 0.0)))


def test_a_key_that_is_gone_is_named_and_a_new_one_is_not() -> None:
    recorded = load("keys")
    assert "fragments" in next(branch for branch in recorded["schemas"]["run.method"] if "merge_delay" in branch)
    renamed = json.loads(json.dumps(recorded).replace('"merge_delay"', '"late_steps"'))
    (line, *_) = keys.missing(recorded, renamed)
    assert line.startswith("run.method has no merge_delay, which stood beside ")
    more = changed(recorded, "documents", "plan", by=lambda found: [*found, "more"])
    assert list(keys.missing(recorded, more)) == []
    fewer = changed(recorded, "documents", "event step of lte", by=lambda found: found[1:])
    assert list(keys.missing(recorded, fewer)) == ["event step of lte has no device_losses"]


def test_a_whole_number_is_no_float_and_a_missing_figure_is_told() -> None:
    assert list(differences({"a": 1}, {"a": 1.0}, 1.0)) == ["a: 1 was recorded, now 1.0"]
    assert list(differences({"a": {"b": 1}}, {"a": {}})) == ["a.b: 1 was recorded, now 'absent'"]


def test_every_method_is_recorded() -> None:
    with scratch_folder() as folder:
        (folder / "run.toml").write_text('[method]\nname = "none"\n', encoding="utf-8")
        said = lte("train", "run.toml", "--out", "out", expected=(2,)).stderr
    methods = {table["method"]["name"] for table in runs.RUNS.values()}
    assert len(methods) == 14
    assert set(said.partition("known: ")[2].partition(";")[0].strip().split(", ")) == methods, said
