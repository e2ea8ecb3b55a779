"""Sizes of every network that has a name, with their sources; torch-free."""

from __future__ import annotations

from simulate.models.interfaces import HUGGINGFACE

Sizes = dict[str, int]
"""Keys of the [model] table that a name stands for."""
_IMAGENET: Sizes = {"image": 224, "patch": 16, "colours": 3, "classes": 1000}

GPT_SIZES: dict[str, Sizes] = {
    # The default: small enough to train on a laptop in a minute, with a vocabulary of bytes.
    "gpt": {"layers": 4, "width": 128, "attention_heads": 4, "context": 128, "vocab": 256},
    # LTE's miniGPT for Shakespeare (arXiv 2402.16828, table 4), whose vocabulary is 65 characters there, bytes here.
    "minigpt": {"layers": 6, "width": 384, "attention_heads": 6, "context": 256, "vocab": 256},
    # Radford et al. 2019, table 2, with the published vocabulary and context.
    "gpt2": {"layers": 12, "width": 768, "attention_heads": 12, "context": 1024, "vocab": 50257},
    "gpt2_medium": {"layers": 24, "width": 1024, "attention_heads": 16, "context": 1024, "vocab": 50257},
    "gpt2_large": {"layers": 36, "width": 1280, "attention_heads": 20, "context": 1024, "vocab": 50257},
    "gpt2_xl": {"layers": 48, "width": 1600, "attention_heads": 25, "context": 1024, "vocab": 50257},
}
LLAMA_SIZES: dict[str, Sizes] = {
    # As small as gpt, for the same bytes.
    "llama": {"layers": 4, "width": 128, "attention_heads": 4, "mlp_width": 352, "context": 128, "vocab": 256},
    # The networks that ReLoRA (arXiv 2307.05695) and GaLore (arXiv 2403.03507) pre-train, at the latter's 256 tokens.
    "llama_60m": {
        "layers": 8, "width": 512, "attention_heads": 8, "mlp_width": 1376, "context": 256, "vocab": 32000,
    },
    "llama_1b": {
        "layers": 24, "width": 2048, "attention_heads": 32, "mlp_width": 5461, "context": 256, "vocab": 32000,
    },
    # Touvron et al. 2023 (arXiv 2302.13971), table 2.
    "llama_7b": {
        "layers": 32, "width": 4096, "attention_heads": 32, "mlp_width": 11008, "context": 2048, "vocab": 32000,
    },
}  # fmt: skip
VIT_SIZES: dict[str, Sizes] = {
    # For images of 32 pixels, such as CIFAR's.
    "vit": {
        "layers": 6, "width": 192, "attention_heads": 3, "image": 32, "patch": 4, "colours": 3, "classes": 10,
    },
    # Dosovitskiy et al. 2021 (arXiv 2010.11929), table 1; S: Touvron et al. 2021 (arXiv 2012.12877), table 1.
    "vit_s16": {"layers": 12, "width": 384, "attention_heads": 6, **_IMAGENET},
    "vit_s32": {"layers": 12, "width": 384, "attention_heads": 6, **_IMAGENET, "patch": 32},
    "vit_b16": {"layers": 12, "width": 768, "attention_heads": 12, **_IMAGENET},
    "vit_b32": {"layers": 12, "width": 768, "attention_heads": 12, **_IMAGENET, "patch": 32},
    "vit_l16": {"layers": 24, "width": 1024, "attention_heads": 16, **_IMAGENET},
    "vit_l32": {"layers": 24, "width": 1024, "attention_heads": 16, **_IMAGENET, "patch": 32},
}  # fmt: skip
MIXER_SIZES: dict[str, Sizes] = {
    # Tolstikhin et al. 2021 (arXiv 2105.01601), table 1; T: Huh et al. 2024 (arXiv 2402.16828), table 3, at patch 32.
    # The published 8.8M parameters imply a token width of half the channels', as in S and B.
    "mixer_t16": {"layers": 6, "width": 384, "tokens_width": 192, "channels_width": 1536, **_IMAGENET},
    "mixer_t32": {"layers": 6, "width": 384, "tokens_width": 192, "channels_width": 1536, **_IMAGENET, "patch": 32},
    "mixer_s16": {"layers": 8, "width": 512, "tokens_width": 256, "channels_width": 2048, **_IMAGENET},
    "mixer_s32": {"layers": 8, "width": 512, "tokens_width": 256, "channels_width": 2048, **_IMAGENET, "patch": 32},
    "mixer_b16": {"layers": 12, "width": 768, "tokens_width": 384, "channels_width": 3072, **_IMAGENET},
    "mixer_b32": {"layers": 12, "width": 768, "tokens_width": 384, "channels_width": 3072, **_IMAGENET, "patch": 32},
}
FAMILIES: dict[str, dict[str, Sizes]] = {
    "gpt": GPT_SIZES, "llama": LLAMA_SIZES, "vit": VIT_SIZES, "mixer": MIXER_SIZES,
}  # fmt: skip
MODEL_NAMES = tuple(name for sizes in FAMILIES.values() for name in sizes)


def family_of(name: str) -> str | None:
    """Return the family of a name: a key of FAMILIES, "hf", "module" (module:factory), or None for an unknown name."""
    if name.startswith(f"{HUGGINGFACE}:"):
        return HUGGINGFACE
    if ":" in name:
        return "module"
    return next((family for family, sizes in FAMILIES.items() if name in sizes), None)
