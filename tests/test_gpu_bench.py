"""`make gpu` without a GPU: what it keeps, takes up again, leaves out and gives up on; the programs in a small size."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu import rows as rows_of_gpu
from bench.gpu.results import Results, Stamp, markdown
from bench.gpu.rows import PARTS, ROWS, Row
from tests.fakegpu.device import NEEDS, can_register
from tests.harness import ROOT, Child, environment

STAMP = Stamp("code", "0123abc", "machine", "cpu", "tiny")
WORKER = """
import json, os, sys, time
what, device, size, folder, part, *names = sys.argv[1:]
def report(**message): print("@@ " + json.dumps(message), flush=True)
for name in names:
    report(begin=name)
    with open(folder + "/begun", "a") as file: file.write(name + " ")
    if name == "fails": report(failed=name, error="ValueError: no"); break
    if name == "crashes": print("last words", file=sys.stderr, flush=True); os.abort()
    if name == "hangs": time.sleep(60)
    if name.startswith("slow"): time.sleep(0.6)
    report(done=name, figures={"ours_s": 0.25, "within": True}, seconds=0.1)
"""
"""Speaks as bench/gpu/worker.py does, without torch, whose import takes seconds."""


def row(name: str, group: str = "one", **fields: Any) -> Row:
    """Return a row of part c."""
    return replace(Row("c", name, "none", {}, (), group), **fields)


@pytest.fixture
def parts_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes Parts, with a worker that does what a row's name says."""
    monkeypatch.setattr(gpu, "PROGRAM", ["-c", WORKER])

    def make(rows: list[Row], limit_s: float = 30.0, stamp: Stamp = STAMP) -> gpu.Parts:
        monkeypatch.setitem(ROWS, "c", lambda size: iter(rows))
        return gpu.Parts(Results(tmp_path / "gpu.json", stamp, {"torch": "2"}), limit_s)

    return make


def begun(parts: gpu.Parts) -> list[str]:
    """Return the rows that were begun, in order, in all calls."""
    path = parts.folder / "begun"
    return path.read_text().split() if path.exists() else []


def status(parts: gpu.Parts) -> dict[str, str]:
    """Return how each row stands, or its failure."""
    return {found["row"]: found.get("error", found["status"]) for found in parts.results.content["rows"]}


def test_rows_that_fail_crash_or_hang_are_kept_and_the_others_run(parts_of: Any) -> None:
    names = ("first", "fails", "second", "crashes", "hangs", "third")
    parts = parts_of([row(name, limit_s=3.0) for name in names])
    parts.run("c")
    assert status(parts) == {
        "first": "done", "fails": "ValueError: no", "second": "done", "crashes": "killed by SIGABRT: last words",
        "hangs": "took more than 3 s", "third": "done",
    }  # fmt: skip
    assert begun(parts) == list(names)
    assert parts.report(["c"]) == 1


def test_a_call_takes_up_what_is_open_and_tries_failures_last(parts_of: Any) -> None:
    first = parts_of([row("first"), row("fails")])
    first.run("c")
    again = parts_of([row("first"), row("fails"), row("second", group="two")])
    again.run("c")
    assert begun(again) == ["first", "fails", "second", "fails"]
    # Other code measures all of it again, and the file keeps both.
    other = parts_of([row("first")], stamp=replace(STAMP, code="other"))
    other.run("c")
    assert begun(other) == ["first"]
    assert [found["code"] for found in other.results.content["rows"] if found["row"] == "first"] == ["code", "other"]


def test_a_part_stops_at_its_limit_and_goes_on_from_there(parts_of: Any) -> None:
    rows = [row(f"slow {number}".replace(" ", "-"), group=str(number)) for number in range(6)]
    parts = parts_of(rows, limit_s=2.2)
    parts.run("c")
    done = list(status(parts))
    assert 0 < len(done) < 6 and set(status(parts).values()) == {"done"}
    assert parts.report(["c"]) == 1
    for _ in range(6 - len(done)):  # each call does one at least
        parts = parts_of(rows, limit_s=2.2)
        parts.run("c")
    assert list(status(parts)) == [given.name for given in rows]
    assert parts.report(["c"]) == 0


def test_a_row_longer_than_its_part_has_failed(parts_of: Any) -> None:
    parts = parts_of([row("hangs", limit_s=60.0)], limit_s=1.0)
    parts.run("c")
    assert status(parts) == {"hangs": "took more than 0.9 s"}


def test_what_is_missing_is_left_out_by_name(parts_of: Any) -> None:
    rows = [row("packed", needs=("numpy", "no_such_package")), row("there"), row("fast", gpu_only=True)]
    parts = parts_of(rows)
    parts.run("c")
    assert begun(parts) == ["there"]
    text = markdown(parts.results, parts.rows, parts.left_out)
    assert "- packed: needs no_such_package" in text
    assert "- fast: needs a GPU" in text
    assert "| there | 250 ms | yes | 100 ms |" in text
    assert parts.report(["c"]) == 0  # what cannot run here leaves nothing open


def test_names_to_install_are_told() -> None:
    wanted = row("x", needs=("PIL", "tomli_w"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "find_spec", lambda name: None)
        assert gpu.missing(wanted, "cuda") == "needs pillow, tomli-w"


def test_a_machine_without_the_device_is_told_the_next_move(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(gpu, "PROGRAM", ["-c", 'print(\'@@ {"error": "sees no cuda device"}\')'])
        gpu.facts_of("cuda")
    assert ended.value.code == 2
    assert "sees no cuda device; try: make gpu DEVICE=cpu SIZE=tiny" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_rows_have_names_of_their_own_and_fit_a_part(size: str) -> None:
    assert set(ROWS) == set(PARTS)
    for part, rows_of in ROWS.items():
        rows = list(rows_of(size))
        assert len({given.name for given in rows}) == len(rows)
        assert {given.part for given in rows} == {part}
        assert max(given.limit_s for given in rows) <= gpu.ROW_SHARE * gpu.PART_LIMIT_S


def test_part_a_has_every_method() -> None:
    from simulate.config.method_table import METHOD_NAMES

    assert {method["name"] for method in rows_of_gpu.METHODS.values()} == set(METHOD_NAMES)


def test_losses_are_held_to_the_reference(tmp_path: Path) -> None:
    from bench.gpu import losses

    given = next(rows_of_gpu.losses("tiny")).arguments
    assert losses.measure(given, torch.device("cpu"), tmp_path)["worst_error"] == 0.0
    [kept] = tmp_path.iterdir()
    kept.write_text(json.dumps([loss * 1.002 for loss in json.loads(kept.read_text())]))
    found = losses.measure(given, torch.device("cpu"), tmp_path)
    assert not found["within"] and found["worst_error"] == pytest.approx(0.002, rel=0.01)


BLOCKED = """
import sys
needed, *modules = sys.argv[1:]
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"pydantic", "tomli_w", "tomli", "PIL", "psutil", "rich", "typer", "safetensors",
                "tensorboard", "bitsandbytes", "numpy"} - set(needed.split()):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import importlib
for module in modules: importlib.import_module("bench.gpu." + module)
"""


def needs_by_module() -> dict[str, set[str]]:
    """Return the packages that every row of a module has."""
    needs: dict[str, set[str]] = {}
    for given in (given for rows_of in ROWS.values() for given in rows_of("full")):
        needs[given.module] = needs.get(given.module, set(given.needs)) & set(given.needs)
    return needs


@pytest.mark.parametrize(
    "modules",
    [
        ["memory"],
        *(pytest.param([name], marks=pytest.mark.slow) for name in sorted(needs_by_module()) if name != "memory"),
    ],
)
def test_a_row_needs_no_more_than_it_says(modules: list[str]) -> None:
    needed = " ".join(set.intersection(*(needs_by_module()[name] for name in modules)))
    words = [sys.executable, "-W", "ignore", "-c", BLOCKED, needed, "worker", *modules]
    ended = Child(words, cwd=ROOT, stdout=-1, stderr=-1).outcome()
    assert ended.code == 0, ended.stderr


@pytest.mark.slow
@pytest.mark.skipif(not can_register(), reason=NEEDS)
def test_rows_stay_on_an_accelerator() -> None:
    ended = Child([sys.executable, "-m", "tests.fakegpu.gpu_rows"], cwd=ROOT, stdout=-1, stderr=-1).outcome()
    assert ended.code == 0, ended.stdout + ended.stderr
    assert ended.stdout.split() == ["a", "b", "b", "c", "c", "f"]


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    results = tmp_path / "gpu.json"
    words = [
        sys.executable,
        "-m",
        "bench.gpu",
        "--device",
        "cpu",
        "--size",
        "tiny",
        "--results",
        results,
        "--limit-s",
        1400,
    ]
    ended = Child(words, environment(), cwd=ROOT, stdout=-1, stderr=-1).outcome(1500.0)
    assert ended.code == 0, ended.stdout + ended.stderr
    rows = json.loads(results.read_text())["rows"]
    assert {found["part"] for found in rows} == set(PARTS)
    assert all(found["status"] == "done" for found in rows)
    # What is compared on a CPU is within its bound there, too.
    assert all(found["figures"].get("within", True) for found in rows)
