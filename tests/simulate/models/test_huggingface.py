"""Configurations of transformers: what is read from a config.json, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simulate.common.errors import InputError
from simulate.config.run import Run, build_run
from simulate.methods.build_network import build_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own

GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "n_positions": 16,
    "vocab_size": 256,
}


def run_of(folder: Path, table: dict[str, Any], dtype: str = "fp32") -> Run:
    path = folder / f"config{len(list(folder.iterdir()))}.json"  # what a path has is read once
    path.write_text(json.dumps(table))
    return build_run(
        {"model": {"name": f"hf:{path}", "context": 8}, "method": {"name": "ddp"}, "train": {"dtype": dtype}}
    )


def outputs(run: Run) -> torch.Tensor:
    result: torch.Tensor = build_model(run).train()(torch.arange(16).view(2, 8))
    return result


@pytest.mark.parametrize(
    "keys",
    [
        {"return_dict": False},
        {"use_return_dict": False},
        {"torchscript": True},
        {"output_attentions": True, "output_hidden_states": True},
        {"resid_pdrop": 1, "attn_pdrop": 1, "embd_pdrop": 0.5},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_the_form_of_results_and_dropout_of_a_file_change_nothing(tmp_path: Path, keys: dict[str, Any]) -> None:
    expected = outputs(run_of(tmp_path, GPT2))
    torch.testing.assert_close(outputs(run_of(tmp_path, {**GPT2, **keys})), expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({**GPT2, "model_type": "t5"}, "t5 is no causal language model in transformers; name a kind"),
        ({**GPT2, "model_type": "vit"}, "vit is no causal language model in transformers; name a kind"),
        ({**GPT2, "model_type": "my_gpt"}, "has no model_type 'my_gpt'"),
        ({"n_layer": 1}, "the file has no model_type; add it"),
        ({**GPT2, "n_positions": 4}, "raised IndexError: index out of range in self; change model.context"),
    ],
)
def test_a_file_that_gives_no_network_is_refused(tmp_path: Path, table: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        run_of(tmp_path, table).model.shape()
    assert words in str(caught.value)
    assert str(caught.value).count("model.name") == 1  # an error of ours is not told as one of the library's


def test_operations_without_float64_are_named(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    table = {"model_type": "mixtral", "num_key_value_heads": 2, "vocab_size": 256, "num_local_experts": 2, **sizes}
    with pytest.raises(InputError, match=r"the network in fp64 raised RuntimeError: .*; choose train.dtype = fp32"):
        build_model(run_of(tmp_path, table, "fp64"))
