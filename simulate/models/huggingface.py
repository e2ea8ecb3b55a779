"""Builds causal language models of the transformers library from a configuration, with fresh weights.

Nothing is downloaded: the configuration is a local config.json, or a kind of model with the library's own defaults.
simulate.models.user_network and `lte export` build the network; simulate.models.schema asks for its vocabulary. The
library takes seconds to import, so that waits until a network needs it.
"""

from __future__ import annotations

import inspect
import json
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from simulate.common.encodings import read_text
from simulate.common.errors import InputError, near_match
from simulate.models.interfaces import HUGGINGFACE, HuggingfaceOptions


class CausalLanguageModel(nn.Module):
    """Wrapper of a library's network: tokens (S, T) int64 in, logits (S, T, vocab) out, as our own networks have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, tokens_ST: Tensor) -> Tensor:
        keywords: dict[str, Any] = {"use_cache": False}
        # The library would make one row of positions for all samples, but each device has its own embeddings.
        if self.takes_positions:
            positions = torch.arange(tokens_ST.shape[1], device=tokens_ST.device)
            keywords["position_ids"] = positions.expand_as(tokens_ST)
        logits: Tensor = self.model(input_ids=tokens_ST, **keywords).logits
        return logits


def configured_vocab(name: str) -> int:
    """Return the vocabulary size of a configuration; raises InputError if it has none."""
    vocab = getattr(_configuration(name), "vocab_size", None)
    if not isinstance(vocab, int):
        raise InputError(f"model.name = {name!r}: the configuration has no vocab_size; set model.vocab")
    return vocab


def build_huggingface(options: HuggingfaceOptions) -> nn.Module:
    """Return the network of a [model] table, with start weights drawn by the library."""
    transformers = _library(options.name)
    # A copy, since `_configuration` caches the object and the keys below are written to it.
    config = _configuration(options.name).__class__.from_dict(_configuration(options.name).to_dict())
    for key, value in {"vocab_size": options.vocab, **(options.model_extra or {})}.items():
        if not hasattr(config, key):
            known = [k for k in config.to_dict() if not k.startswith("_")]
            raise InputError(f"model.{key} is no key of {options.name}'s configuration; {near_match(key, known)}")
        setattr(config, key, value)
    # Our text has no special tokens, and their default indices lie beyond a small vocabulary.
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (getattr(config, key, None) or 0) >= options.vocab:
            setattr(config, key, None)
    # Dropout would be drawn outside of the run's seed, so that no run could be repeated.
    for key, value in config.to_dict().items():
        if key.endswith(("pdrop", "dropout")) and isinstance(value, float):
            setattr(config, key, 0.0)
    try:
        model = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise InputError(
            f"model.name = {options.name!r}: transformers refuses the configuration: {type(error).__name__}: {error}"
        ) from error
    return CausalLanguageModel(model)


@lru_cache(maxsize=16)
def _configuration(name: str) -> Any:
    """Return the configuration object of a network's name: of a config.json, else the defaults of a kind of model."""
    given = name.removeprefix(f"{HUGGINGFACE}:")
    if not given:
        raise InputError(f"model.name = {name!r}: name a kind of model (hf:gpt2) or the path of a config.json")
    path = Path(given)
    table: dict[str, Any] = {}
    if path.suffix == ".json" or path.exists():
        table = _table(path / "config.json" if path.is_dir() else path, name)
    kind = table.get("model_type", "") if table else given
    transformers = _library(name)
    known = transformers.CONFIG_MAPPING
    if kind not in known:
        hint = near_match(str(kind), known.keys()).partition("known:")[0]  # the library knows hundreds
        raise InputError(
            f"model.name = {name!r}: transformers has no model_type {kind!r}; {hint}a kind such as gpt2, llama, "
            "mistral or qwen2, or the path of a config.json"
        )
    return known[kind](**{key: value for key, value in table.items() if key != "model_type"})


def _table(path: Path, name: str) -> dict[str, Any]:
    try:
        table = json.loads(read_text(path))
    except OSError as error:
        raise InputError(f"model.name = {name!r}: {path} cannot be read ({error.strerror}); check the path") from None
    except ValueError:
        table = None
    if not isinstance(table, dict):
        raise InputError(f"model.name = {name!r}: {path} is no JSON object; a transformers config.json is needed")
    return table


def _library(name: str) -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise InputError(
            f"model.name = {name!r} needs the transformers library; pip install 'lte[hf]', or choose another model"
        ) from None
    return transformers
