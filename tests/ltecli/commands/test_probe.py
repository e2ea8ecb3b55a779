"""`lte probe`, and what `lte plan --probe` makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ltecli.commands.probe import needed_bytes
from simulate.common.errors import InputError
from simulate.config.run import load_given_run, load_run
from simulate.models.families.gpt import gpt_shape
from simulate.probe.schema import dump_probe, load_probe, shapes_fingerprint
from tests.ltecli.command import PROFILE, TINY, Lte, Refused
from tests.simulate.probe.figures import DROWNED, probe_of

SIZES = tuple(
    word for key, size in TINY["model"].items() for word in ("--set", f"model.{key}={size}")
)  # fmt: skip
PLAN = ("plan", "--profile", PROFILE, "--tokens", "100000", "--set", "train.activation_checkpointing=false")
WIDE = ("--set", "model.layers=1", "--set", "model.width=64", "--set", "model.context=8")


def write_probe(path: Path, *ranks: tuple[int, int], **given: Any) -> Path:
    """Write a probe of the network that WIDE plans, with these ranks."""
    fingerprint = shapes_fingerprint(gpt_shape("gpt", 1, 64, 4, 8, 256))
    path.write_text(dump_probe(probe_of(*ranks, fingerprint=fingerprint, **given)), encoding="utf-8")
    return path


def test_a_run_is_probed_and_then_planned(lte: Lte, here: Path, run_toml: Path) -> None:
    done = lte("probe", run_toml, "-o", "probe.json", "--batches", 2, "--warmup", 4, "--device", "cpu", "--layers")
    assert done.code == 0, done.stderr
    assert "blocks.0.mlp.up" in done.stdout and "(estimate; range" in done.stdout
    assert "about" in done.stderr and "next: lte plan --probe probe.json" in done.stderr
    probe = load_probe(here / "probe.json")
    assert (probe.settings.heads, probe.settings.round_steps, len(probe.layers)) == (2, 3, 4)
    assert probe.recommendation is not None
    rank = int(probe.recommendation.rank.estimate)
    plan = lte(*PLAN, *SIZES, "--devices", 2, "--merge-every", 3, "--probe", "probe.json", "--json").json()
    assert rank in {candidate["rank"] for candidate in plan["candidates"] if candidate["heads"] == 2}
    assert any(f"recommends rank {rank} x 2 heads" in note for note in plan["notes"]), plan["notes"]


def test_json_is_the_file_and_the_same_again(lte: Lte, here: Path, run_toml: Path) -> None:
    arguments = ("probe", run_toml, "--batches", 2, "--warmup", 2, "--device", "cpu", "--json", "-o", "probe.json")
    first, second = lte(*arguments).json(), lte(*arguments, "--force").json()
    assert first == second == json.loads((here / "probe.json").read_text())


def ranks_of(plan: Any) -> set[int]:
    return {candidate["rank"] for candidate in plan["candidates"] if candidate["method"] == "lte"}


@pytest.mark.usefixtures("two_batches")
def test_the_recommended_rank_is_tried_and_others_are_marked(lte: Lte, here: Path) -> None:
    write_probe(here / "probe.json", (5, 9), grown=2)
    plain = lte(*PLAN, *WIDE, "--json").json()
    plan = lte(*PLAN, *WIDE, "--probe", "probe.json", "--json").json()
    # 9 directions hold 90 % of a round's update, 18 that of a longer one; both are rounded up.
    assert ranks_of(plan) - ranks_of(plain) == {12, 20}
    marks = {
        (c["rank"], c["heads"], c["merge_every"]): [w for w in c["warnings"] if "probe" in w]
        for c in plan["candidates"]
        if c["method"] == "lte"
    }
    assert "rank 8 of one head is below the 9" in marks[8, 4, 10][0] and "update of 10 steps" in marks[8, 4, 10][0]
    assert "is below the 36 directions" in marks[8, 4, 30][0] and "update of 50 steps" in marks[8, 4, 30][0]
    assert marks[12, 4, 10] == marks[12, 16, 10] == marks[16, 4, 10] == marks[20, 4, 30] == marks[32, 4, 30] == []
    assert "rank 32 is above the 18" in marks[32, 4, 10][0]
    assert "rank 64 is above the 36" in marks[64, 4, 30][0]
    assert any("gradient noise scale 40 samples" in note and "30 to 60" in note for note in plan["notes"])
    assert any("within what the probe found" in note or "the choice:" in note for note in plan["notes"])
    assert not any("probe" in note for note in plain["notes"])


def test_pins_stay_and_are_marked(lte: Lte, here: Path) -> None:
    write_probe(here / "probe.json", (5, 9), noise=DROWNED)
    pins = ("--rank", 8, "--heads-per-device", 2, "--merge-every", 10)
    plan = lte(*PLAN, *WIDE, *pins, "--probe", "probe.json", "--json").json()
    assert ranks_of(plan) == {8}
    assert any("recommends rank 12 x 8 heads" in note for note in plan["notes"])
    assert any("the choice: rank 8 of one head is below" in note for note in plan["notes"])
    assert not any("noise scale" in note for note in plan["notes"])


def test_a_probe_of_another_model_is_refused(refused: Refused, here: Path) -> None:
    write_probe(here / "probe.json", (3, 9))
    refused(*PLAN, *SIZES, "--probe", "probe.json", words=("probe.json", "1,000 parameters", "lte probe"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ("not valid JSON",)),
        ("[]", ("is no probe",)),
        ('{"version": 7}', ("version = 7",)),
        ('{"version": 1}', ("is missing",)),
    ],
)
def test_a_malformed_probe_is_refused(text: str, words: tuple[str, ...], refused: Refused, here: Path) -> None:
    (here / "probe.json").write_text(text)
    refused(*PLAN, *WIDE, "--probe", "probe.json", words=("probe.json", *words))


def test_a_missing_probe_is_refused(refused: Refused) -> None:
    refused(*PLAN, *WIDE, "--probe", "nowhere.json", words=("nowhere.json", "no such file"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.toml",), ("nowhere.toml", "no such file")),
        (("tiny.toml", "--batches", "0"), ("--batches",)),
        (("tiny.toml", "--warmup", "0"), ("--warmup",)),
        (("tiny.toml", "--batches", "1"), ("--batches 1 on cluster.devices = 2",)),
        (("tiny.toml", "-o", "prose.txt"), ("prose.txt exists", "--force")),
        (("tiny.toml", "-o", "."), ("is a folder", "probe.json")),
        (("tiny.toml", "--set", "model.width=17"), ("width = 17",)),
        (("tiny.toml", "--set", "data.path=none"), ("none",)),
    ],
)
def test_mistakes_take_one_line(
    arguments: tuple[str, ...], words: tuple[str, ...], refused: Refused, run_toml: Path
) -> None:
    refused("probe", *arguments, "-q", words=words)


def test_a_run_that_diverges_ends_with_its_reason(lte: Lte, run_toml: Path) -> None:
    done = lte("probe", run_toml, "--set", "train.learning_rate=1e30", "--device", "cpu", "-q")
    assert done.code == 1
    assert "not finite" in done.stderr and "train.learning_rate" in done.stderr


def test_more_memory_than_there_is_is_refused_before_anything_is_allocated(refused: Refused, run_toml: Path) -> None:
    sizes = ("--set", "model.layers=900", "--set", "model.width=65536", "--set", "model.attention_heads=64")
    message = refused("probe", run_toml, "-q", "--device", "cpu", *sizes, words=("the probe needs about", "TB"))
    assert "this machine has" in message


def test_the_memory_is_that_of_a_dense_model_in_training(run_toml: Path) -> None:
    run = load_run(run_toml)
    shape = run.model.shape()
    dense = 4 * shape.parameters * 4  # weights, gradients, two moments
    assert needed_bytes(run) > dense + 4 * (shape.parameters + 2 * shape.adapted_parameters)
    larger = load_given_run(run_toml, ["train.micro_batch=64"])
    assert needed_bytes(larger) > needed_bytes(run)
    with pytest.raises(InputError):
        load_given_run(run_toml, ["train.micro_batch=0"])
