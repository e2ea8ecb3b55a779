"""Keys of [method] for LoRA; torch-free."""

from __future__ import annotations

from typing import Literal

from simulate.config.method_options import SharedAdapterOptions


class LoraOptions(SharedAdapterOptions):
    """LoRA (arXiv 2106.09685) under data parallelism: one adapter, never merged."""

    name: Literal["lora"] = "lora"
