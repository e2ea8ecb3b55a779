"""Words that a shell offers: profiles, models, methods, run.toml keys with their values, run folders.

typer makes the scripts of bash, zsh and fish (`lte --install-completion`), which call `lte` with _LTE_COMPLETE at every
press of Tab; ltecli/app.py names these functions at its options. Each press starts Python anew, so they import only
what they look at, and never torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

VARIABLE = "_LTE_COMPLETE"
_key_of_bash: list[str] = []
"""The key of `--set KEY=VALUE` whose value bash completes: it takes "=" as the start of a new word."""


def join_words_of_bash() -> None:
    """Put KEY=VALUE, which bash hands over as three words, together again for the parser of options."""
    if os.environ.get(VARIABLE) != "complete_bash":
        return
    given, at = os.environ.get("COMP_WORDS", "").split("\n"), int(os.environ.get("COMP_CWORD", "0"))
    given = [*given, *[""] * (at + 1 - len(given))][: at + 1]
    before, current = given[:-1], given[-1]
    if current == "=":  # nothing stands behind it yet
        before, current = [*before, "="], ""
    if before[-1:] == ["="] and len(before) > 1:
        _key_of_bash.append(before[-2])
        before = before[:-2]
    words: list[str] = []
    for word in before:
        if words and (word == "=" or words[-1].endswith("=")):
            words[-1] += word
        else:
            words.append(word)
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = "\n".join([*words, current]), str(len(words))


def profile_names(incomplete: str) -> list[str]:
    """Return shipped profiles, `local`, and profiles in files."""
    import profiles
    from simulate.config.hardware import LOCAL

    return _starting([*profiles.names(), LOCAL, *_files(incomplete, "*.toml")], incomplete)


def model_names(incomplete: str) -> list[str]:
    """Return the sizes of all families."""
    from simulate.models.families.table import MODEL_NAMES

    return _starting(MODEL_NAMES, incomplete)


def method_names(incomplete: str) -> list[str]:
    """Return the methods."""
    from simulate.config.method_table import METHOD_NAMES

    return _starting(METHOD_NAMES, incomplete)


def run_folders(incomplete: str) -> list[str]:
    """Return the run folders here, below, and below what is typed."""
    return _starting(_folders(incomplete), incomplete)


def runs(incomplete: str) -> list[str]:
    """Return run folders, and files that may be a run.toml."""
    return _starting([*_files(incomplete, "*.toml"), *_folders(incomplete)], incomplete)


def set_keys(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return keys as `method.rank=`, or the values of a key that has finitely many."""
    from simulate.common.toml_io import inline

    fields = _fields(ctx)
    key, equals, value = incomplete.partition("=")
    if _key_of_bash:
        key, value, prefix = _key_of_bash[-1], incomplete, ""
    elif equals:
        prefix = f"{key}="
    else:
        found = _starting((f"{name}=" for name in fields), incomplete)
        if len(found) > 1:
            return found
        # The only key gets its values beside it: bash would put a blank behind a lone word.
        key, value = found[0].removesuffix("=") if found else "", ""
        prefix = f"{key}="
    field = fields.get(key)
    if field is None:
        return []
    values = list(_values(key, field.annotation))
    if not values and prefix and not equals:
        default = field.get_default()
        values = ["", inline(default)] if isinstance(default, int | float | str) else [""]
    return [prefix + word for word in _starting(values, value)]


def _fields(ctx: typer.Context) -> dict[str, Any]:
    """Return the fields of run.toml by their dotted keys: of all methods and families, unless one is chosen."""
    from simulate.common.toml_io import Schema
    from simulate.config.method_table import METHOD_NAMES, method_options
    from simulate.config.tables import Cluster, Data, DeviceClass, Train
    from simulate.models.families.table import FAMILIES, family_of

    given = dict(word.split("=", 1) for word in ctx.params.get("assignments") or () if "=" in word)
    method = ctx.params.get("method") or given.get("method.name")
    family = family_of(str(ctx.params.get("model") or given.get("model.name") or ""))
    methods = [method] if method in METHOD_NAMES else METHOD_NAMES
    families = [FAMILIES[family]] if family in FAMILIES else list(FAMILIES.values())
    schemas: list[tuple[str, type[Schema]]] = [("model", schema) for schema in families]
    schemas += [("data", Data), ("train", Train), ("cluster", Cluster), ("cluster.class.0", DeviceClass)]
    schemas += [("method", method_options(name)) for name in methods]
    return {
        f"{table}.{key}": field
        for table, schema in schemas
        for key, field in schema.model_fields.items()
        if field.alias is None  # a list of tables, whose own keys are there
    }


def _values(key: str, annotation: Any) -> Iterator[str]:
    """Yield the values of a key, where there are finitely many."""
    named = {"method.name": method_names, "model.name": model_names, "cluster.profile": profile_names}
    if key in named:
        yield from named[key]("")
    elif key == "data.name":
        from simulate.config.tables import DATA_NAMES

        yield from DATA_NAMES
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif annotation is bool:
        yield from ("true", "false")
    elif isinstance(annotation, type) and get_origin(annotation) is None:
        return
    else:  # unions, tuples, annotated types
        for part in get_args(annotation):
            yield from _values("", part)


def _starting(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in dict.fromkeys(words) if word.startswith(incomplete)]


def _files(incomplete: str, pattern: str) -> list[str]:
    return [path + name for path, folder in [_folder_of(incomplete)] for name in _glob(folder, pattern)]


def _folders(incomplete: str) -> list[str]:
    """Return run folders up to two levels below the folder that is typed so far: runs/demo from the current one."""
    from simulate.common.run_files import RUN_FILE

    typed, folder = _folder_of(incomplete)
    found = (name for pattern in (f"*/{RUN_FILE}", f"*/*/{RUN_FILE}") for name in _glob(folder, pattern))
    return [typed + name.removesuffix(f"/{RUN_FILE}") for name in found]


def _glob(folder: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern))


def _folder_of(incomplete: str) -> tuple[str, Path]:
    """Return the typed words up to the last slash, and the folder that they name."""
    typed = incomplete[: incomplete.rfind("/") + 1]
    return typed, Path(typed or ".").expanduser()
