"""Reads TOML, validates it against pydantic schemas, and writes it; errors name file, line and key.

run.toml, hardware profiles and probe files all pass through here, so that a mistake in any of them is reported
in the same form: file and line, key, value, rule, next move. simulate.config, simulate.models.schema and the command
line call this.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from simulate.common.encodings import read_text
from simulate.common.errors import InputError, near_match, ours_for

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
if TYPE_CHECKING:
    from typing_extensions import Self

Table = dict[str, Any]
SchemaT = TypeVar("SchemaT", bound="Schema")
UNIONS = ("model",)
"""Tables that are tagged unions: their `name` decides which other keys they have."""
LARGEST_INTEGER = 2**63 - 1
"""Largest integer of TOML. Costs computed from larger ones would also overflow a float."""


class Schema(BaseModel):
    """Base of frozen, strict tables, which refuse unknown keys, strings for numbers, NaN and infinity."""

    # Defaults are validated, since a size without one has a placeholder that must fail. pydantic would reserve names
    # that begin with "model_".
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with other keys, which computes its cached properties anew: pydantic copies their values."""
        copy = super().model_copy(update=update, deep=deep)
        for name in copy.__dict__.keys() - type(copy).model_fields.keys():
            del copy.__dict__[name]
        return copy


def parse(text: str, where: str) -> Table:
    """Parse TOML text; `where` names its source in the InputError for malformed text."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where}: not valid TOML: {error}; correct that line and try again") from None


def read(path: Path, errors: str = "strict") -> str:
    """Read a file in UTF-8, or what its byte order mark says; with another `errors` in UTF-8, whatever its bytes.

    Raises InputError when it is missing, a folder or not text.
    """
    try:
        return read_text(path) if errors == "strict" else path.read_text(encoding="utf-8", errors=errors)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder where a TOML file is needed; name the file inside it") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; restore it, or name another file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def validate(
    schema: type[SchemaT], table: Table, where: str, text: str = "", assigned: Collection[str] = (),
    example: Callable[[], Table] | None = None,
) -> SchemaT:  # fmt: skip
    """Build `schema` from a parsed table; raises InputError naming file, line (when `text` has it), key and rule.

    Keys in `assigned` came from the command line, so their errors name that instead of the file. `example`, for files
    that people write, has all missing keys told, a line each, with the values of the table that it returns.
    """
    for path, value in _integers(table):
        if abs(value) > LARGEST_INTEGER:
            raise InputError(f"{where}: {_dotted(path)} = {_short(value)}: a whole number has 64 bits; lower it")
    try:
        return schema.model_validate(table)
    except ValidationError as error:
        raise InputError(*_explain(error, schema, where, text, assigned, example)) from None


def _integers(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], int]]:
    if isinstance(value, int):
        yield path, value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _integers(item, (*path, key))


KEY_OF_DICT = "[key]"
"""Marker that pydantic appends to the location of a dictionary key that is itself invalid."""


def _explain(
    error: ValidationError, schema: type[BaseModel], where: str, text: str, assigned: Collection[str],
    example: Callable[[], Table] | None,
) -> list[str]:  # fmt: skip
    """Return a line about the first mistake; of keys that are missing, a line about each."""
    errors = error.errors(include_url=False)
    # A misspelt required key makes two errors, unknown and missing; the unknown one shows the typo.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    if first["type"] == "missing" and example is not None:
        whole = example()
        missing = [_path_of(e["loc"], text) for e in errors if e["type"] == "missing"]
        lines = [
            f"{_source(path, where, text, assigned)}: {_dotted(path)} is missing; {_addition(path, whole)}"
            for path in missing
        ]
        others = len(errors) - len(missing)
        return [*lines[:-1], lines[-1] + (f" (and {others} more)" if others else "")]
    return [_explain_one(first, error.error_count() - 1, schema, where, text, assigned)]


def _path_of(loc: tuple[int | str, ...], text: str) -> list[int | str]:
    """Return the path of keys in the file for the place of an error."""
    no_keys = {KEY_OF_DICT}
    # pydantic puts a union's tag ("gpt") behind the field ("model"), where the file has no key.
    if len(loc) > 1 and loc[0] in UNIONS and loc[1] not in table_of(text).get(str(loc[0]), {}):
        no_keys.add(str(loc[1]))
    return [part for part in loc if not (isinstance(part, str) and part in no_keys)]


def _source(path: list[int | str], where: str, text: str, assigned: Collection[str]) -> str:
    """Return who gave a key: the command line, also where it began the table that lacks the key, or a line."""
    key, table = _dotted(path), _dotted(path[:-1]) + "."
    listed = key.partition("[")[0]  # a list is set as a whole
    if {listed, key, f"{key}.name"} & set(assigned):
        return "command line"
    if any(isinstance(part, int) for part in path) and any(name.startswith(table) for name in assigned):
        return "command line"
    line = _line_of(text, path)
    return f"{where}:{line}" if line else where


def _addition(path: Sequence[int | str], example: Any) -> str:
    """Return how to add a missing key, with its value in an example that has it."""
    for part in path:
        if isinstance(part, int) and isinstance(example, list) and example:
            example = example[min(part, len(example) - 1)]
        else:
            example = example.get(part) if isinstance(example, dict) else None
    if example is None:
        return "add it"
    if isinstance(example, list):
        return f"add a table [[{path[-1]}]]"
    if isinstance(example, dict) and any(isinstance(value, dict) for value in example.values()):
        # Tables within it say where figures come from, and may be left out.
        keys = (f"{key} = {inline(value)}" for key, value in example.items() if not isinstance(value, dict))
        return f"add the table [{path[-1]}], for example with {', '.join(keys)}"
    return f"add it, for example {path[-1]} = {inline(example)}"


def inline(value: Any) -> str:
    """Return a value as TOML on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {inline(item)}" for key, item in value.items()) + " }"
    return tomli_w.dumps({"v": value}).strip().removeprefix("v = ")


def _explain_one(
    first: Any, more: int, schema: type[BaseModel], where: str, text: str, assigned: Collection[str]
) -> str:
    loc = first["loc"]
    path = _path_of(loc, text)
    key = _dotted(path)
    rule, value = first["msg"], first["input"]
    source = _source(path, where, text, assigned)
    rest = f" (and {more} more)" if more else ""
    if first["type"] == "extra_forbidden":
        known = _keys_beside(schema, loc)
        tag = loc[1] if len(path) < len(loc) else _name_of(schema, path)
        owner = f" of {path[0]} {tag}" if tag else ""
        return f"{source}: {key} is not a known key{owner}; {near_match(str(path[-1]), known)}{rest}"
    if first["type"] == "missing":
        return f"{source}: {key} is missing; add it{rest}"
    if first["type"] == "union_tag_invalid":
        context = first["ctx"]
        tags = [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]
        return f"{source}: {key}.name = {context['tag']!r} is not known; {near_match(str(context['tag']), tags)}{rest}"
    if first["type"] == "union_tag_not_found":
        return f"{source}: {key}.name is missing; add it{rest}"
    if first["type"] == "literal_error":
        known = [choice.strip(" '") for choice in re.split(r",| or ", first["ctx"]["expected"])]
        return f"{source}: {key} = {value!r} is not known; {near_match(str(value), known)}{rest}"
    if first["type"] == "value_error":
        rule = str(first["ctx"]["error"])
        # A rule about a table names its keys; one that was set on the command line stands nowhere in the file.
        if any(given == f"{key}.{word}" for given in assigned for word in rule.split()):
            source = "command line"
        return f"{source}: {key + ': ' if key else ''}{rule}{rest}"
    if first["type"] == "string_unicode":  # an argument of the command line, whose bytes are no text here
        rule = "not text in this system's encoding (export LC_ALL=C.UTF-8, or rename the file)"
    rule = rule[0].lower() + rule[1:]
    return f"{source}: {key} = {_short(value)}: {rule}; correct this value{rest}"


def table_of(text: str) -> Table:
    """Parse `text`, or return an empty table where it is not TOML (used only to find where a key stands)."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}


def _keys_beside(schema: type[BaseModel], loc: tuple[int | str, ...]) -> Iterable[str]:
    """Return the valid keys of the table in which the key at `loc` stands."""
    known: Iterable[str] = schema.model_fields
    current: Any = schema
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        fields = getattr(current, "model_fields", {})
        field = fields.get(part) or next((f for f in fields.values() if part is not None and f.alias == part), None)
        if field is not None:
            annotation = field.annotation
            options = [a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields")]
            current = options[0] if len(options) == 1 else tuple(options)
        elif isinstance(current, tuple):
            # `part` is a tag: the default of the member's name, or a network's family.
            current = next(
                (o for o in current if part in (o.model_fields["name"].default, getattr(o, "family", None))), None
            )
        known = getattr(current, "model_fields", known)
    fields = known if isinstance(known, dict) else {}
    return [field.alias or name for name, field in fields.items()] or known


def _name_of(schema: type[BaseModel], path: Sequence[str | int]) -> str | None:
    """Return the method whose schema a table has, from the default of its name."""
    field = schema.model_fields.get(str(path[0])) if len(path) > 1 else None
    name = getattr(field.annotation, "model_fields", {}).get("name") if field else None
    return name.default if name and isinstance(name.default, str) else None


def _dotted(path: Sequence[str | int]) -> str:
    """Return a path as errors show it: links[0].latency_s."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _line_of(text: str, path: list[Any]) -> int | None:
    """Return the 1-based line of a key, or of its table's header if the key is not written; None if neither is.

    pydantic knows no lines, so the text is searched. In an array of tables an index in the path selects the header.
    """
    if not text or not path:
        return None
    keys = [str(part) for part in path if not isinstance(part, int)]
    table = keys[0] if len(path) > 1 else None
    wanted_table = next((part for part in path if isinstance(part, int)), 0)
    header, seen, inside = None, -1, table is None
    for number, line in enumerate(text.splitlines(), 1):
        match = re.match(r"\s*\[\[?\s*([\w.\-]+)\s*\]\]?", line)
        if match:
            name = match.group(1)
            if name == (table or keys[0]):
                seen += 1
                if seen == wanted_table:
                    inside, header = True, number
                    continue
            # Subtables of the table still belong to it.
            inside = inside and table is not None and name.startswith(f"{table}.") and seen == wanted_table
        # A key may be quoted, or lead a dotted key.
        elif inside and re.match(rf"\s*[\"']?{re.escape(keys[-1])}[\"']?\s*[.=]", line):
            return number
    return header


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def dump(table: Table) -> str:
    """Return a table as TOML text, keys in the given order, None left out."""
    return tomli_w.dumps(_without_none(table))  # TOML has no null


def dump_list(name: str, tables: Sequence[Table]) -> str:
    """Return tables as a list in TOML, each below a [[name]] of its own, however short."""
    return "".join(f"\n[[{name}]]\n{dump(table)}" for table in tables)


def _without_none(table: Table) -> Table:
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in table.items() if v is not None}


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a kill at any moment, sees the old content or the new, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could keep the new name and lose the content
        # mkstemp makes private files; the umask can be read only by setting it.
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def set_key(table: Table, assignment: str) -> str:
    """Apply one `--set method.rank=16` to a table in place; the value is read as TOML, or else as a string.

    A number in the key, as in cluster.class.0.rank, is that of a table in a list; the next free number adds one.
    Returns the key, as errors show it.
    """
    key, sep, value_text = assignment.partition("=")
    parts = key.strip().split(".")
    in_list = len(parts) == 4 and parts[2].isdecimal()
    if not sep or not (len(parts) == 2 or in_list) or not all(parts):
        ours = ours_for(key.strip())
        named = f"; what others call {key.strip()} is {' or '.join(ours)} here" if ours else ""
        raise InputError(f"--set {assignment}: the form is table.key=value, for example --set method.rank=16{named}")
    try:
        value = tomllib.loads(f"value = {value_text.strip()}")["value"]
    except tomllib.TOMLDecodeError:  # a string without quotes, as shells pass it
        value = value_text.strip()
    section = table.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise InputError(f"--set {assignment}: {parts[0]} = {section!r} is not a table; write [{parts[0]}] in the file")
    if in_list:
        _table_in_list(section, parts[1], int(parts[2]), assignment)[parts[3]] = value
        return _dotted([*parts[:2], int(parts[2]), parts[3]])
    section[parts[1]] = value
    return ".".join(parts)


def _table_in_list(section: Table, name: str, index: int, assignment: str) -> Table:
    """Return a table of a list, made where it is the next one; raises InputError where it cannot be."""
    tables = section.setdefault(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InputError(f"--set {assignment}: {name} = {_short(tables)} is no list of tables; set {name} itself")
    if index > len(tables):
        raise InputError(f"--set {assignment}: there are {len(tables)} tables; the next one has number {len(tables)}")
    if index == len(tables):
        tables.append({})
    return tables[index]
