"""`[data]` from the command's side: what a run folder keeps of it, and what reports and events tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulate.config.run import load_given_run, load_run
from tests.ltecli.command import Lte, Refused, events_of, lte_process, write_run
from tests.simulate.data.pictures import files_of, write_folder

MODEL = {"layers": 1, "width": 16, "attention_heads": 2, "context": 8, "vocab": 300}


@pytest.fixture
def of_pairs(here: Path) -> Path:
    """A tiny run on byte pairs."""
    pytest.importorskip("tokenizers")
    path = write_run(here / "pairs.toml", model=MODEL)
    text = path.read_text()
    path.write_text(text.replace("[data]", '[data]\ntokenizer = "bpe:300"'))
    return path


def test_a_run_keeps_the_tokenizer_that_it_trained(lte: Lte, here: Path, of_pairs: Path) -> None:
    outcome = lte("train", of_pairs, "--out", "a")
    assert outcome.code == 0 and "validation tokens (bpe:300)" in outcome.stderr
    kept = json.loads((here / "a" / "tokenizer.json").read_text())
    assert kept["model"]["type"] == "BPE" and 256 < len(kept["model"]["vocab"]) <= 300


def test_a_resumed_run_uses_the_tokenizer_that_it_kept(
    lte: Lte, here: Path, of_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lte("train", of_pairs, "--out", "a", "--set", "train.steps=6", "--quiet").code == 0
    assert lte("train", of_pairs, "--out", "b", "--set", "train.steps=6", "--quiet").code == 0
    checkpoints = sorted((here / "b" / "checkpoints").iterdir())
    for path in checkpoints[-1].iterdir():
        path.unlink()
    checkpoints[-1].rmdir()
    monkeypatch.setattr("simulate.data.tokenizer._train", None)
    monkeypatch.setenv("LTE_CACHE", str(here / "another"))
    outcome = lte("train", "b", "--resume", "--quiet")
    assert outcome.code == 0, outcome.stderr
    losses = [[event["train_loss"] for event in events_of(here / run, "step")] for run in "ab"]
    assert losses[0] == losses[1]


def test_a_tokenizer_that_was_changed_since_is_refused(lte: Lte, here: Path, of_pairs: Path) -> None:
    assert lte("train", of_pairs, "--out", "a", "--set", "train.steps=6", "--quiet").code == 0
    path = here / "a" / "tokenizer.json"
    kept = json.loads(path.read_text())
    kept["model"]["merges"].pop(0)
    path.write_text(json.dumps(kept))
    newest = sorted((here / "a" / "checkpoints").iterdir())[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    outcome = lte("train", "a", "--resume")
    assert outcome.code == 2 and "trained on other data" in outcome.stderr


def test_paths_become_absolute_and_other_keys_stay(lte: Lte, here: Path) -> None:
    write_run(here / "tiny.toml")
    text = (here / "tiny.toml").read_text()
    relative = text.replace(str(here / "prose.txt"), "prose.txt").replace("[data]", "[data]\nshards = [3.0, 1.0]")
    (here / "tiny.toml").write_text(relative)
    (here / "more.txt").write_text((here / "prose.txt").read_text())
    assert lte("train", "tiny.toml", "--out", "a", "--quiet").code == 0
    assert lte("train", "tiny.toml", "--data", "more.txt", "--out", "b", "--quiet").code == 0
    for name, file in {"a": "prose.txt", "b": "more.txt"}.items():
        data = load_run(here / name / "run.toml").data
        assert (data.path, data.shards) == (str(here / file), (3.0, 1.0))


def test_data_on_the_command_line_replaces_what_the_file_names(lte: Lte, here: Path) -> None:
    write_run(here / "tiny.toml", data={"name": "hf:nobody/nothing", "rows": 3})
    assert lte("train", "tiny.toml", "--data", "prose.txt", "--out", "a", "--quiet").code == 0


def test_a_key_of_data_may_stand_without_the_table(lte: Lte, here: Path) -> None:
    write_run(here / "tiny.toml")
    text = (here / "tiny.toml").read_text()
    begin = text.index("[data]")
    (here / "tiny.toml").write_text(text[:begin] + text[text.index("[", begin + 1) :])
    (here / "records.jsonl").write_text(json.dumps({"title": "a", "body": (here / "prose.txt").read_text()}))
    assert load_given_run(here / "tiny.toml", ["data.shards=[3.0, 1.0]"]).data.name == "stdlib"
    given = ("--data", "records.jsonl", "--set", "data.field=body", "--set", "data.shards=[3.0, 1.0]")
    outcome = lte("train", "tiny.toml", "--out", "b", "--quiet", *given)
    assert outcome.code == 0, outcome.stderr
    kept = load_run(here / "b" / "run.toml").data
    assert kept.field == "body" and kept.shards == (3.0, 1.0) and kept.path == str(here / "records.jsonl")


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_images_need_a_model_of_images(refused: Refused, here: Path, run_toml: Path, verb: str) -> None:
    pictures = write_folder(here / "pictures", files_of({"cat": 3, "dog": 3}))
    first = ("train", run_toml) if verb == "train" else ("plan",)
    refused(*first, "--data", pictures, words=("is images", "model.name = 'gpt' reads text"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("data.tokenizer=bpe:9", ("tokenizer = 'bpe:9'", "bpe:4096")),
        ("data.tokenizer=nowhere.json", ("data.tokenizer = ", "nowhere.json", "cannot be read")),
        ("data.skew=0", ("data.skew = 0",)),
        ("data.augment=[\"rotate\"]", ("data.augment[0] = 'rotate'", "known: crop, flip")),
        ("data.format=parquet", ("data.format = 'parquet'", "known:")),
        ("data.rows=4", ("rows = 4", "hf:")),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named(refused: Refused, run_toml: Path, given: str, words: tuple[str, ...]) -> None:
    refused("train", run_toml, "--set", given, words=words)


def test_accuracy_is_reported_where_there_is_one(lte: Lte, trained: Path) -> None:
    assert "top-1 accuracy" not in lte("report", trained).stdout
    assert lte("report", trained, "--json").json()["val_accuracy"] is None
    path = trained / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        if event["kind"] == "evaluate":
            event["val_accuracy"] = 0.125
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert "top-1 accuracy 12.50%" in lte("report", trained).stdout
    assert lte("report", trained, "--json").json()["val_accuracy"] == 0.125
    assert "12.50%" in lte("report", trained, trained).stdout


VIT = {"name": "vit", "layers": 1, "width": 16, "attention_heads": 2, "patch": 4, "image": 8, "colours": 1}


def test_a_model_of_images_is_trained_scored_and_reported(lte: Lte, here: Path) -> None:
    pytest.importorskip("sklearn")
    data = {"name": "digits", "augment": ["crop", "flip"], "mixup": 0.2, "skew": 0.5}
    run = write_run(here / "vit.toml", model=VIT, data=data)
    outcome = lte("train", run, "--out", "a", "--device", "cpu")
    assert outcome.code == 0, outcome.stderr
    assert "validation images of 1 x 8 x 8 in 10 classes" in outcome.stderr
    assert "top-1 accuracy" in outcome.stdout
    (*_, last) = events_of(here / "a", "evaluate")
    assert 0 <= last["val_accuracy"] <= 1
    assert lte("report", "a", "--json").json()["val_accuracy"] == last["val_accuracy"]
    assert list((here / "a" / "tensorboard").iterdir())


@pytest.mark.slow
def test_images_are_trained_alike_in_one_process_and_in_several(lte: Lte, here: Path) -> None:
    pytest.importorskip("sklearn")
    data = {"name": "digits", "augment": ["crop", "flip"], "mixup": 0.2, "skew": 0.5}
    train = {"dtype": "fp64", "evaluate_samples": 50}
    run = write_run(here / "vit.toml", model=VIT, data=data, train=train)
    assert lte("train", run, "--out", "a", "--device", "cpu", "--quiet").code == 0
    launched = lte_process("train", run, "--out", "b", "--device", "cpu", "--launch", cwd=here).outcome()
    assert launched.code == 0, launched.stderr
    assert "top-1 accuracy" in launched.stdout
    for kind, key in (("step", "train_loss"), ("evaluate", "val_loss"), ("evaluate", "val_accuracy")):
        one, several = ([event[key] for event in events_of(here / name, kind)] for name in "ab")
        assert several == pytest.approx(one, rel=1e-9)


@pytest.mark.usefixtures("two_batches")
def test_a_plan_for_images_without_data_is_trained_on_digits(lte: Lte, here: Path) -> None:
    sizes = [part for key, value in VIT.items() if key != "name" for part in ("--set", f"model.{key}={value}")]
    outcome = lte("plan", "--model", "vit", "--samples", "96", "--devices", "2", *sizes, "-o", "run.toml", "--json")
    assert outcome.code == 0, outcome.stderr
    assert any("'digits'" in note for note in outcome.json()["notes"])
    data = load_run(here / "run.toml").data
    assert (data.name, data.upscale) == ("digits", True)
    pytest.importorskip("sklearn")
    assert lte("train", "run.toml", "--out", "a", "--quiet").code == 0
