"""Schemas of the [model] table of run.toml, one for each family of networks; torch-free.

simulate.config.run validates the table with them, and everything else reads a network's sizes and counts from the
result. Sizes that are not given come from the name's entry in simulate.models.sizes. Tracing and building of users'
networks are imported inside functions only: they need torch, and take these options by simulate.models.interfaces.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, cast

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from simulate.common import toml_io
from simulate.common.errors import near_match
from simulate.models.families import gpt_shape, llama_shape, mixer_shape, vit_shape
from simulate.models.interfaces import HUGGINGFACE, ReadsText, Unit
from simulate.models.shapes import ModelShape
from simulate.models.sizes import FAMILIES, MODEL_NAMES, family_of

Size = Annotated[int, Field(gt=0)]


_UNSET: Any = Field(default=0, gt=0)
"""Default of a size; `_fill_sizes` puts the name's own size in its place, and a name without one fails `gt=0`."""


class ModelOptions(toml_io.Schema):
    """Keys and properties of all networks."""

    name: str
    family: ClassVar[str]
    """Tag of the schema in the union `Model`."""

    @model_validator(mode="before")
    @classmethod
    def _fill_sizes(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("name", cls.model_fields["name"].default)
        # Given keys come last, so that they override the name's sizes.
        return {"name": name, **FAMILIES.get(cls.family, {}).get(name, {}), **given}

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


class _Blocks(ModelOptions):
    layers: int = Field(default=0, gt=0, le=1000)
    """Number of blocks."""
    width: Size = _UNSET


class _Attends(_Blocks):
    attention_heads: Size = _UNSET

    @model_validator(mode="after")
    def _heads_divide_width(self) -> _Attends:
        if self.width % self.attention_heads:
            raise ValueError(
                f"width = {self.width} is not divisible by attention_heads = {self.attention_heads}; change one of them"
            )
        return self


class _Reads(ModelOptions):
    context: Size = _UNSET
    """Tokens of one sample."""
    vocab: Size = _UNSET
    """Number of different tokens."""

    @property
    def units_per_sample(self) -> int:
        return self.context

    @property
    def larger_with(self) -> str:
        return f"model.context (now {self.context})"


class GptModel(_Reads, _Attends):
    """Options of a GPT-2 shaped decoder."""

    family: ClassVar[str] = "gpt"
    name: str = "gpt"

    def shape(self) -> ModelShape:
        return gpt_shape(self.name, self.layers, self.width, self.attention_heads, self.context, self.vocab)


class LlamaModel(_Reads, _Attends):
    """Options of a Llama shaped decoder."""

    family: ClassVar[str] = "llama"
    name: str = "llama"
    mlp_width: Size = _UNSET
    """Inner width of the gated MLP."""

    @model_validator(mode="after")
    def _positions_rotate_in_pairs(self) -> LlamaModel:
        if (self.width // self.attention_heads) % 2:
            raise ValueError(
                f"width / attention_heads = {self.width // self.attention_heads} is odd, and rotary positions rotate "
                "pairs of numbers; change one of them"
            )
        return self

    def shape(self) -> ModelShape:
        return llama_shape(
            self.name, self.layers, self.width, self.attention_heads, self.mlp_width, self.context, self.vocab
        )


class _Frames(ModelOptions):
    image: Size = _UNSET
    """Pixels of an image's side."""
    colours: Size = _UNSET
    """Channels of a pixel."""
    classes: Size = _UNSET

    @property
    def unit(self) -> Unit:
        return "samples"

    @property
    def units_per_sample(self) -> int:
        return 1

    @property
    def larger_with(self) -> str:
        return f"model.image (now {self.image})"


class _Sees(_Frames):
    patch: Size = _UNSET
    """Pixels of a patch's side."""

    @model_validator(mode="after")
    def _patches_tile_the_image(self) -> _Sees:
        if self.image % self.patch:
            raise ValueError(f"image = {self.image} is not divisible by patch = {self.patch}; change one of them")
        return self


class VitModel(_Sees, _Attends):
    """Options of a Vision Transformer."""

    family: ClassVar[str] = "vit"
    name: str = "vit"

    def shape(self) -> ModelShape:
        return vit_shape(
            self.name, self.layers, self.width, self.attention_heads, self.image, self.patch, self.colours, self.classes
        )


class MixerModel(_Sees, _Blocks):
    """Options of an MLP-Mixer."""

    family: ClassVar[str] = "mixer"
    name: str = "mixer_s16"
    tokens_width: Size = _UNSET
    """Inner width of the MLP over tokens."""
    channels_width: Size = _UNSET
    """Inner width of the MLP over channels."""

    def shape(self) -> ModelShape:
        return mixer_shape(
            self.name, self.layers, self.width, self.tokens_width, self.channels_width, self.image, self.patch,
            self.colours, self.classes,
        )  # fmt: skip


class FactoryModel(ModelOptions):
    """Options of a network from the user's module:factory, which is called with the keys that it has parameters for.

    Keys that the schema does not know go to the factory too.
    """

    family: ClassVar[str] = "module"
    name: str

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
        return {key: value for key, value in self.model_dump().items() if key != "name"}

    def shape(self) -> ModelShape:
        from simulate.models.tracing import traced_shape  # imports torch, and later the user's module

        return traced_shape(self)


class FactoryTextModel(FactoryModel, _Reads):
    """Options of a user's network from tokens (S, context) to logits (S, context, vocab)."""

    model_config = ConfigDict(extra="allow")

    context: int = Field(default=128, gt=0)
    vocab: int = Field(default=256, gt=0)


class FactoryImageModel(FactoryModel, _Frames):
    """Options of a user's network from images (S, colours, image, image) to logits (S, classes)."""

    model_config = ConfigDict(extra="allow")

    family: ClassVar[str] = "module of images"
    image: int = Field(default=32, gt=0)
    colours: int = Field(default=3, gt=0)
    classes: int = Field(gt=0)


class HuggingfaceModel(FactoryModel, _Reads):
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


def check_name(name: Any) -> None:
    """Raise ValueError for a name that belongs to no family."""
    if not isinstance(name, str):
        raise ValueError(f"model.name = {name!r}: should be a string; known: {', '.join(MODEL_NAMES)}")
    if family_of(name) is None:
        raise ValueError(f"model.name = {name!r} is not a model; {near_match(name, MODEL_NAMES)}")


def _family_of_table(given: Any) -> str:
    """Return the tag of the schema of a [model] table, given as a table or as validated options."""
    if isinstance(given, ModelOptions):
        return given.family
    table = given if isinstance(given, dict) else {}
    name = table.get("name", "gpt")
    # An unknown name gets the schema of "gpt", which refuses it; in a run, check_name has refused it before.
    family = (family_of(name) if isinstance(name, str) else None) or "gpt"
    return FactoryImageModel.family if family == "module" and {"image", "colours", "classes"} & table.keys() else family


Model = Annotated[
    Annotated[GptModel, Tag("gpt")]
    | Annotated[LlamaModel, Tag("llama")]
    | Annotated[VitModel, Tag("vit")]
    | Annotated[MixerModel, Tag("mixer")]
    | Annotated[FactoryTextModel, Tag("module")]
    | Annotated[FactoryImageModel, Tag("module of images")]
    | Annotated[HuggingfaceModel, Tag(HUGGINGFACE)],
    Discriminator(_family_of_table),
]


def sees_images(model: dict[str, Any]) -> bool:
    """Whether a [model] table describes a network of images."""
    return _family_of_table(model) in (VitModel.family, MixerModel.family, FactoryImageModel.family)


def text_sizes(model: ModelOptions) -> ReadsText:
    """Return the options of a network of text, typed as such."""
    assert model.unit == "tokens", f"{model.name} reads no text"
    return cast(ReadsText, model)
