"""Draw the curves of bench/studies/convergence.py's results: validation loss over tokens, each method at its best rate.

    python bench/studies/curves.py --results docs/convergence.jsonl --out docs/convergence.svg

A line is the mean of a method's seeds, the band around it one standard deviation; methods are labelled where they end.
Needs matplotlib (extra `bench`).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from convergence import BATCHES, METHODS, SEEDS, Job, Results
from matplotlib import pyplot

matplotlib.rcParams["svg.hashsalt"] = "convergence"  # the same results draw the same file


def curves(results: Results, batch: str, method: str) -> list[list[tuple[int, float]]]:
    """Return a method's (tokens, loss) at its best rate, one list a seed; none where rates are still missing."""
    rate = results.best_rate(batch, method)
    jobs = [Job(batch, method, rate, seed) for seed in SEEDS] if rate is not None else []
    return [results.by_job[job]["curve"] for job in jobs if results.loss(job) not in (None, float("inf"))]


def draw(axes: Any, results: Results, batch: str, methods: list[str]) -> None:
    """Draw one batch size, the lowest end first in the legend."""
    drawn, after_start = [], []
    for number, method in enumerate(methods):
        seeds = curves(results, batch, method)
        if not seeds:
            continue
        tokens = [at / 1e6 for at, _ in seeds[0]]
        losses = [[loss for _, loss in points] for points in zip(*seeds, strict=True)]
        means = [statistics.mean(at) for at in losses]
        style = ("-", "--", ":")[number // 10]
        (line,) = axes.plot(tokens, means, style, color=f"C{number % 10}", linewidth=1.3)
        if len(seeds) > 1:
            spread = [statistics.stdev(at) for at in losses]
            low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(tokens, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        drawn.append((means[-1], line, f"{means[-1]:.3f}  {method} ({len(seeds)})"))
        after_start.append(means[1])
    # The first steps of a run that starts badly are no subject; one that hardly learns stands in the legend alone.
    axes.set_ylim(top=1.1 * statistics.median(after_start or [1.0]))
    drawn.sort(key=lambda entry: entry[0])
    axes.legend([line for _, line, _ in drawn], [label for _, _, label in drawn], fontsize=7, frameon=False)
    axes.set_title(f"{batch} batch: {BATCHES[batch]['steps']} steps (seeds in brackets)", fontsize=9)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("validation loss")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Parse and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="an .svg or .png file")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    figure, both = pyplot.subplots(1, len(BATCHES), figsize=(12, 7), layout="constrained")
    for axes, batch in zip(both, BATCHES, strict=True):
        draw(axes, Results(arguments.results), batch, arguments.methods)
    figure.savefig(arguments.out, metadata={"Date": None} if arguments.out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
