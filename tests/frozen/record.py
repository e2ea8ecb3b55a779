"""Record what a change of places and names must not move, or check that it is as recorded.

    python -m tests.frozen.record --check [--only plans|runs|resume|keys]
    python -m tests.frozen.record [--only ...]      records anew: only where a change of numbers is meant

It goes by the command line and by files, so it does not care which module anything is in. Figures lie in
tests/frozen/figures. Exit code 1: something differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from types import ModuleType

from tests.frozen import keys, plans, resume, runs
from tests.frozen.command import ROOT, is_own_tree, workers
from tests.frozen.compare import load, processor, save

PARTS: dict[str, ModuleType] = {"plans": plans, "keys": keys, "runs": runs, "resume": resume}
SHOWN = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Record or check; returns the exit code."""
    parser = argparse.ArgumentParser(description="Record what must not change, or check it.")
    parser.add_argument("--check", action="store_true", help="compare instead of recording")
    parser.add_argument("--only", choices=PARTS, help="one part")
    given = parser.parse_args(arguments)
    if not is_own_tree():
        print(f"frozen: another installation of ltecli would be checked; run this with PYTHONPATH={ROOT}")
        return 1
    parts = [given.only] if given.only else list(PARTS)
    with workers() as pool:
        return max(check_part(name, pool) if given.check else record_part(name, pool) for name in parts)


def record_part(name: str, pool: Executor) -> int:
    """Record one part, and print where."""
    path = save(name, PARTS[name].record(pool))
    print(f"{name}: recorded in {path.relative_to(ROOT)}, {path.stat().st_size:,} bytes", flush=True)
    return 0


def check_part(name: str, pool: Executor) -> int:
    """Check one part, and print the first differences; returns 1 where there are any."""
    started_s = time.monotonic()
    recorded = load(name)
    found = PARTS[name].check(recorded, pool)
    seconds = f"{time.monotonic() - started_s:.0f} s"
    print(f"{name}: {verdict(found)}{_rigour(recorded)}; {seconds}", flush=True)
    for line in found[:SHOWN]:
        print(f"  {line}")
    if len(found) > SHOWN:
        print(f"  and {len(found) - SHOWN} more")
    return int(bool(found))


def verdict(found: Sequence[str]) -> str:
    """Return a check's result in words."""
    return f"{len(found)} differences" if found else "as recorded"


def _rigour(recorded: dict[str, object]) -> str:
    if "processor" not in recorded:
        return ""
    same = recorded["processor"] == processor()
    return ", to the bit" if same else ", within tolerances, since another processor or torch recorded it"


if __name__ == "__main__":
    sys.exit(main())
