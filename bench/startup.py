"""How long the light commands take: medians over fresh processes, by the clock and of the processor.

python bench/startup.py --repeats 11
python bench/startup.py --beside ../before              # in turns with another tree of lte

Others' work makes the clock's seconds longer, and the processor's less. Modules are compiled before they are timed,
as an installation does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
PLAN = ["plan", "--profile", "rtx3060_x4_home", "--model", "gpt2"]


@dataclass
class Command:
    """A command in a tree, and what its processes took."""

    name: str
    argv: list[str]
    tree: Path
    compiled: str
    clock_s: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)

    def run(self) -> bytes:
        """Run it; return what it printed."""
        environment = {**os.environ, "PYTHONPATH": str(self.tree), "PYTHONPYCACHEPREFIX": self.compiled}
        # With it, each start would compile all modules anew, which an installed lte does not.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        return subprocess.run(self.argv, check=True, capture_output=True, env=environment, cwd=self.compiled).stdout

    def time(self) -> None:
        """Run it, and keep what it took, from start to exit."""
        started, used = time.perf_counter(), _children_s()
        self.run()
        self.clock_s.append(time.perf_counter() - started)
        self.processor_s.append(_children_s() - used)

    def __str__(self) -> str:
        clock, processor = statistics.median(self.clock_s), statistics.median(self.processor_s)
        return f"{self.name}: {processor:.3f} s of the processor, {clock:.3f} s by the clock"


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--beside", type=Path, help="another tree to time in turns with this one")
    arguments = parser.parse_args()
    trees = [HERE, *([arguments.beside.resolve()] if arguments.beside else [])]
    with tempfile.TemporaryDirectory() as compiled:
        lte = [sys.executable, "-m", "ltecli"]
        commands = [Command("python -c pass", [sys.executable, "-c", "pass"], HERE, compiled)]
        for tree in trees:
            where = f" ({tree})" if len(trees) > 1 else ""
            document = json.loads(Command("", [*lte, *PLAN, "--json"], tree, compiled).run())
            count = len(document["candidates"]) + len(document["rejected"])
            commands.append(Command(f"lte --help{where}", [*lte, "--help"], tree, compiled))
            name = f"lte {' '.join(PLAN)}, {count:,} candidates{where}"
            commands.append(Command(name, [*lte, *PLAN], tree, compiled))
        for command in commands:
            command.run()
        # In turns, so that other programs disturb all commands alike.
        for _ in range(arguments.repeats):
            for command in commands:
                command.time()
    for command in commands:
        print(command)


if __name__ == "__main__":
    main()
