"""Exceptions that end the program with one line instead of a traceback; ltecli.errors maps each to an exit code."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class InputError(Exception):
    """User's mistake, reported in one line that names the field, the value, the rule and the next move.

    Several mistakes of one kind, as keys that are missing, are a line each.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


class RunFailedError(Exception):
    """Failure of a run that had begun (a full disk, a loss that is not finite); its text says what is saved."""


class LostPeerError(RunFailedError):
    """Failure or timeout of an exchange, because a process or a link is gone. The run can be restarted."""


FIRST_LINE_CHARACTERS = 300


def first_line(error: BaseException) -> str:
    """Return an error's message on one line, cut to FIRST_LINE_CHARACTERS, without torch's source places and advice."""
    text = " ".join(str(error).split()).partition(" Exception raised from ")[0].partition(" This is typically")[0]
    return re.sub(r"\[[^\]]*/gloo/[^\]]*\] ", "", text)[:FIRST_LINE_CHARACTERS]


OTHER_NAMES = {
    "merge_every": ("t", "h", "tau", "local_steps", "sync_every", "inner_steps", "outer_every"),
    "rank": ("r", "lora_r", "lora_rank"),
    "alpha": ("lora_alpha",),
    "learning_rate": ("lr", "max_lr", "peak_lr"),
    "micro_batch": ("batch", "batch_size", "bs", "micro_batch_size", "per_device_train_batch_size"),
    "steps": ("epochs", "num_epochs", "max_steps", "max_iters", "iterations", "num_train_epochs"),
    "warmup_steps": ("warmup", "warmup_iters", "warmup_ratio"),
    "clip_norm": ("grad_clip", "max_grad_norm", "gradient_clip_val", "clip"),
    "weight_decay": ("wd",),
    "activation_checkpointing": ("gradient_checkpointing",),
    "autocast": ("precision", "mixed_precision", "amp", "bf16", "fp16"),
    "evaluate_every": ("eval_every", "eval_interval", "eval_steps"),
    "checkpoint_every": ("save_every", "save_steps", "save_interval"),
    "context": ("seq_len", "sequence_length", "block_size", "max_seq_len", "context_length"),
    "vocab": ("vocab_size",),
    "layers": ("n_layer", "num_layers", "num_hidden_layers", "depth"),
    "width": ("n_embd", "d_model", "hidden_size", "dim", "embed_dim"),
    "attention_heads": ("n_head", "num_heads", "num_attention_heads", "heads"),
    "classes": ("num_classes",),
    "image": ("image_size", "img_size"),
    "colours": ("channels", "in_chans", "in_channels", "colors"),
    "on_event": ("callback", "callbacks"),
    "devices": ("world_size", "num_devices", "n_devices", "workers", "num_workers"),
}
"""Names of other tools for keys of ours: of peft, transformers, nanoGPT, timm, DiLoCo and the LTE paper."""


def ours_for(given: str) -> list[str]:
    """Return our names for what other tools call so."""
    return [ours for ours, others in OTHER_NAMES.items() if given.lower() in others]


def near_match(given: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the closest known one, if any is close, and the list of known ones."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    # A typo in a short name changes half of its letters: accept that if the first letter is right.
    close = close or difflib.get_close_matches(given, [x for x in names if x[:1] == given[:1]], n=1, cutoff=0.5)
    # Before the letters: a name of another tool may look like a wrong one of ours.
    close = [name for name in ours_for(given) if name in names] or close
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


class NothingFeasibleError(Exception):
    """Failure of a plan: no candidate fits the hardware. Its text names the nearest miss and how to make it fit."""
