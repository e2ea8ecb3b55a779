"""The table of families: each name in run.toml leads to the schema of its [model] table; torch-free.

A family is a module beside this one (named sizes, keys, counts), a network in simulate/models/NAME.py, a closed form of
its activations in simulate.costs.activations, and a row here. simulate.config.run validates [model] with `Model`.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Tag

from simulate.common.errors import near_match
from simulate.common.user_code import module_form
from simulate.models.families.gpt import GptModel
from simulate.models.families.llama import LlamaModel
from simulate.models.families.mixer import MixerModel
from simulate.models.families.vit import VitModel
from simulate.models.interfaces import HUGGINGFACE
from simulate.models.schema import (
    FactoryImageModel,
    FactorySampleModel,
    FactoryTextModel,
    Frames,
    HuggingfaceModel,
    ModelOptions,
)

FAMILIES: dict[str, type[ModelOptions]] = {
    schema.family: schema for schema in (GptModel, LlamaModel, VitModel, MixerModel)
}
MODEL_NAMES = tuple(name for schema in FAMILIES.values() for name in schema.sizes)
_SCHEMAS = {
    **FAMILIES,
    **{schema.family: schema for schema in (FactoryTextModel, FactoryImageModel, FactorySampleModel, HuggingfaceModel)},
}


def family_of(name: str) -> str | None:
    """Return the family of a name: a key of FAMILIES, "hf", "module" (module:factory), or None for an unknown name."""
    if name.startswith(f"{HUGGINGFACE}:"):
        return HUGGINGFACE
    if ":" in name:
        return FactoryTextModel.family
    return next((family for family, schema in FAMILIES.items() if name in schema.sizes), None)


def check_name(name: Any) -> None:
    """Raise ValueError for a name that belongs to no family."""
    if not isinstance(name, str):
        raise ValueError(f"model.name = {name!r}: should be a string; known: {', '.join(MODEL_NAMES)}")
    if form := module_form(name):
        raise ValueError(f"model.name = {name!r} is the path to a file; name the module and its class: {form!r}")
    if family_of(name) is None:
        raise ValueError(f"model.name = {name!r} is not a model; {near_match(name, MODEL_NAMES)}")


def _family_of_table(given: Any) -> str:
    """Return the tag of the schema of a [model] table, given as a table or as validated options."""
    if isinstance(given, ModelOptions):
        return given.family
    table = given if isinstance(given, dict) else {}
    name = table.get("name", GptModel.family)
    # An unknown name gets the schema of "gpt", which refuses it; in a run, check_name has refused it before.
    family = (family_of(name) if isinstance(name, str) else None) or GptModel.family
    if family == FactoryTextModel.family and "samples" in table:
        return FactorySampleModel.family
    if family == FactoryTextModel.family and {"image", "colours", "classes"} & table.keys():
        return FactoryImageModel.family
    return family


if TYPE_CHECKING:
    Model = ModelOptions
else:  # the union of all rows, which only pydantic can read
    _tagged = [Annotated[schema, Tag(family)] for family, schema in _SCHEMAS.items()]
    Model = Annotated[reduce(or_, _tagged), Discriminator(_family_of_table)]


def sees_images(model: dict[str, Any]) -> bool:
    """Whether a [model] table describes a network of images."""
    return issubclass(_SCHEMAS[_family_of_table(model)], Frames)
