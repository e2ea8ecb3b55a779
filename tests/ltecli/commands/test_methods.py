"""Every method from plan to report, as a user meets it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from simulate.common import toml_io
from simulate.config.method_table import METHOD_NAMES
from simulate.config.run import build_run, load_run
from tests.ltecli.command import PROFILE, Lte, Refused, write_prose
from tests.selection import others_slow

TINY_PLAN = (
    "--profile", PROFILE, "--devices", "4", "--data", "prose.txt", "--set", "train.steps=13",
    "--set", "train.micro_batch=2", "--set", "model.layers=1", "--set", "model.width=64",
    "--set", "model.attention_heads=2", "--set", "model.context=32", "--set", "train.evaluate_samples=4",
    "--set", "train.activation_checkpointing=false",
)  # fmt: skip


ONE_BATCH = ("--tokens", "40000", "--set", "train.micro_batch=4", "--set", "train.activation_checkpointing=false")
EXAMPLES = Path(__file__).parents[3] / "examples"
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "streaming_diloco": {"method": {"name": "diloco", "fragments": 4, "merge_delay": 5, "wire": "int4"}},
    "muloco": {"method": {"name": "diloco", "merge_every": 30, "wire": "int2"}, "train": {"optimizer": "muon"}},
}
"""Keys that the published combinations in examples/ are made of."""
LATE = {"lte": "2", "local-sgd": "3", "diloco": "1"}


@pytest.mark.parametrize("name", others_slow(METHOD_NAMES, ("lte", "ddp", "diloco", "relora", "sapipe", "topk")))
def test_a_method_is_planned_trained_counted_and_reported(lte: Lte, here: Path, name: str) -> None:
    # Experts that a short measurement never draws have no optimizer state yet: one is drawn always.
    assert_planned_is_what_comes(lte, here, name, ("--set", "method.experts=1") if name == "adamix" else ())


@pytest.mark.parametrize("name", others_slow(LATE, ["lte"]))
def test_late_merges_are_planned_trained_counted_and_reported(lte: Lte, here: Path, name: str) -> None:
    delay = ("--set", f"method.merge_delay={LATE[name]}", "--set", "method.merge_every=5")
    assert_planned_is_what_comes(lte, here, name, delay)


def assert_planned_is_what_comes(lte: Lte, here: Path, name: str, settings: tuple[str, ...]) -> None:
    write_prose(here / "prose.txt")
    assert lte("plan", *TINY_PLAN, "--method", name, *settings, "-o", "run.toml").code == 0
    run = load_run(here / "run.toml")
    assert run.method.name == name
    assert lte("train", "run.toml", "--out", "a", "--quiet").code == 0
    document = lte("report", "a", "--json").json()
    sent, wall, memory = (document[key] for key in ("sent_bytes_per_device", "wall_s", "memory_bytes"))
    assert document["method"] == name and document["val_loss"] > 0
    assert sent["planned"] == pytest.approx(sent["counted"], rel=1e-12) and sent["counted"] > 0
    # What travels in the background is planned in the steady state: the first and the last round differ.
    assert wall["planned"] == pytest.approx(wall["simulated"], rel=0.15 if name in ("sapipe", "daso") else 1e-6)
    # Merges of whole networks in few bits are planned for the fewest that may take part, whose chunks are largest.
    is_bound = run.cluster.has_quorum and name in ("diloco", "local-sgd")
    assert memory["planned"] == pytest.approx(memory["measured"], rel=0.1 if is_bound else 0.05)
    assert not is_bound or memory["planned"] >= memory["measured"]


@pytest.fixture
def rivals(gpt2: Any) -> dict[str, Any]:
    """The rivals of a plan for GPT-2 at home, by method."""
    return {rival["method"]: rival for rival in gpt2["rivals"]}


def test_the_best_of_every_other_method_stands_beside_the_choice(rivals: dict[str, Any]) -> None:
    assert set(rivals) == set(METHOD_NAMES) - {"lte", "ddp"}
    assert all(rival["wall_s"] > 0 and isinstance(rival["fits"], bool) for rival in rivals.values())


def test_a_rival_is_what_planning_it_alone_would_choose(lte: Lte, rivals: dict[str, Any]) -> None:
    chosen = lte("plan", "--profile", PROFILE, "--model", "gpt2", "--method", "diloco", "--json").json()["chosen"]
    assert {**chosen, "fits": True} == rivals["diloco"]


def test_a_pinned_method_has_no_rivals(lte: Lte) -> None:
    assert lte("plan", "--profile", PROFILE, "--method", "ddp", "--json").json()["rivals"] == []


def test_the_plan_says_what_becomes_of_parameters_that_are_not_adapted(lte: Lte) -> None:
    settings = ("--set", "method.norms=one", "--set", "method.biases=frozen")
    notes = " ".join(lte("plan", "--profile", PROFILE, *ONE_BATCH, *settings, "--json").json()["notes"])
    # 256 and 128 rows of 128; 9 norms of 2 x 128; in each of 4 blocks 384, 128, 512 and 128 biases.
    assert "embeddings 49,152 (average), norms 2,304 (one), biases 4,608 (frozen)" in notes


def test_shards_need_no_data_to_be_named(lte: Lte, refused: Refused) -> None:
    assert lte("plan", *ONE_BATCH, "--devices", "2", "--set", "data.shards=[3, 1]").code == 0
    refused("plan", "--devices", "3", "--set", "data.shards=[3, 1]", words=("data.shards has 2 sizes", "one a device"))
    refused("plan", "--devices", "2", "--set", "data.shards=[3, -1]", words=("data.shards[1] = -1",))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("method.name=fedavg",), ("not a method", "local-sgd")),
        (("method.name=daso", "method.devices_per_node=3"), ("cluster.devices = 4", "method.devices_per_node = 3")),
        (("method.name=local-sgd", "method.participation=0.5"), ("participation = 0.5", "server", "reset")),
        (("method.name=local-sgd", "method.wire=int8", "method.merge_transport=server"), ("wire = 'int8'", "reduce")),
        (("method.name=diloco", "method.fragments=3"), ("method.fragments = 3", "method.merge_every = 10")),
        (("method.frozen_a=true", "method.reset=none"), ("frozen_a", "method.reset=b")),
        (("method.name=sapipe", "train.optimizer=muon"), ("muon", "method.compensation=none")),
        (("method.name=topk", "method.density=2.0"), ("method.density = 2.0",)),
        (("method.name=lora", "method.merge_every=3"), ("method.merge_every is not a known key of method lora",)),
    ],
)
def test_a_mistake_is_named(refused: Refused, settings: tuple[str, ...], words: tuple[str, ...]) -> None:
    assignments = [part for setting in settings for part in ("--set", setting)]
    refused("plan", "--profile", PROFILE, "--devices", "4", *assignments, words=words)


def test_a_pin_of_other_methods_names_them(refused: Refused) -> None:
    for method in ("ddp", "adamix"):
        words = ("--quantize is for lte, lora, relora, mhlora", f"the method is {method}")
        refused("plan", "--profile", PROFILE, "--method", method, "--quantize", "nf4", words=words)


@pytest.mark.parametrize(
    "asked",
    [
        ("method.reset=none",),
        ("method.reset=ab", "method.merge_delay=2"),
        ("method.frozen_a=false", "method.merge_delay=2"),
        ("method.reset=none", "method.frozen_a=false", "method.pace=deadline"),
    ],
)
def test_the_next_moves_of_a_refusal_work_on_a_planned_run(lte: Lte, here: Path, asked: tuple[str, ...]) -> None:
    """A planned run has every key, so that no default follows from another key."""
    assert lte("plan", "--profile", PROFILE, *ONE_BATCH, "--devices", "2", "-o", "planned.toml").code == 0
    refusal = lte("train", "planned.toml", "--out", "a", *(part for key in asked for part in ("--set", key)))
    assert refusal.code == 2 and not (here / "a").exists()
    moves = re.findall(r"--set ([\w.]+=\w+)", refusal.stderr)
    assert moves
    for move in moves:
        table = toml_io.parse((here / "planned.toml").read_text(), "planned.toml")
        for assignment in (*asked, move):
            toml_io.set_key(table, assignment)
        assert build_run(table).method.name == "lte"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_combination_is_what_it_says_and_runs(lte: Lte, here: Path, name: str) -> None:
    path = EXAMPLES / f"{name}.toml"
    given = load_run(path)
    for table, keys in PUBLISHED[name].items():
        assert {key: getattr(getattr(given, table), key) for key in keys} == keys
    small = (
        "train.steps=61",
        "model.width=16",
        "model.attention_heads=2",
        "model.context=8",
        "train.evaluate_samples=4",
    )
    settings = [word for key in (*small, "train.micro_batch=2") for word in ("--set", key)]
    lte("train", str(path), "--data", str(write_prose(here / "prose.txt")), *settings, "-o", "run")
    found = lte("report", "run", "--json").json()
    assert found["steps"] == 61 and found["method"] == "diloco"
    assert found["sent_bytes_per_device"]["counted"] == found["sent_bytes_per_device"]["planned"] > 0


def test_every_run_in_examples_is_a_published_combination() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.toml")} == PUBLISHED.keys()
