"""Try every causal language model of the installed transformers at a tiny size, and write the list in docs/models.md.

    python -m tests.causal_models              # print each kind with what becomes of it
    python -m tests.causal_models --write      # and write the list between the marks of docs/models.md

A kind is planned, trained for two steps by ddp and by lte, exported, and loaded again by the library. A refusal is an
InputError of one line; anything else that is raised is a mistake of ours. tests/simulate/models/test_causal_models.py
asks for the same of each kind.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections import defaultdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from simulate.common.errors import InputError, first_line
from simulate.config.run import Run, build_run
from simulate.models.huggingface import build_huggingface
from tests import tiny

DOCS = Path(__file__).parents[1] / "docs/models.md"
BEGIN, END = "<!-- causal models: written by python -m tests.causal_models --write -->", "<!-- end of causal models -->"
SIZES = {
    32: ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "moe_intermediate_size",
         "rnn_hidden_size", "lru_width", "attention_hidden_size", "expert_ffn_hidden_size"),
    64: ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "d_inner",
         "shared_expert_intermediate_size", "n_positions", "n_ctx", "max_position_embeddings", "ffn_hidden_size"),
    16: ("q_lora_rank", "kv_lora_rank"),
    8: ("head_dim", "d_head", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "state_size",
        "attention_head_size"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
        "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    2: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
        "num_key_value_heads", "num_experts_per_tok", "moe_topk"),
}  # fmt: skip
"""Small sizes for the keys that configurations have for them."""
CONTEXT, VOCAB, STEPS, LIMIT_S, TRAINED, MISTAKE = 16, 256, 2, 100, "trained", "MISTAKE"


def kinds() -> list[str]:
    """Return the kinds that the library's table of causal language models has."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    return sorted(names)


def run_of(kind: str, method: str) -> Run:
    """Return a run of a kind at tiny sizes, with the keys that its configuration has."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind]
    fields = getattr(config, "__dataclass_fields__", {})
    keys = {
        key: size
        for size, names in SIZES.items()
        for key in names
        if key in fields
        and (isinstance(getattr(config, key, None), int) or key == "num_experts_per_tok")
        # Latent attention has as many heads of values as of queries, and the rotated part's width for a head's.
        and not (key in ("head_dim", "num_key_value_heads") and "kv_lora_rank" in fields)
    }
    if "kv_lora_rank" in fields:
        keys["num_key_value_heads"] = keys["num_attention_heads"]
    if isinstance(getattr(config, "n_group", None), int):
        keys |= {"n_group": 1, "topk_group": 1}
    table = {"name": "lte", "rank": 1, "merge_every": 2} if method == "lte" else {"name": method}
    return build_run(
        {
            "model": {"name": f"hf:{kind}", "context": CONTEXT, "vocab": VOCAB, **keys},
            "data": {"path": "made-up"},
            "method": table,
            "train": {"steps": STEPS, "micro_batch": 1},
            "cluster": {"devices": 2},
        }
    )


def outcome(kind: str) -> str:
    """Return TRAINED, or the line with which a kind is refused."""
    from transformers import AutoModelForCausalLM

    try:
        run = run_of(kind, "lte")
        shape = run.model.shape()
    except InputError as error:
        assert "\n" not in str(error)
        return str(error)
    plain: Any = build_huggingface(run.model)  # type: ignore[arg-type]
    assert shape.all_parameters == sum(p.numel() for p in plain.model.parameters())
    tiny.train(tiny.build(run_of(kind, "ddp")))
    history = tiny.train(tiny.build(run))
    assert history.losses.isfinite().all()
    plain.load_state_dict(history.weights)
    tokens = torch.arange(CONTEXT).view(1, -1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        plain.model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        # As another program calls it, but for the cache, which some kinds have only for generation.
        logits = loaded(tokens, **plain.keywords).logits
        torch.testing.assert_close(logits, plain.eval()(tokens), rtol=1e-4, atol=1e-5)
    return TRAINED


def outcome_in_time(kind: str) -> str:
    """Return `outcome`, from a process of its own that is ended after LIMIT_S."""
    context = torch.multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_send_outcome, args=(kind, sending))
    child.start()
    text = receiving.recv() if receiving.poll(LIMIT_S) else f"not done after {LIMIT_S} s, as these keys leave it large"
    child.kill()
    child.join()
    return str(text)


def _send_outcome(kind: str, sending: Connection) -> None:
    try:
        sending.send(outcome(kind))
    except Exception as error:
        sending.send(f"{MISTAKE} {type(error).__name__}: {first_line(error)}")


def list_text(outcomes: dict[str, str]) -> str:
    """Return the section of docs/models.md."""
    import transformers

    trained = [kind for kind, text in outcomes.items() if text == TRAINED]
    reasons: dict[str, list[str]] = defaultdict(list)
    for kind, text in outcomes.items():
        if text != TRAINED:
            reasons[text.removeprefix(f"model.name = 'hf:{kind}': ").replace("|", "/")].append(f"`{kind}`")
    rows = "\n".join(f"| {', '.join(names)} | {reason} |" for reason, names in sorted(reasons.items()))
    library = f"transformers {transformers.__version__}"
    return (
        f"{BEGIN}\n\nOf {len(outcomes)} kinds of causal language models of {library} that were tried, "
        f"{len(trained)} were planned at a tiny size with the library's own count, trained by ddp and lte, exported "
        f"and loaded again: {', '.join(f'`{kind}`' for kind in trained)}.\n\n"
        f"| refused at that size | with |\n|---|---|\n{rows}\n\n{END}"
    )


def main() -> int:
    """Try all kinds; returns 1 if one raised something else than a refusal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("kinds", nargs="*")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    outcomes = dict[str, str]()
    for kind in arguments.kinds or kinds():
        outcomes[kind] = outcome_in_time(kind)
        print(f"{kind}: {outcomes[kind]}", flush=True)
    if arguments.write:
        text = DOCS.read_text(encoding="utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        DOCS.write_text(f"{before}{list_text(outcomes)}{after}", encoding="utf-8")
    return int(any(text.startswith(MISTAKE) for text in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
