"""The properties of a network's options that others rely on, as protocols; torch-free."""

from __future__ import annotations

from typing import Literal, Protocol

Unit = Literal["tokens", "samples"]


class ReadsText(Protocol):
    """What data of text must fit."""

    @property
    def context(self) -> int:
        """Tokens of one sample."""

    @property
    def vocab(self) -> int:
        """Number of tokens there are."""


class SeesImages(Protocol):
    """What data of images must fit."""

    @property
    def image(self) -> int:
        """Pixels of an image's side."""

    @property
    def colours(self) -> int:
        """Numbers of a pixel."""

    @property
    def classes(self) -> int:
        """Kinds of images."""
