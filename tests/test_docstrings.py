"""How the product describes itself: summaries are sentences, and long files say what they are for."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("simulate", "ltecli", "bench") for path in (ROOT / folder).rglob("*.py"))
RIDDLE = re.compile(r"(What|Of|Who|Whose|That)\b")
"""First words of a clause that leaves the reader to find its sentence."""
LONG = 100
"""Lines from which a file says what it does, why it exists and who calls it, in more than a line."""


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring, also of fields and constants."""
    for node in ast.walk(tree):
        body = getattr(node, "body", [])
        for statement in body if isinstance(body, list) else []:
            match statement:
                case ast.Expr(value=ast.Constant(value=str() as text)):
                    yield statement.lineno, text


def riddles(source: str) -> list[int]:
    return [line for line, text in docstrings(ast.parse(source)) if RIDDLE.match(text.lstrip())]


def is_unexplained(source: str) -> bool:
    text = ast.get_docstring(ast.parse(source)) or ""
    return source.count("\n") > LONG and len(text.split()) < 15


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_summaries_are_sentences_and_long_files_say_why_they_exist(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert riddles(source) == []
    assert not is_unexplained(source)


def test_a_riddle_and_a_silent_file_are_noticed() -> None:
    assert riddles('x = 1\n"""Of one device."""\n') == [2]
    assert riddles('def f():\n    """What it takes."""\n') == [2]
    assert not riddles('"""Whatever it takes."""\n')
    assert is_unexplained('"""Short."""\n' + "x = 1\n" * 101)
