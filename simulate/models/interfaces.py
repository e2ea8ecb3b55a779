"""Protocols of a network's options, for code that must not import their schemas; torch-free.

simulate.models.schema imports the tracing and building of users' networks (late, inside functions), so these describe
its classes by what they need of them. Data loading does the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:  # plans need no numbers, and numpy's import is a tenth of a plan
    import numpy as np

Unit = Literal["tokens", "samples"]
HUGGINGFACE = "hf"
"""Family of transformers' networks, and with a colon the prefix of their names."""
OF_SAMPLES = "module of samples"
"""Family of users' networks on a data set that is an object."""


IMAGES_HINT = (
    "a network of images says so by its sizes: --set model.classes=10 --set model.image=32 --set model.colours=3"
)
"""Advice where a user's network of images, which has no sizes of images in [model], would get tokens."""


class ReadsText(Protocol):
    """Options of a network of text, as far as its data depends on them."""

    @property
    def context(self) -> int:
        """Tokens of one sample."""

    @property
    def vocab(self) -> int:
        """Number of different tokens."""


class SeesImages(Protocol):
    """Options of a network of images, as far as its data depends on them."""

    @property
    def image(self) -> int:
        """Pixels of an image's side."""

    @property
    def colours(self) -> int:
        """Channels of a pixel."""

    @property
    def classes(self) -> int:
        """Number of classes."""


class LiveSamples(Protocol):
    """A data set that is an object of this process, as far as networks are counted on it."""

    @property
    def inputs(self) -> np.ndarray:
        """Inputs of all samples, one a row."""

    @property
    def targets(self) -> np.ndarray:
        """Targets of all samples, one a row."""

    def check_classes(self, outputs: int) -> None:
        """Raise InputError for integers as targets that are no classes of a network with so many outputs."""


class TakesSamples(Protocol):
    """Options of a network on the samples of a data set that is an object."""

    @property
    def samples(self) -> str:
        """Name of the data set."""


class NetworkOptions(Protocol):
    """Options that every network has."""

    @property
    def name(self) -> str:
        """Name of the network in run.toml."""

    @property
    def family(self) -> str:
        """Tag of the options' schema."""

    @property
    def unit(self) -> Unit:
        """Unit of training progress, which also tells text ("tokens") from images ("samples")."""

    @property
    def units_per_sample(self) -> int:
        """Number of units in one sample."""


class UserNetworkOptions(NetworkOptions, Protocol):
    """Options of a network that a user's factory or the transformers library builds."""

    @property
    def model_extra(self) -> dict[str, Any] | None:
        """Keys of the [model] table that the schema does not know."""

    def keywords(self) -> dict[str, Any]:
        """Return everything that may be passed to the factory."""

    def __hash__(self) -> int:
        """Return a hash of all keys, so that equal options share what was traced."""


class HuggingfaceOptions(UserNetworkOptions, ReadsText, Protocol):
    """Options of a causal language model of the transformers library."""
