"""`lte export`: merged weights that the plain network computes with, and that transformers loads and generates from."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simulate.config.run import load_run
from simulate.data.batches import TextBatches
from simulate.data.text import load_text
from simulate.methods.build_network import build_model
from simulate.methods.lte.options import LteOptions
from tests.ltecli.command import Lte, Refused, events_of, write_run
from tests.ltecli.commands.test_models import BLOCKS, ENCODER, METHODS, write
from tests.reference.common import mean_loss
from tests.selection import others_slow

GPT = {"name": "gpt", "layers": 1, "width": 16, "attention_heads": 2, "context": 8}
HF = {"name": "hf:gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "context": 8, "vocab": 256}
NO_LIBRARY = "the dev extra has transformers"


def validation_loss(folder: Path, weights: dict[str, torch.Tensor]) -> float:
    """Return the loss that plain layers with these weights have on what the run was evaluated on."""
    run = load_run(folder / "run.toml")
    model = build_model(run).eval()
    model.load_state_dict(weights, strict=True)
    batches = TextBatches.of(run, load_text(run.data))
    with torch.no_grad():
        (loss,) = [mean_loss(model(x), y) for x, y in batches.validation(run.train.evaluate_samples, 16)]
    return float(loss)


MODELS = {"gpt": GPT, "llama": BLOCKS, "factory": ENCODER}


@pytest.mark.parametrize(
    ("model", "method"),
    others_slow(itertools.product(MODELS, METHODS), [("gpt", "lte"), ("llama", "diloco"), ("factory", "ddp")]),
)
def test_exported_weights_have_the_loss_that_the_run_ended_with(lte: Lte, here: Path, model: str, method: str) -> None:
    run = write(here / "run.toml", MODELS[model], METHODS[method], steps=9)
    assert lte("train", run, "--out", "done", "-q").code == 0
    outcome = lte("export", "done", "--json")
    assert outcome.json()["step"] == 9 and outcome.json()["files"] == ["model.safetensors", "run.toml"]
    loss = validation_loss(here / "done", load_file(here / "done" / "export" / "model.safetensors"))
    assert loss == pytest.approx(events_of(here / "done", "evaluate")[-1]["val_loss"], rel=1e-5)


def test_a_checkpoint_inside_a_round_is_merged_first(lte: Lte, here: Path) -> None:
    run = write(here / "run.toml", GPT, METHODS["lte"], steps=9, checkpoint_every=6)
    assert lte("train", run, "--out", "done", "-q").code == 0
    (here / "done" / "checkpoints" / "step-00000009").rename(here / "last")
    outcome = lte("export", "done")
    assert "step 6 is inside a round" in outcome.stderr and "merged after step 6" in outcome.stdout
    weights = load_file(here / "done" / "export" / "model.safetensors")
    assert validation_loss(here / "done", weights) < events_of(here / "done", "step")[0]["train_loss"]
    saved = here / "done" / "checkpoints" / "step-00000006"
    shared, own = (load_file(saved / f"{part}.safetensors") for part in ("state", "devices-0-2"))
    name, method = "model.blocks.0.mlp.up", load_run(run).method
    assert isinstance(method, LteOptions)
    products = [own[f"{device}/{name}.b"][0] @ own[f"{device}/{name}.a"][0] for device in range(2)]
    assert all(product.any() for product in products)
    merged = shared[f"{name}.weight"] + method.scale * sum(products) / 2
    torch.testing.assert_close(weights["blocks.0.mlp.up.weight"], merged)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(GPT, id="gpt", marks=pytest.mark.slow),
        pytest.param(BLOCKS, id="llama"),
        pytest.param(HF, id="hf", marks=pytest.mark.slow),
    ],
)
def test_transformers_loads_the_export_and_generates(lte: Lte, here: Path, model: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", reason=NO_LIBRARY)
    run = write(here / "run.toml", model, METHODS["lte"])
    assert lte("train", run, "--out", "done", "-q").code == 0
    assert lte("export", "done", "--format", "hf", "--out", "theirs").code == 0
    config = json.loads((here / "theirs" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM" if model is BLOCKS else "GPT2LMHeadModel"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(here / "theirs").eval()
    prompt = torch.tensor([list(b"the f")])
    ours = build_model(load_run(here / "done" / "run.toml")).eval()
    assert lte("export", "done").code == 0
    ours.load_state_dict(load_file(here / "done" / "export" / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(ours(prompt), theirs(prompt).logits, rtol=1e-4, atol=1e-5)
        generated = theirs.generate(prompt, max_new_tokens=3, do_sample=False)
        expected = prompt
        for _ in range(3):
            expected = torch.cat([expected, ours(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, expected)


def test_what_cannot_be_exported_is_refused(lte: Lte, refused: Refused, here: Path) -> None:
    refused("export", "nowhere", words=("nowhere is no run folder", "lte train"))
    run = write_run(here / "run.toml")
    assert lte("train", run, "--out", "done", "-q").code == 0
    (here / "taken").mkdir()
    refused("export", "done", "--out", "taken", words=("--out taken exists",))
    refused("export", "done", "--format", "onnx", words=("onnx",))
    factory = write(here / "factory.toml", ENCODER, METHODS["ddp"], steps=2)
    assert lte("train", factory, "--out", "own", "-q").code == 0
    refused("export", "own", "--format", "hf", words=("no form for tests.networks:Encoder", "--format safetensors"))
    for checkpoint in (here / "done" / "checkpoints").iterdir():
        checkpoint.rename(here / checkpoint.name)
    refused("export", "done", words=("done has no checkpoint yet", "--resume"))
