"""Other installed estimators' figures for dense AdamW training, beside the plan and the followed peak.

python bench/studies/peers.py --models gpt2 gpt2_medium

Each is asked as its users would: accelerate's `estimate-memory` figure for training with Adam (four times the weights),
DeepSpeed's ZeRO estimators without offloading on one GPU, llm-analysis's training analysis of the network's sizes. They
may lie beside the project:

    pip install --no-deps --target PEERS llm-analysis fire termcolor
    PYTHONPATH=PEERS python bench/studies/peers.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
from collections.abc import Callable
from importlib.util import find_spec

from simulate.config.run import Run, build_run
from simulate.measure.accuracy import planned_bytes
from simulate.measure.fake_tensors import tracked_memory


def accelerate_bytes(run: Run) -> float:
    """Return accelerate's figure for training with Adam in float32."""
    from accelerate.commands.estimate import estimate_training_usage  # type: ignore[import-not-found]

    usage = estimate_training_usage(4 * run.model.shape().parameters, "float32")
    return float(max(usage.values()))


def zero2_bytes(run: Run) -> float:
    """Return DeepSpeed's figure for ZeRO stage 2 on one GPU without offloading: mixed precision, no activations."""
    with contextlib.redirect_stdout(io.StringIO()):
        from deepspeed.runtime.zero.stage_1_and_2 import (  # type: ignore[import-not-found]
            estimate_zero2_model_states_mem_needs,
        )

    _, gpu_bytes = estimate_zero2_model_states_mem_needs(
        run.model.shape().parameters, num_gpus_per_node=1, num_nodes=1, cpu_offload=False, additional_buffer_factor=1.0
    )
    return float(gpu_bytes)


ROOMY_GB = 10**6
"""So that no estimate is cut to what a GPU has."""
LLM_ANALYSIS_TOTALS = ("estimated_peak_memory_per_gpu", "(weight+op_state+grad+act)_memory_per_gpu")
"""As its repository calls the whole, and release 0.2.2."""


def llm_analysis_bytes(run: Run) -> float:
    """Return llm-analysis's peak on one GPU: 16-bit weights and activations, Adam's state and gradients in float32."""
    from llm_analysis.analysis import LLMAnalysis  # type: ignore[import-not-found]
    from llm_analysis.config import GPUConfig, ModelConfig  # type: ignore[import-not-found]

    shape = run.model.shape()
    model = ModelConfig(
        name=shape.name, num_layers=shape.layers, n_head=shape.attention_heads, hidden_dim=shape.width,
        vocab_size=shape.outputs, max_seq_len=shape.tokens, ffn_embed_dim=shape.mlp_width,
    )  # fmt: skip
    gpu = GPUConfig("any", ROOMY_GB, 1000, 100, 1e-5, 100)  # rates, which only times go by
    logging.disable(logging.WARNING)
    try:
        summary = LLMAnalysis(model, gpu).training(batch_size_per_gpu=run.train.micro_batch, seq_len=shape.tokens)
    finally:
        logging.disable(logging.NOTSET)
    return float(next(summary[key] for key in LLM_ANALYSIS_TOTALS if key in summary))


PEERS: dict[str, tuple[str, Callable[[Run], float]]] = {
    "accelerate estimate-memory": ("accelerate", accelerate_bytes),
    "DeepSpeed ZeRO-2": ("deepspeed", zero2_bytes),
    "llm-analysis": ("llm_analysis", llm_analysis_bytes),
}


def main() -> None:
    """Print one line a model and estimator: its figure, and how far that is from the followed peak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gpt2", "gpt2_medium", "llama_1b"])
    parser.add_argument("--micro-batch", type=int, default=1)
    arguments = parser.parse_args()
    for name in arguments.models:
        run = build_run(
            {
                "model": {"name": name},
                "method": {"name": "ddp"},
                "train": {"micro_batch": arguments.micro_batch},
                "cluster": {"devices": 1},
            }
        )
        tracked = tracked_memory(run, with_host=False).tracked_bytes
        print(f"{name:12} {'followed':28} {tracked / 1e9:8.3f} GB")
        figures = {"lte plan": float(planned_bytes(run))}
        for peer, (package, ask) in PEERS.items():
            if find_spec(package) is None:
                print(f"{name:12} {peer:28} not installed")
                continue
            try:
                figures[peer] = ask(run)
            except (ImportError, AttributeError, OSError, RuntimeError) as error:
                print(f"{name:12} {peer:28} does not run here: {type(error).__name__}: {str(error)[:120]}")
        for peer, num_bytes in figures.items():
            print(f"{name:12} {peer:28} {num_bytes / 1e9:8.3f} GB {num_bytes / tracked - 1:+8.2%}", flush=True)


if __name__ == "__main__":
    main()
