"""`lte` with every kind of model: plans without torch, training end to end, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from simulate.common import toml_io
from simulate.models.families.table import MODEL_NAMES
from tests.ltecli.command import TINY, Lte, Refused, events_of, write_prose
from tests.selection import others_slow

BLOCKS = {"name": "llama", "layers": 1, "width": 16, "attention_heads": 2, "mlp_width": 24, "context": 8}
ENCODER = {"name": "tests.networks:Encoder", "context": 8, "width": 16}
TRAIN = {
    "steps": 24, "micro_batch": 4, "learning_rate": 2e-2, "evaluate_every": 8, "evaluate_samples": 9,
    "checkpoint_every": 12,
}  # fmt: skip
"""The last batch of an evaluation is a short one."""
METHODS: dict[str, dict[str, Any]] = {
    "lte": {"name": "lte", "rank": 4, "merge_every": 4},
    "ddp": {"name": "ddp"},
    "diloco": {"name": "diloco", "merge_every": 4},
}


def write(path: Path, model: dict[str, Any], method: dict[str, Any], **train: Any) -> Path:
    table = {
        "model": model,
        "data": {"path": str(write_prose(path.parent / "prose.txt"))},
        "method": method,
        "train": {**TRAIN, **train},
        "cluster": TINY["cluster"],
    }
    path.write_text(toml_io.dump(table), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_named_model_can_be_planned(lte: Lte, here: Path, name: str) -> None:
    pins = ("--rank", "8", "--merge-every", "10", "--set", "train.micro_batch=1")
    plan = lte("plan", "--model", name, "--profile", "a100_x8_nvlink", *pins, "-o", "run.toml", "--json")
    assert plan.json()["model"]["name"] == name
    assert plan.json()["chosen"]["method"] == "lte"
    assert f'name = "{name}"' in (here / "run.toml").read_text()


@pytest.mark.usefixtures("two_batches")
def test_models_of_images_are_counted_in_samples(lte: Lte) -> None:
    outcome = lte("plan", "--model", "vit", "--samples", "50000", "--profile", "rtx3060_x4_home", "--all")
    assert "50,000 samples on 4 x rtx3060_x4_home" in outcome.stdout
    assert "wall-clock for the samples" in outcome.stdout
    assert "tokens" not in outcome.stdout.partition("note:")[0]


def test_without_a_count_a_patch_counts_like_a_token(lte: Lte) -> None:
    plan = lte("plan", "--model", "vit_s16", "--profile", "a100_x8_nvlink", "--method", "ddp", "--json").json()
    assert plan["tokens"] == 20 * 22_050_664 // 197


TEXT = {"llama": BLOCKS, "factory": ENCODER}


@pytest.mark.parametrize(
    ("model", "method"),
    others_slow(itertools.product(TEXT, METHODS), [("llama", "diloco"), ("factory", "lte"), ("factory", "ddp")]),
)
def test_training_lowers_the_loss(lte: Lte, here: Path, model: str, method: str) -> None:
    outcome = lte("train", write(here / "run.toml", TEXT[model], METHODS[method]), "--out", "done", "-q")
    assert outcome.code == 0, outcome
    losses = [event["train_loss"] for event in events_of(here / "done", "step")]
    (*_, evaluated) = [event["val_loss"] for event in events_of(here / "done", "evaluate")]
    assert sum(losses[-4:]) / 4 < losses[0] - 0.2 and evaluated < losses[0] - 0.2
    assert lte("report", "done", "--json").json()["steps"] == 24


def test_a_factorys_run_resumes(lte: Lte, here: Path) -> None:
    run = write(here / "run.toml", ENCODER, METHODS["lte"])
    assert lte("train", run, "--out", "whole", "-q").code == 0
    longer = events_of(here / "whole", "step")
    assert lte("train", "whole", "--resume").code == 0  # finished: nothing to do
    assert longer == events_of(here / "whole", "step")


def test_a_plan_says_that_it_ran_the_model_and_what_has_no_adapters(lte: Lte, here: Path) -> None:
    request = ("--model", "tests.networks:Convolutional", "--set", "model.classes=10", "--set", "model.image=8")
    outcome = lte("plan", *request, "--samples", "1000", "--profile", "rtx3060_x4_home", "--json")
    assert outcome.code == 0, outcome
    notes = " ".join(outcome.json()["notes"])
    assert "imported and run to plan this" in notes
    assert "trained whole, without adapters: norm (GroupNorm, copy by copy), head (Linear)" in notes


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ("--model vit_s15", ("'vit_s15'", "did you mean 'vit_s16'?", "llama_7b", "mixer_b16")),
        ("--model vit --set model.context=5", ("model.context is not a known key of model vit", "classes")),
        ("--model vit --set model.width=100", ("width = 100 is not divisible by attention_heads = 3",)),
        ("--model vit --set model.patch=5", ("image = 32 is not divisible by patch = 5",)),
        ("--model mixer_s16 --set model.attention_heads=2", ("model.attention_heads is not a known key", "mixer")),
        ("--model llama --set model.width=12", ("width / attention_heads = 3 is odd",)),
        ("--model llama --set model.mlp_width=0", ("model.mlp_width = 0", "greater than 0")),
        ("--model vit --tokens 5", ("--tokens 5", "use --samples")),
        ("--model gpt2 --samples 5", ("--samples 5", "use --tokens")),
        ("--model vit --samples 0", ("--samples 0", "greater than 0")),
        ("--model tests.networks:Encode", ("has no 'Encode'", "did you mean 'Encoder'?")),
        ("--model tests.networks:broken", ("RuntimeError: no weights today",)),
        ("--model tests.networks:no_network", ("returned a int",)),
        ("--model :Encoder", ("':Encoder'",)),
        ("--model hf:", ("'hf:'", "config.json")),
    ],
)
def test_wrong_models_are_refused(refused: Refused, request_: str, words: tuple[str, ...]) -> None:
    refused("plan", *request_.split(), words=words)


def test_a_rank_beyond_a_traced_layer_names_it(refused: Refused, here: Path) -> None:
    run = write(here / "run.toml", ENCODER, {"name": "lte", "rank": 17})
    refused("train", run, words=("method.rank = 17 exceeds the 16 inputs of encoder.layers.0.self_attn.in_proj",))


IMAGES: dict[str, dict[str, Any]] = {
    "vit": {"name": "vit", "layers": 1, "width": 32, "attention_heads": 2, "image": 8, "patch": 2, "colours": 1},
    "mixer": {
        "name": "mixer_s16", "layers": 1, "width": 16, "tokens_width": 8, "channels_width": 24, "image": 8,
        "patch": 2, "colours": 1, "classes": 10,
    },
    "factory": {"name": "tests.networks:Convolutional", "image": 8, "colours": 1, "classes": 10, "width": 16},
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "model"),
    others_slow(itertools.product(METHODS, IMAGES), [("lte", "mixer"), ("ddp", "factory")]),
)
def test_models_of_images_learn(lte: Lte, here: Path, model: str, method: str) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    table = {
        "model": IMAGES[model],
        "data": {"name": "digits"},
        "method": METHODS[method],
        "train": {**TRAIN, "steps": 60, "micro_batch": 16, "learning_rate": 1e-2, "checkpoint_every": 60},
        "cluster": TINY["cluster"],
    }
    (here / "run.toml").write_text(toml_io.dump(table), encoding="utf-8")
    assert lte("train", "run.toml", "--out", "done", "-q").code == 0
    losses = [event["train_loss"] for event in events_of(here / "done", "step")]
    assert sum(losses[-10:]) < sum(losses[:10]) - 1.0
    assert lte("export", "done").code == 0


def test_models_of_images_are_not_trained_on_text(refused: Refused, here: Path) -> None:
    words = ("is text, and model.name = 'vit' reads images",)
    refused("train", write(here / "run.toml", {"name": "vit"}, METHODS["lte"]), words=words)
