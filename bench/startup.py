"""How long the light commands take: medians over fresh processes.

python bench/startup.py --repeats 11
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

LTE = str(Path(sys.executable).parent / "lte")
PLAN = ["plan", "--profile", "rtx3060_x4_home", "--model", "gpt2"]


def median_s(command: list[str], repeats: int) -> float:
    """Return the median seconds of a command, from start to exit."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    repeats = parser.parse_args().repeats
    document = json.loads(subprocess.run([LTE, *PLAN, "--json"], check=True, capture_output=True).stdout)
    candidates = len(document["candidates"]) + len(document["rejected"])
    print(f"python -c pass: {median_s([sys.executable, '-c', 'pass'], repeats) * 1e3:.0f} ms")
    print(f"lte --help: {median_s([LTE, '--help'], repeats) * 1e3:.0f} ms")
    print(f"lte {' '.join(PLAN)}, {candidates:,} candidates: {median_s([LTE, *PLAN], repeats):.2f} s")


if __name__ == "__main__":
    main()
