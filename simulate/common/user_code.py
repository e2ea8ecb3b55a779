"""Import what users bring, networks and methods, from modules in the current folder or wherever Python finds them."""

from __future__ import annotations

import ast
import hashlib
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from simulate.common.errors import InputError, first_line, near_match
from simulate.common.live_objects import find, is_live


def import_named(field: str, name: str) -> Any:
    """Return the object that package.module:Name, or the name of a live object, leads to.

    `field` is the key of run.toml that says so. Raises InputError where there is no such object.
    """
    if is_live(name):
        return find(field, name)
    if form := module_form(name):
        raise InputError(f"{field} = {name!r} is the path to a file; name the module and what it has: {form!r}")
    module_name, _, attribute = name.partition(":")
    module = _import_module(field, name, module_name)
    found = getattr(module, attribute, None)
    if found is None:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{field} = {name!r}: {module_name} has no {attribute!r}; {near_match(attribute, known)}")
    return found


def module_form(name: str) -> str | None:
    """Return package.module:Name for the path to a Python file, None for what is no such path."""
    path, _, attribute = name.partition(":")
    if not path.endswith(".py"):
        return None
    if not attribute:
        attribute = next(iter(_classes(Path(path))), "Name")
    return ".".join(Path(path).with_suffix("").parts) + f":{attribute}"


def _classes(path: Path) -> list[str]:
    """Return the names of a file's classes; nothing is imported."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def _import_module(field: str, name: str, module_name: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path:  # as `python -m` has it
        sys.path.insert(0, folder)
    try:
        return import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{field} = {name!r}: {error}; the form is package.module:Name, and modules are found in the current "
            "folder and where Python is installed"
        ) from None
    except (Exception, SystemExit) as error:  # a script that reads its own command line ends the program
        raise InputError(
            f"{field} = {name!r}: importing {module_name} raised {type(error).__name__}: {first_line(error)}; mend it "
            "first: an import should define the network, and nothing else"
        ) from error


def code_digest(field: str, name: str) -> str:
    """Return the SHA-256 of the Python files of the module or package that package.module:Name begins with.

    Nothing is imported. `field` is the key of run.toml. Raises InputError where Python finds no such module.
    """
    top = name.partition(":")[0].partition(".")[0]
    folder = str(Path.cwd())
    if folder not in sys.path:  # as `python -m` has it
        sys.path.insert(0, folder)
    found = find_spec(top)
    if found is None or (found.origin is None and not found.submodule_search_locations):
        raise InputError(
            f"{field} = {name!r}: there is no module {top!r} in the current folder or in Python's path; copy it here"
        )
    roots = [Path(place) for place in found.submodule_search_locations or ()]
    # Relative names, since the package lies elsewhere on another machine.
    files = {path.relative_to(root).as_posix(): path for root in roots for path in root.rglob("*.py")}
    if not roots and found.origin is not None:
        files = {Path(found.origin).name: Path(found.origin)}
    digest = hashlib.sha256()
    for relative, path in sorted(files.items()):
        content = path.read_bytes().replace(b"\r\n", b"\n")  # git on Windows changes line ends
        digest.update(f"{relative} {len(content)}\n".encode() + content)
    return digest.hexdigest()
