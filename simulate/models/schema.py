"""Schemas of the [model] table of run.toml: the keys that families share, and networks from users; torch-free.

simulate.config.run validates the table with them, and everything else reads a network's sizes and counts from the
result. Each family of ours has its schema in simulate/models/families. Tracing and building of users' networks are
imported inside functions only: they need torch, and take these options by simulate.models.interfaces.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, ClassVar, cast

from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from simulate.common import toml_io
from simulate.layers.formats import Convolutions
from simulate.models.interfaces import HUGGINGFACE, OF_SAMPLES, ReadsText, Unit
from simulate.models.shapes import ModelShape

Size = Annotated[int, Field(gt=0)]
Sizes = dict[str, int]
"""Keys of the [model] table that a name stands for."""
UNSET: Any = Field(default=0, gt=0)
"""Default of a size; `_fill_sizes` puts the name's own size in its place, and a name without one fails `gt=0`."""


class ModelOptions(toml_io.Schema):
    """Keys and properties of all networks."""

    name: str
    family: ClassVar[str]
    """Tag of the schema in the union of simulate.models.families.table."""
    sizes: ClassVar[dict[str, Sizes]] = {}
    """Sizes of the family's names."""

    @model_validator(mode="before")
    @classmethod
    def _fill_sizes(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("name", cls.model_fields["name"].default)
        # Given keys come last, so that they override the name's sizes.
        return {"name": name, **cls.sizes.get(name, {}), **given}

    @property
    def unit(self) -> Unit:
        """Unit of training progress."""
        return "tokens"

    @property
    @abstractmethod
    def units_per_sample(self) -> int:
        """Number of units in one sample."""

    @property
    @abstractmethod
    def larger_with(self) -> str:
        """Key on which a sample's activations depend most, with its value, for hints."""

    @abstractmethod
    def shape(self) -> ModelShape:
        """Return the network's counts."""


class Blocks(ModelOptions):
    """Keys of networks of equal blocks."""

    layers: int = Field(default=0, gt=0, le=1000)
    """Number of blocks."""
    width: Size = UNSET


class Attends(Blocks):
    """Keys of networks with attention."""

    attention_heads: Size = UNSET

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Attends:
        if self.width % self.attention_heads:
            raise ValueError(
                f"width = {self.width} is not divisible by attention_heads = {self.attention_heads}; change one of them"
            )
        return self


class Reads(ModelOptions):
    """Keys of networks of text."""

    context: Size = UNSET
    """Tokens of one sample."""
    vocab: Size = UNSET
    """Number of different tokens."""

    @property
    def units_per_sample(self) -> int:
        return self.context

    @property
    def larger_with(self) -> str:
        return f"model.context (now {self.context})"


class CountsSamples(ModelOptions):
    """Base of networks whose progress counts samples, not tokens."""

    @property
    def unit(self) -> Unit:
        return "samples"

    @property
    def units_per_sample(self) -> int:
        return 1


class Frames(CountsSamples):
    """Keys of networks of images."""

    image: Size = UNSET
    """Pixels of an image's side."""
    colours: Size = UNSET
    """Channels of a pixel."""
    classes: Size = UNSET

    @property
    def larger_with(self) -> str:
        return f"model.image (now {self.image})"


class Sees(Frames):
    """Keys of networks of images that are cut into patches."""

    patch: Size = UNSET
    """Pixels of a patch's side."""

    @model_validator(mode="after")
    def _patches_tile_the_image(self) -> Sees:
        if self.image % self.patch:
            raise ValueError(f"image = {self.image} is not divisible by patch = {self.patch}; change one of them")
        return self


OF_THE_RUN = ("name", "loss", "samples")
"""Keys of a user's network that say how it is found and trained, and are none of the factory's."""
_SHAPE_LOADED: ContextVar[ModelShape | None] = ContextVar("_SHAPE_LOADED", default=None)


@contextmanager
def shape_loaded(shape: ModelShape | None) -> Iterator[None]:
    """Give networks of users that are built inside the shape that a run folder has, so that none is imported."""
    # A variable of the context, since rules ask for the shape while pydantic builds the options.
    token = _SHAPE_LOADED.set(shape)
    try:
        yield
    finally:
        _SHAPE_LOADED.reset(token)


class FactoryModel(ModelOptions):
    """Options of a network from the user's module:factory, which is called with the keys that it has parameters for.

    Keys that the schema does not know go to the factory too.
    """

    family: ClassVar[str] = "module"
    name: str
    loss: str | None = None
    """package.module:function of (outputs, targets), the mean loss of a batch or a loss for each sample; not set:
    cross-entropy."""

    @model_validator(mode="after")
    def _extra_keys_are_plain(self) -> FactoryModel:
        for key, value in (self.model_extra or {}).items():
            if not isinstance(value, int | float | str | bool):
                raise ValueError(
                    f"{key} = {value!r}: a factory takes numbers, strings and booleans; correct this value"
                )
        return self

    def keywords(self) -> dict[str, Any]:
        """Return everything that may be passed to the factory."""
        return {key: value for key, value in self.model_dump().items() if key not in OF_THE_RUN}

    _stored_shape: ModelShape | None = PrivateAttr(default_factory=lambda: _SHAPE_LOADED.get())

    def shape(self, convolutions: Convolutions = "lora") -> ModelShape:
        if self._stored_shape is not None:
            return self._stored_shape
        from simulate.models.tracing import traced_shape  # imports torch, and later the user's module

        return traced_shape(self, convolutions)


class FactoryTextModel(FactoryModel, Reads):
    """Options of a user's network from tokens (S, context) to logits (S, context, vocab)."""

    model_config = ConfigDict(extra="allow")

    context: int = Field(default=128, gt=0)
    vocab: int = Field(default=256, gt=0)


class FactoryImageModel(FactoryModel, Frames):
    """Options of a user's network from images (S, colours, image, image) to logits (S, classes)."""

    model_config = ConfigDict(extra="allow")

    family: ClassVar[str] = "module of images"
    image: int = Field(default=32, gt=0)
    colours: int = Field(default=3, gt=0)
    classes: int = Field(gt=0)


class FactorySampleModel(FactoryModel, CountsSamples):
    """Options of a user's network on samples of any shape, those of a data set that is an object in Python."""

    model_config = ConfigDict(extra="allow")

    family: ClassVar[str] = OF_SAMPLES
    samples: str
    """Name of the data set; the network is counted on its samples."""

    @property
    def larger_with(self) -> str:
        return f"model.samples (now {self.samples})"


class HuggingfaceModel(FactoryModel, Reads):
    """Options of a causal language model of the transformers library, built from a configuration with fresh weights.

    The name is `hf:` and the path of a config.json or a kind of model ("hf:gpt2"); further keys change the
    configuration.
    """

    model_config = ConfigDict(extra="allow")

    family: ClassVar[str] = HUGGINGFACE
    context: int = Field(default=128, gt=0)
    vocab: int = Field(default=0, gt=0)
    """Number of different tokens; the configuration's, if not given."""

    @model_validator(mode="before")
    @classmethod
    def _vocab_of_configuration(cls, given: Any) -> Any:
        if isinstance(given, dict) and "vocab" not in given and isinstance(name := given.get("name"), str):
            from simulate.models.huggingface import configured_vocab  # reads a file, or imports transformers

            return {**given, "vocab": configured_vocab(name)}
        return given


def text_sizes(model: ModelOptions) -> ReadsText:
    """Return the options of a network of text, typed as such."""
    assert model.unit == "tokens", f"{model.name} reads no text"
    return cast(ReadsText, model)
