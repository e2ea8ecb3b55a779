"""Conversion of our networks' weights to the names and layouts of the transformers library, for `lte export`.

Other programs then load an export without our code. `hf:` models are the library's own and need no conversion. `lte
export --format hf` (ltecli.commands.export) calls `to_transformers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from simulate.common.errors import InputError
from simulate.models.families.gpt import GptModel
from simulate.models.families.llama import LlamaModel
from simulate.models.gpt import STYLE as GPT_STYLE
from simulate.models.llama import NORM_EPSILON, ROTARY_BASE
from simulate.models.schema import ModelOptions

State = dict[str, Tensor]
Named = Iterator[tuple[str, Tensor]]
_GPT = {
    "norm1": "ln_1", "attention.qkv": "attn.c_attn", "attention.project": "attn.c_proj", "norm2": "ln_2",
    "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}  # fmt: skip
_LLAMA = {
    "norm1": "input_layernorm", "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj", "attention.project": "self_attn.o_proj", "norm2": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip


def to_transformers(model: ModelOptions, state: State) -> tuple[dict[str, Any], State]:
    """Return the library's configuration and weights of a network; raises InputError if the library has no such one."""
    if isinstance(model, GptModel):
        return _gpt_config(model), dict(_gpt(state))
    if isinstance(model, LlamaModel):
        return _llama_config(model), dict(_llama(state))
    raise InputError(f"--format hf has no form for {model.name}; it has for gpt, llama and hf: models, try safetensors")


def _blocks(state: State, names: dict[str, str], prefix: str, change: Callable[[Tensor], Tensor]) -> Named:
    """Yield the blocks' tensors under the library's names, each passed through `change`."""
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)  # blocks.3.attention.qkv.weight
            layer, _, key = rest.rpartition(".")
            yield f"{prefix}.{index}.{names[layer]}.{key}", change(tensor)


def _gpt(state: State) -> Named:
    yield "transformer.wte.weight", state["token.weight"]
    yield "transformer.wpe.weight", state["position.weight"]
    # The library's Conv1D holds its weight as (inputs, outputs).
    yield from _blocks(state, _GPT, "transformer.h", lambda x: x.t() if x.ndim == 2 else x)
    for key in ("weight", "bias"):
        yield f"transformer.ln_f.{key}", state[f"norm.{key}"]


def _gpt_config(model: GptModel) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": model.vocab,
        "n_positions": model.context,
        "n_embd": model.width,
        "n_layer": model.layers,
        "n_head": model.attention_heads,
        "activation_function": "gelu_new",  # the library's name of the tanh approximation
        "layer_norm_epsilon": GPT_STYLE.norm_epsilon,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": True,
        **_NO_SPECIAL_TOKENS,
    }


def _llama(state: State) -> Named:
    yield "model.embed_tokens.weight", state["token.weight"]
    yield from _blocks(state, _LLAMA, "model.layers", lambda x: x)
    yield "model.norm.weight", state["norm.weight"]
    yield "lm_head.weight", state["head.weight"]


def _llama_config(model: LlamaModel) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": model.vocab,
        "max_position_embeddings": model.context,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.attention_heads,
        "num_key_value_heads": model.attention_heads,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPSILON,
        "rope_theta": ROTARY_BASE,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        **_NO_SPECIAL_TOKENS,
    }


_NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""Keys that are set to None: our text has no special tokens, and the default indices exceed a small vocabulary."""
