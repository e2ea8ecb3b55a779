"""Keys of [method] for signSGD; torch-free."""

from __future__ import annotations

from typing import Literal

from simulate.config.method_options import MethodOptions


class SignsgdOptions(MethodOptions):
    """Signs of gradients, scaled by their mean magnitude, with error feedback (arXiv 1901.09847)."""

    name: Literal["signsgd"] = "signsgd"
