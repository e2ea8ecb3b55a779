"""lte sample and lte eval: a run's newest weights, on a prompt and on other data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simulate.config.run import load_run
from simulate.methods.build_network import build_model
from tests.ltecli.command import Lte, Refused, events_of, write_prose, write_run
from tests.reference.common import mean_loss

GPT = {"name": "gpt", "layers": 1, "width": 16, "attention_heads": 2, "context": 8}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished run, done, and its text."""
    from ltecli.app import main

    folder = tmp_path_factory.mktemp("use")
    (folder / "a.txt").write_text("abcdefgh\n" * 400, encoding="utf-8")
    run = write_run(folder / "run.toml", model=GPT, data={"path": str(folder / "a.txt")}, train={"steps": 40})
    assert main(["train", str(run), "--out", str(folder / "done"), "-q"]) == 0
    assert main(["export", str(folder / "done"), "--out", str(folder / "weights")]) == 0
    return folder


def test_a_sample_is_what_the_exported_network_says(lte: Lte, trained: Path) -> None:
    command = ("sample", str(trained / "done"), "--prompt", "abc", "--length", "12")
    found = lte(*command, "--temperature", "0", "--json").json()
    model = build_model(load_run(trained / "done" / "run.toml")).eval()
    model.load_state_dict(load_file(trained / "weights" / "model.safetensors"))
    tokens = list(b"abc")
    for _ in range(12):
        tokens.append(int(model(torch.tensor([tokens[-8:]]))[0, -1].argmax()))
    assert found["text"] == bytes(tokens).decode(errors="replace")
    assert lte(*command, "--seed", "1").stdout == lte(*command, "--seed", "1").stdout


def test_a_text_is_scored_whole(lte: Lte, trained: Path) -> None:
    other = trained / "other.txt"
    other.write_text("hgfedcba\n" * 40, encoding="utf-8")
    found = lte("eval", str(trained / "done"), "--data", str(other), "--json").json()
    model = build_model(load_run(trained / "done" / "run.toml")).eval()
    model.load_state_dict(load_file(trained / "weights" / "model.safetensors"))
    content = torch.tensor(list(other.read_bytes()))
    starts = torch.linspace(0, len(content) - 9, found["samples"], dtype=torch.float64).long().unique()
    windows = torch.stack([content[start : start + 9] for start in starts])
    loss = float(mean_loss(model(windows[:, :-1]), windows[:, 1:]).detach())
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-5)
    assert found["samples"] == 360 // 9
    assert events_of(trained / "done", "evaluate")[-1]["val_loss"] < found["loss"]  # it has learned the other order


def test_images_are_scored_as_the_run_saw_its_own(lte: Lte, here: Path) -> None:
    pytest.importorskip("PIL")
    for label, shade in (("dark", 40), ("light", 200)):
        for number in range(20):
            write_image(here / "pictures" / label / f"{number}.png", shade + number)
    vit = {"name": "vit", "image": 8, "patch": 4, "layers": 1, "width": 16, "attention_heads": 2, "classes": 2}
    run = write_run(here / "run.toml", model=vit, data={"path": str(here / "pictures")}, train={"steps": 4})
    assert lte("train", str(run), "--out", "done", "-q").code == 0
    same = lte("eval", "done", "--data", str(here / "pictures"), "--json").json()
    last = events_of(here / "done", "evaluate")[-1]
    assert same["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert same["val_accuracy"] == pytest.approx(last["val_accuracy"])
    shutil.copytree(here / "pictures", here / "others")
    (here / "others" / "dark").rename(here / "others" / "black")
    refused = lte("eval", "done", "--data", str(here / "others"))
    assert refused.code == 2 and "has the classes black, light" in refused.stderr
    (here / "pictures" / "dark" / "0.png").unlink()
    refused = lte("eval", "done", "--data", str(here / "others"))
    assert refused.code == 2 and "is not what it was in training" in refused.stderr
    refused = lte("sample", "done", "--prompt", "a")
    assert refused.code == 2 and "reads images" in refused.stderr


def test_records_are_scored_by_the_runs_field_or_a_given_one(
    lte: Lte, refused: Refused, trained: Path, tmp_path: Path
) -> None:
    records = [json.dumps({"body": "abcdefgh", "title": "hgfedcba", "n": 1})] * 40
    (tmp_path / "a.jsonl").write_text("\n".join(records), encoding="utf-8")
    (tmp_path / "body.txt").write_text("\n".join(["abcdefgh"] * 40), encoding="utf-8")
    (tmp_path / "title.txt").write_text("\n".join(["hgfedcba"] * 40), encoding="utf-8")

    def loss(run: Path, data: str, *options: str) -> float:
        found: float = lte("eval", str(run), "--data", str(tmp_path / data), *options, "--json").json()["loss"]
        return found

    done = trained / "done"
    assert loss(done, "a.jsonl", "--field", "body") == loss(done, "body.txt")
    assert loss(done, "a.jsonl", "--field", "title") == loss(done, "title.txt") != loss(done, "body.txt")
    refused("eval", str(done), "--data", str(tmp_path / "a.jsonl"), words=("body, title hold text", "--field NAME"))
    refused(
        "eval", str(done), "--data", str(tmp_path / "a.jsonl"), "--field", "x", words=("no field 'x'", "--field NAME")
    )
    refused(
        "eval", str(done), "--data", str(tmp_path / "body.txt"), "--field", "x", words=("--field x is for records",)
    )
    data = {"path": str(tmp_path / "a.jsonl"), "field": "title"}
    run = write_run(tmp_path / "run.toml", model=GPT, data=data, train={"steps": 2})
    lte("train", str(run), "--out", str(tmp_path / "run"), "-q")
    by_title = tmp_path / "run"
    assert loss(by_title, "a.jsonl") == loss(by_title, "title.txt")
    assert loss(by_title, "a.jsonl", "--field", "body") == loss(by_title, "body.txt")


def write_image(path: Path, shade: int) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, shade, 255 - shade)).save(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sample", "done", "--prompt", ""), ("--prompt is empty",)),
        (("eval", "done", "--data", "missing.txt"), ("missing.txt", "does not exist")),
        (("eval", "nowhere", "--data", "a.txt"), ("nowhere",)),
    ],
)
def test_what_cannot_be_used_is_refused(
    refused: Refused, trained: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(trained)
    refused(*arguments, words=words)


def test_a_tokenizer_goes_with_the_weights_and_the_samples(lte: Lte, here: Path) -> None:
    pytest.importorskip("tokenizers")
    data = {"path": str(write_prose(here / "a.txt")), "tokenizer": "bpe:300"}
    run = write_run(here / "run.toml", model={**GPT, "vocab": 300}, data=data, train={"steps": 4})
    assert lte("train", str(run), "--out", "done", "-q").code == 0
    assert "tokenizer.json" in lte("export", "done", "--json").json()["files"]
    assert (here / "done/export/tokenizer.json").read_bytes() == (here / "done/tokenizer.json").read_bytes()
    assert lte("sample", "done", "--prompt", "low rank", "--length", "3").stdout.startswith("low rank")
