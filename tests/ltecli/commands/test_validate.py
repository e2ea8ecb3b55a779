"""lte validate and lte plan --verify: what they print, and one line for what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ltecli.app import main
from profiles import names, read_text
from simulate.common.processor import machine_facts, machine_text
from simulate.config.profiles import load_profile
from simulate.config.run import Run
from simulate.measure import accuracy
from simulate.measure import step_times as held_out
from tests.ltecli.command import Refused

ONE_LAYER = (
    "plan", "--method", "lte", "--rank", "8", "--set", "train.micro_batch=1", "--set", "model.layers=1", "--verify",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def counted_once() -> Iterator[None]:
    """Count the bytes of equal runs once; tests here differ in how they show them."""
    count, known = accuracy._counted_bytes, dict[str, int]()

    def count_or_remember(run: Run) -> int:
        key = run.model_dump_json()
        if key not in known:
            known[key] = count(run)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "_counted_bytes", count_or_remember)
        yield


def test_a_plan_says_what_of_diagnostics_is_not_followed(capsys: pytest.CaptureFixture[str]) -> None:
    for more, is_said in (([], False), (["--set", "train.diagnostics_every=5"], True)):
        assert main([*ONE_LAYER, *more]) == 0
        assert ("not traced, since they depend on values: figures of a round" in capsys.readouterr().out) is is_said


def test_bytes_are_validated_to_the_byte(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "bytes.md"
    assert main(["validate", "--only", "bytes", "--quick", "--shapes", "4", "--json", "--out", str(out)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bytes"]["errors"]["worst"] == 0.0
    assert len(document["bytes"]["rows"]) == document["bytes"]["errors"]["rows"] >= 3
    assert "| run | by | predicted | measured | difference |" in out.read_text(encoding="utf-8")
    assert document["machine"] == machine_facts()
    assert out.read_text(encoding="utf-8").endswith(f"\nOn {machine_text(machine_facts())}.\n")


def test_times_are_set_beside_a_profile_of_the_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "QUICK_CASES", held_out.QUICK_CASES[:1])
    assert main(["validate", "--only", "time", "--quick", "--profile", "laptop_cpu", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["time"]["rows"]
    assert row["name"].startswith("gpt 3 x 80") and row["predicted"] > 0 and row["measured"] > 0
    assert main(["validate", "--only", "time", "--profile", "laptop_cqu"]) == 2
    assert "laptop_cpu" in capsys.readouterr().err


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--only", "memroy"]) == 2
    assert "did you mean 'memory'?" in capsys.readouterr().err


def test_memory_is_validated_for_the_networks_that_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "validate --only memory --quick --shapes 1 --seed 3 --family vit --json"
    assert main(arguments.split()) == 0
    document = json.loads(capsys.readouterr().out)
    assert {key: document[key] for key in ("shapes", "seed", "family", "autocast")} == {
        "shapes": 1, "seed": 3, "family": "vit", "autocast": "none",
    }  # fmt: skip
    rows = document["memory"]["rows"]
    assert [row["how"] for row in rows] == ["tracked", "allocator"]
    assert all(", vit 2 x " in row["name"] or ", vit 3 x " in row["name"] for row in rows)
    assert all(abs(row["error"]) < 0.03 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--family vitt", "did you mean 'vit'?"),
        ("--autocast bf32", "did you mean 'bf16'?"),
        ("--profile laptop_cpu --only time --seed 3", "leave one or the other away"),
    ],
)
def test_runs_that_cannot_be_asked_for_are_refused(refused: Refused, arguments: str, words: str) -> None:
    refused("validate", *arguments.split(), words=(words,))


def test_the_choice_is_verified(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ONE_LAYER, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    memory, verify = document["chosen"]["memory_bytes"], document["verify"]
    assert verify["tracked_bytes"] == sum(verify["by_part"].values())
    tensors = memory["total"] - memory["reserved"] - memory["allocator"]
    assert tensors == pytest.approx(verify["tracked_bytes"], rel=0.03)
    assert verify["fits"] and verify["held_bytes"] == verify["tracked_bytes"]  # a CPU's memory has no segments
    assert max(document["chosen"]["memory_by_phase"].values()) == memory["total"]


def test_what_does_not_fit_is_not_verified(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", "llama_7b", "--profile", "gtx1080ti_x8", "--method", "ddp", "--verify"]
    assert main(arguments) == 3
    assert "nearest miss" in capsys.readouterr().err


@pytest.mark.slow
def test_a_choice_that_does_not_pass_names_the_largest_batch_that_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Dense Mixers tear more than the closed form says: without headroom a card can lie between plan and replay."""
    pins = ["--model", "mixer_b16", "--method", "ddp"]
    pins += ["--set", "train.activation_checkpointing=false", "--set", "train.micro_batch=16", "--verify"]
    assert main(["plan", "--profile", "gtx1080ti_x8", *pins, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    planned, held = document["chosen"]["memory_bytes"], document["verify"]["held_bytes"]
    between = (planned["total"] + held + planned["reserved"]) // 2
    assert planned["total"] < between < held + planned["reserved"]
    tight, out = tmp_path / "tight.toml", tmp_path / "run.toml"
    memory = f"memory_bytes = {between}\nheadroom_share = 0.0"
    tight.write_text(read_text("gtx1080ti_x8").replace("memory_bytes = 11_811_160_064", memory), encoding="utf-8")
    assert main(["plan", "--profile", str(tight), *pins, "--out", str(out)]) == 3
    assert "the largest batch that passes is 8: --set train.micro_batch=8" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "vit_b16", "mixer_b16", "llama_1b"])
@pytest.mark.parametrize("profile", [name for name in names() if load_profile(name).device[0].is_cuda])
def test_the_default_plan_of_a_shipped_profile_passes(
    capsys: pytest.CaptureFixture[str], profile: str, model: str
) -> None:
    code = main(["plan", "--profile", profile, "--model", model, "--verify"])
    printed = capsys.readouterr()
    assert (code == 0 and printed.out.count("it fits") == 1) or (code == 3 and "nothing fits" in printed.err)


@pytest.mark.parametrize("columns", [80, 120])
def test_a_narrow_terminal_shows_all_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["validate", "--only", "bytes", "--quick", "--shapes", "1", "--quiet"]) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert lines[0].split() == ["bytes", "predicted", "measured", "difference", "by"]
    rows = [line for line in lines if line.endswith("counted")]
    assert rows and all(len(line) <= columns and line.split()[-2] == "+0.00%" for line in rows)
