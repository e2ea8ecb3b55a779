from __future__ import annotations

import os

import pytest

from simulate.common.cpu import usable_cores
from tests.harness import ROOT, run_python

ONE_CORE = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from simulate.common.cpu import usable_cores
print(usable_cores())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_only_cores_in_the_affinity_mask_count() -> None:
    assert run_python(ONE_CORE, cwd=ROOT) == "1\n"


def test_without_an_affinity_call_all_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores() == 6
