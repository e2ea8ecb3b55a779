"""Call `python -m ltecli` many times, paying for its imports once; nothing else of the tree is imported."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import random
import runpy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROSE = "/proc/self/cwd/prose.txt"
"""The text that runs train on. A checkpoint belongs to one data.path, which lte makes absolute: this one is absolute,
and is in whichever folder the command runs (on Linux)."""
WORDS = ("a", "low", "rank", "wave", "over", "the", "frozen", "hills", "where", "every", "head", "learns", "its", "way")
PROCESSES = 2
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "80", "CUDA_VISIBLE_DEVICES": ""}
"""One thread, since the order of sums depends on their number."""


@dataclass(frozen=True)
class Outcome:
    """A command's exit code and output."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """Return the JSON document on stdout; raises AssertionError with the command's words where there is none."""
        assert self.stdout, self.stderr
        return json.loads(self.stdout)


def lte(*arguments: str | Path, expected: Sequence[int] = (0,)) -> Outcome:
    """Do what `python -m ltecli` does, in this process; raises AssertionError for another exit code than expected."""
    stdout, stderr, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["lte", *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            runpy.run_module("ltecli", run_name="__main__")
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    finally:
        sys.argv = before
    assert code in expected, f"lte {' '.join(map(str, arguments))} left with {code}: {stderr.getvalue().strip()}"
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make an empty folder with the text in it the current one, for a while."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="frozen-") as name:
        folder = Path(name)
        (folder / "prose.txt").write_text(" ".join(random.Random(0).choices(WORDS, k=1500)), encoding="utf-8")
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


@contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """Start processes that import this tree, use one thread each, and share a cache of their own."""
    with tempfile.TemporaryDirectory(prefix="frozen-cache-") as cache:
        wanted = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "LTE_CACHE": cache, "LTE_CALIBRATE": "0"}
        before = {key: os.environ.get(key) for key in wanted}
        os.environ.update(wanted)
        try:
            # Plans are millions of objects and no garbage: collection would take a fifth of the time.
            with ProcessPoolExecutor(PROCESSES, get_context("spawn"), initializer=gc.disable) as pool:
                yield pool
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})


def is_own_tree() -> bool:
    """Whether the program that is called lies beside this file, and not in some other installation."""
    import ltecli

    return Path(ltecli.__file__).parents[1] == ROOT
