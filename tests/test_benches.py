"""Every program of bench/ can still be imported: nothing else in the tests runs them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
PROGRAMS = sorted(str(path.relative_to(BENCH)) for path in BENCH.rglob("*.py"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_can_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.endswith("curves.py"):
        pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    monkeypatch.setattr(sys, "path", [str((BENCH / name).parent), str(BENCH.parent), *sys.path])
    assert runpy.run_path(str(BENCH / name), run_name="imported")["__doc__"]
