"""Builds causal language models of the transformers library from a configuration, with fresh weights.

Nothing is downloaded: the configuration is a local config.json, or a kind of model with the library's own defaults.
simulate.models.user_network and `lte export` build the network; simulate.models.schema asks for its vocabulary. The
library takes seconds to import, so that waits until a network needs it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from simulate.common.encodings import read_text
from simulate.common.errors import InputError, first_line, near_match
from simulate.models.interfaces import HUGGINGFACE, HuggingfaceOptions


class CausalLanguageModel(nn.Module):
    """Wrapper of a library's network: tokens (S, T) int64 in, logits (S, T, vocab) out, as our own networks have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.keywords = {"use_cache": False} if takes_all or "use_cache" in parameters else {}

    def forward(self, tokens_ST: Tensor) -> Tensor:
        keywords: dict[str, Any] = dict(self.keywords)
        # The library would make one row of positions for all samples, but each device has its own embeddings.
        if self.takes_positions:
            positions = torch.arange(tokens_ST.shape[1], device=tokens_ST.device)
            keywords["position_ids"] = positions.expand_as(tokens_ST)
        logits: Tensor = self.model(input_ids=tokens_ST, **keywords).logits
        return logits


def configured_vocab(name: str) -> int:
    """Return the vocabulary size of a configuration; raises InputError if it has none."""
    _, table = _kind_and_table(name)
    with _library_errors(name):
        vocab = getattr(_configuration_class(name)(**table), "vocab_size", None)
    if not isinstance(vocab, int):
        raise InputError(f"model.name = {name!r}: the configuration has no vocab_size; set model.vocab")
    return vocab


def _no_language_model(name: str, config: Any) -> InputError:
    """Return the refusal of a configuration without a vocabulary: that of several networks, or of another kind."""
    inner = getattr(getattr(config, "text_config", None), "model_type", None)
    advice = f"name the one of text alone: hf:{inner}" if inner else "choose a causal language model"
    return InputError(f"model.name = {name!r}: the configuration has no vocab_size, as of several networks; {advice}")


def build_huggingface(options: HuggingfaceOptions) -> nn.Module:
    """Return the network of a [model] table, with start weights in float32, drawn by the library."""
    transformers, name = _library(options.name), options.name
    kind, (_, table) = _configuration_class(name), _kind_and_table(name)
    with _library_errors(name):
        default = kind()
    given, keys = dict(table), {"vocab_size": options.vocab, **(options.model_extra or {})}
    with _library_errors(name):  # some keys are of single layers, and asking for them is an error
        unknown = [key for key in keys if not hasattr(default, key)]
    if "vocab_size" in unknown:
        raise _no_language_model(name, default)
    for key, value in keys.items():
        if key in unknown:
            known = [k for k in default.to_dict() if not k.startswith("_")]
            raise InputError(f"model.{key} is no key of {name}'s configuration; {near_match(key, known)}")
        given.pop(key, None)
        given[kind.attribute_map.get(key, key)] = value
    with _library_errors(name):
        # All keys at once: sizes of heads, kinds of layers and the like follow from others in the constructor.
        wanted, tokens = kind(**given).to_dict(), list[str]()
        for key, value in wanted.items():
            # Dropout would be drawn outside of the run's seed, so that no run could be repeated.
            if "drop" in key and isinstance(value, int | float) and not isinstance(value, bool):
                given[key] = 0.0
            # Our text has no special tokens, and their default indices lie beyond a small vocabulary.
            if key in ("bos_token_id", "eos_token_id", "pad_token_id") and _reaches(value, options.vocab):
                tokens.append(key)
        model = transformers.AutoModelForCausalLM.from_config(_constructed(kind, given, tokens), dtype=torch.float32)
    network = CausalLanguageModel(model)
    network.takes_positions = network.takes_positions and _counts_from_zero(network, options.context)
    return network


@torch.no_grad()
def _counts_from_zero(network: CausalLanguageModel, context: int) -> bool:
    """Whether positions 0, 1, ... are those that the library takes by itself: RoBERTa's begin behind its padding."""
    tokens, was_training = torch.zeros(1, min(context, 4), dtype=torch.int64), network.training
    results = []
    try:
        for network.takes_positions in (True, False):
            results.append(network.eval()(tokens))
    except Exception:  # the network is run, and its errors are told, when it is traced
        return True
    finally:
        network.train(was_training)
    given, own = results
    return torch.allclose(given, own, rtol=1e-4, atol=1e-5)


def _constructed(kind: Any, given: dict[str, Any], tokens: list[str]) -> Any:
    """Return a configuration without the named special tokens; 0 in their place where the kind insists on numbers."""
    try:
        return kind(**{**given, **dict.fromkeys(tokens)})
    except Exception:  # a library's validation error, for whatever reason: the second attempt tells it
        return kind(**{**given, **dict.fromkeys(tokens, 0)})


def _reaches(tokens: Any, vocab: int) -> bool:
    return any(isinstance(x, int) and not 0 <= x < vocab for x in (tokens if isinstance(tokens, list) else [tokens]))


@contextmanager
def _library_errors(name: str) -> Iterator[None]:
    """Turn what the library raises into an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"model.name = {name!r}: transformers refuses the configuration: {type(error).__name__}: "
            f"{first_line(error)}; change the keys that it names"
        ) from error


_NOT_SHAPES = (
    "model_type", "dtype", "torch_dtype", "auto_map", "quantization_config", "transformers_version",
    "return_dict", "use_return_dict", "torchscript", "output_attentions", "output_hidden_states",
    "output_router_logits",
)  # fmt: skip
"""Keys of a config.json that tell how published weights are stored and loaded, or in which form a call returns its
results: fresh weights are in train.dtype, and calls return logits."""


@lru_cache(maxsize=16)
def _kind_and_table(name: str) -> tuple[str, dict[str, Any]]:
    """Return the kind of model that a network's name leads to, and the keys of its config.json, if it is one."""
    given = name.removeprefix(f"{HUGGINGFACE}:")
    if not given:
        raise InputError(f"model.name = {name!r}: name a kind of model (hf:gpt2) or the path of a config.json")
    path = Path(given)
    if path.suffix != ".json" and not path.exists():
        return given, {}
    table = _table(path / "config.json" if path.is_dir() else path, name)
    return str(table.get("model_type", "")), {key: value for key, value in table.items() if key not in _NOT_SHAPES}


def _configuration_class(name: str) -> Any:
    """Return the library's class of a network's configuration."""
    (kind, _), known = _kind_and_table(name), _library(name).CONFIG_MAPPING
    if kind not in known:
        hint = near_match(kind, known.keys()).partition("known:")[0]  # the library knows hundreds
        if not kind:
            raise InputError(f'model.name = {name!r}: the file has no model_type; add it, as in "model_type": "llama"')
        raise InputError(
            f"model.name = {name!r}: transformers has no model_type {kind!r}; {hint}a kind such as gpt2, llama, "
            "mistral or qwen2, or the path of a config.json"
        )
    if known[kind] not in _library(name).MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"model.name = {name!r}: {kind} is no causal language model in transformers; name a kind such as gpt2, "
            "llama, mistral or qwen2"
        )
    return known[kind]


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
