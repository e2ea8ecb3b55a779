"""Part `keys`: keys of run.toml, of profiles and of JSON outputs. None may go; new ones may come.

A renamed key of run.toml counts as kept if the old name is an alias of the new one's field. Schemas are found by what
they hold, not by where they are. Kinds of events that only launched runs have are not seen here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, get_args

from pydantic import AliasChoices, BaseModel

from tests.frozen.command import lte, scratch_folder
from tests.frozen.plans import NOTHING_FEASIBLE
from tests.frozen.runs import LTE, PACED, VIT, read_events, run, write_run

Keys = dict[str, list[str]]
RUN_TABLES = {"model", "data", "method", "train", "cluster"}
PROFILE_TABLES = {"device", "link"}
TRAINED = {
    "lte": run({**LTE, **PACED}, train={"diagnostics_every": 8}),
    "images": run({"name": "ddp"}, VIT),
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "plan": ("plan", "-p", "v100_x8", "-m", "gpt", "--why", "--timeline", "--rounds", "20", "--verify"),
    "plan of other hardware": ("plan", "-p", "jetson_orin_nano_x8_wifi", "-m", "gpt2", "--method", "lte"),
    "plan that does not fit": ("plan", "-p", "raspberry_x8", "-m", "llama_7b"),
    "profile list": ("profile", "list"),
    "profile show": ("profile", "show", "rtx3060_x4_home"),
    "probe": ("probe", "run.toml", "--batches", "2", "--warmup", "2", "--device", "cpu", "--quiet"),
    "report": ("report", "lte"),
    "report of images": ("report", "images"),
    "report of several": ("report", "lte", "images"),
    "export": ("export", "lte"),
}


def record(pool: Executor) -> Any:
    """Return all keys, as sorted lists."""
    return pool.submit(all_keys).result()


def check(recorded: Any, pool: Executor) -> list[str]:
    """Return the recorded keys that are gone."""
    return list(missing(recorded, record(pool)))


def missing(recorded: Any, now: Any) -> Iterator[str]:
    """Yield recorded keys that are gone; of schemas without a name, one that has most of the keys is looked at."""
    for document, tables in recorded["documents"].items():
        gone = sorted(set(tables) - set(now["documents"].get(document, ())))
        yield from (f"{document} has no {key}" for key in gone)
    for place, branches in recorded["schemas"].items():
        for keys in branches:
            gone_from = [set(keys) - set(other) for other in now["schemas"].get(place, [])]
            gone = sorted(min(gone_from, key=len, default=set(keys)))
            yield from (f"{place} has no {key}, which stood beside {', '.join(keys[:6])}" for key in gone)


def all_keys() -> dict[str, Any]:
    """Call the commands, in a worker, and return all keys."""
    with scratch_folder() as folder:
        documents = documents_of(folder)
    schemas: dict[str, list[list[str]]] = {}
    for name, wanted in (("run", RUN_TABLES), ("profile", PROFILE_TABLES)):
        for place, keys in _tables(_schema_with(wanted), name):
            branches = schemas.setdefault(place, [])
            branches += [keys] if keys not in branches else []
    return {"documents": documents, "schemas": {place: sorted(found) for place, found in sorted(schemas.items())}}


def documents_of(folder: Path) -> Keys:
    """Return the keys of everything that commands print as JSON and of what run folders hold."""
    found: Keys = {}
    for name, table in TRAINED.items():
        write_run(folder / "run.toml", table)
        arguments = ("train", "run.toml", "--out", name, "--device", "cpu", "--json")
        found[f"train {name}"] = _sorted_paths(lte(*arguments).json())
        found[f"folder of {name}"] = sorted(
            {_without_numbers(p.relative_to(folder / name)) for p in (folder / name).rglob("*") if p.is_file()}
        )
        for event in read_events(folder / name):
            kind = f"event {event['kind']} of {name}"
            found[kind] = sorted(set(found.get(kind, ())) | set(_sorted_paths(event)))
    write_run(folder / "run.toml", TRAINED["lte"] | {"method": LTE})
    for name, arguments in COMMANDS.items():
        found[name] = _sorted_paths(lte(*arguments, "--json", expected=(0, NOTHING_FEASIBLE)).json())
    return found


def _without_numbers(place: Path) -> str:
    """Return a file's place in a run folder, without what differs from run to run."""
    return "tensorboard" if "tfevents" in place.name else re.sub(r"\d+", "N", str(place))


def _sorted_paths(document: Any) -> list[str]:
    return sorted(set(_paths(document)))


def _paths(value: Any, where: str = "") -> Iterator[str]:
    """Yield the dotted places of all keys; entries of a list have one place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            place = f"{where}.{key}" if where else str(key)
            yield place
            yield from _paths(inner, place)
    elif isinstance(value, list):
        for inner in value:
            yield from _paths(inner, f"{where}[]")


def _schema_with(tables: set[str]) -> type[BaseModel]:
    """Return the one schema that has all of these tables and inherits them from no other; commands have imported it."""
    having = {schema for schema in _below(BaseModel) if tables <= schema.model_fields.keys()}
    found = {schema for schema in having if not having & set(schema.__mro__[1:])}
    assert len(found) == 1, f"schemas with {sorted(tables)}: {found or 'none'}"
    return found.pop()


def _below(schema: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for other in schema.__subclasses__():
        yield other
        yield from _below(other)


def _tables(schema: type[BaseModel], place: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every table's place and keys; a place that several schemas can take comes several times."""
    keys = set()
    for name, field in schema.model_fields.items():
        aliases = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else []
        keys |= {name, *(alias for alias in (*aliases, field.validation_alias) if isinstance(alias, str))}
        for inner in _schemas_in(field.annotation):
            yield from _tables(inner, f"{place}.{name}")
    yield place, sorted(keys)


def _schemas_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the schemas that a field can take: those it names, and those that inherit from them, as methods do."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        yield from _below(annotation)
    for argument in get_args(annotation):
        yield from _schemas_in(argument)
