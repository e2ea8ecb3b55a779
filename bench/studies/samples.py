"""Fit simulate/costs/samples.toml to what was measured and published, and say how.

    python bench/studies/samples.py                     # print it
    python bench/studies/samples.py --write             # replace the shipped file

Measured are the runs of convergence.py. A method's ratio is that of its stretched schedule where that reached
dense's loss; else what dense's curve says (all samples over those after which dense had the method's loss) times
what the stretched schedule makes of that elsewhere. A figure is the geometric mean of all its sources, published,
measured or guessed; its range reaches from the smallest to the largest of them. Plans rank by this file, so each of its
figures must be traceable.

Methods with Muon have figures of their own, over dense AdamW's samples like all others: the share of its own samples
after which a run had dense AdamW's loss, by its own curve. A schedule of that length would have been there earlier, so
they are upper bounds. Where a method was not trained with Muon, what Muon gained the measured ones stands for it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import tomli_w
from convergence import BATCHES, DENSE, Results

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/convergence.jsonl"
CHOICES = ROOT / "docs/choices.jsonl"
TARGET = ROOT / "simulate/costs/samples.toml"
PUBLISHED_LTE = 1.4
"""Huh et al. 2024, section 4: about 40 % more samples than dense at rank x heads >= width, T = 10."""
SWEEP = {8: 44.0, 16: 60.4, 32: 71.2, 64: 73.7, 128: 73.5}
"""Rank: top-1 in % after equal epochs; ViT-S (width 384), 32 heads, ImageNet100, reported for arXiv 2402.16828."""
SWEEP_WIDTH, SWEEP_HEADS, BEST_RANK = 384, 32, 64
RANK_SHARE = 1 / 12
"""Rank 32 of width 384 is within 2.5 points of the best, rank 16 is 13 points below."""
ERROR_EXPONENTS = (0.35, 1.0)
"""Error falls as samples ^ -this: Hestness et al. 2017 (arXiv 1712.00409) for image classifiers once data are many;
early in training it falls faster, at most about as 1 / samples."""
MINIMUM_STEPS = 200.0
"""A guess, that a batch of 1/200 of all tokens is critical."""
MERGE_EXPONENT = (0.05, 0.15, 0.3)
"""Guess: ten times rarer merges cost 1.4x the samples (1.1x to 2x); no sweep over T at equal loss is known."""
GUESSES = {
    "sapipe": 1.05, "powersgd": 1.05, "topk": 1.1, "signsgd": 1.1, "daso": 1.1, "local-sgd": 1.2, "diloco": 1.2,
    "sparseloco": 2.0, "mhlora": 1.2, "relora": 1.4, "lora": 1.4, "adamix": 1.4,
}  # fmt: skip
LTE = ("lte, frozen A", "lte")
"""Names in bench/studies/convergence.py of LTE with AdamW: our default, and the paper's."""
MEASURED_AS = {name: f"{name}, rank 128" for name in ("lora", "relora", "adamix")}
"""Methods of another name there: with as many directions as the network is wide, like LTE's four heads of rank 32."""
MUON = {"ddp": "dense, muon", "lte": "lte, frozen A, muon"}
"""Names there of methods with Muon."""
MUON_CHOICES = {
    "lte": (
        "lte optimizer=muon learning_rate=0.0065 draws=joint rank=64 wire=int2",
        "lte optimizer=muon learning_rate=0.0065 draws=joint rank=128 wire=int4",
    ),
    "local-sgd": ("local-sgd optimizer=muon learning_rate=0.009 wire=int2",),
}
"""Settings of choices.py, all of the small batch: LTE of more rank, and local SGD."""
WITHOUT_MUON = ("sapipe",)
"""Methods that read Adam's moments."""
ORDER = ("ddp", "lte", *GUESSES)
Table = dict[str, object]


def figure(values: Sequence[float], source: str, span: Sequence[float] | None = None) -> Table:
    """Return the geometric mean of values, with their range or another."""
    ends = span or values
    return {
        "value": round(statistics.geometric_mean(values), 3),
        "low": round(min(ends), 3),
        "high": round(max(ends), 3),
        "source": source,
    }


def mean_curve(results: Results, batch: str, method: str) -> list[tuple[float, float]]:
    """Return samples (in tokens) and the mean validation loss of all seeds at the best rate."""
    rate = results.best_rate(batch, method)
    curves = [
        row["curve"] for row in results.rows
        if (row["batch"], row["method"], row["rate"], row["factor"]) == (batch, method, rate, 1.0)
    ]  # fmt: skip
    return [(points[0][0], statistics.mean(loss for _, loss in points)) for points in zip(*curves, strict=True)]


def curve_ratio(results: Results, batch: str, loss: float) -> float:
    """Return all samples over those after which dense had a loss, by its curve, linearly between points.

    A loss that dense was below at its first point is taken for that point's: the ratio is at least that.
    """
    curve = mean_curve(results, batch, DENSE)
    if loss > curve[0][1]:
        return curve[-1][0] / curve[0][0]
    for (before, higher), (after, lower) in itertools.pairwise(curve):
        if higher >= loss >= lower:
            return curve[-1][0] / (before + (after - before) * (higher - loss) / (higher - lower))
    return 1.0


def measured(results: Results) -> tuple[dict[str, list[float]], float]:
    """Return each method's ratios, and what stretching a schedule makes of the ratio that the curve says."""
    stretched, by_curve = {}, {}
    for batch in BATCHES:
        for method in (*LTE, *GUESSES):
            name = MEASURED_AS.get(method, method)
            if losses := results.seeds(batch, name):
                by_curve[batch, method] = curve_ratio(results, batch, statistics.mean(losses))
                if (ratio := results.samples_ratio(batch, name)) is not None:
                    stretched[batch, method] = ratio
    # Where dense's loss was reached without stretching there is nothing to learn of it.
    known = [stretched[key] / by_curve[key] for key in stretched if stretched[key] > 1]
    correction = statistics.geometric_mean(known)
    ratios: dict[str, list[float]] = {}
    for key, ratio in by_curve.items():
        ratios.setdefault(key[1], []).append(stretched.get(key, max(1.0, ratio * correction)))
    return ratios, correction


def share_to(curve: Sequence[tuple[float, float]], loss: float) -> float:
    """Return the share of a run's samples after which it had a loss, by its curve, linearly between points."""
    for (before, higher), (after, lower) in itertools.pairwise(curve):
        if higher >= loss >= lower:
            return (before + (after - before) * (higher - loss) / (higher - lower)) / curve[-1][0]
    raise ValueError(f"a loss of {loss:g} was never reached")


def measured_with_muon(results: Results) -> dict[str, list[float]]:
    """Return what each method that was trained with Muon needed of dense AdamW's samples to have its loss."""
    goals = {batch: statistics.mean(results.seeds(batch, DENSE)) for batch in BATCHES}
    shares = {
        method: [share_to(mean_curve(results, batch, name), goals[batch]) for batch in BATCHES]
        for method, name in MUON.items()
    }
    rows = [json.loads(line) for line in CHOICES.read_text(encoding="utf-8").splitlines()]
    curves = {row["setting"]: row["curve"] for row in rows if row["data"] == "text" and row["seed"] == 0}
    for method, settings in MUON_CHOICES.items():
        shares.setdefault(method, []).extend(share_to(curves[setting], goals["small"]) for setting in settings)
    return shares


def with_muon(results: Results, adamw: dict[str, Table]) -> dict[str, Table]:
    """Return the figures of methods with Muon, from those with AdamW where a method was not trained with it."""
    shares = measured_with_muon(results)
    source = "share of its samples to dense AdamW's loss, at most: "
    ends = {name: [float(str(table[end])) for end in ("value", "low", "high")] for name, table in adamw.items()}
    gains = [statistics.geometric_mean(found) / ends[name][0] for name, found in shares.items()]
    gain, muon = statistics.geometric_mean(gains), {}
    for name, found in shares.items():
        text = source + ", ".join(f"{x:.2f}" for x in found) + " (docs/convergence.jsonl, choices.jsonl)"
        # One run has no spread, so it gets the range with AdamW, times what Muon gained.
        span = found if len(found) > 1 else [*found, ends[name][1] * min(gains), ends[name][2] * max(gains)]
        muon[name] = figure(found, text, span)
    for name in (name for name in adamw if name not in muon and name not in WITHOUT_MUON):
        value, low, high = ends[name]
        text = f"guess: Muon gains what it gained {', '.join(shares)} ({gain:.2f}); at worst nothing"
        muon[name] = figure([value * gain], text, (low * min(gains), high))
    return muon


def critical_steps(results: Results, correction: float) -> float:
    """Return minimum_steps M with which the larger batch needs as many times the smaller one's samples as it did.

    ratio = (1 + M / large steps) / (1 + M / small steps)
    """
    loss = statistics.mean(results.seeds("large", DENSE))
    ratio = curve_ratio(results, "small", loss) * correction
    small, large = (float(BATCHES[batch]["steps"]) for batch in ("small", "large"))
    return (ratio - 1) / (1 / large - ratio / small)


def rank_slope() -> float:
    """Return the least-squares slope, through nothing at no shortfall, of log error over log shortfall."""
    points = []
    for rank in (rank for rank in SWEEP if rank < BEST_RANK):
        error = (100 - SWEEP[rank]) / (100 - SWEEP[BEST_RANK])
        shortfall = max(1.0, SWEEP_WIDTH / (rank * SWEEP_HEADS)) * max(1.0, SWEEP_WIDTH * RANK_SHARE / rank)
        points.append((math.log(shortfall), math.log(error)))
    return sum(x * y for x, y in points) / sum(x * x for x, _ in points)


def fit(results: Results) -> Table:
    """Return the whole model."""
    ratios, correction = measured(results)
    methods: dict[str, Table] = {"ddp": figure([1.0], "the yardstick")}
    lte = [ratio for name in LTE for ratio in ratios.pop(name, [])]
    methods["lte"] = figure(
        [PUBLISHED_LTE, *lte],
        "arXiv 2402.16828, section 4 (1.4); docs/convergence.jsonl (" + ", ".join(f"{x:.2f}" for x in lte) + ")",
    )
    for name, guess in GUESSES.items():
        if name in ratios:
            listed = ", ".join(f"{x:.2f}" for x in ratios[name])
            methods[name] = figure([guess, *ratios[name]], f"guess ({guess:g}); docs/convergence.jsonl ({listed})")
        else:
            span = (1 + (guess - 1) / 2, 1 + 2 * (guess - 1))
            methods[name] = figure([guess], "guess, half to twice the excess", span)
    muon = with_muon(results, methods)
    steps, slope = critical_steps(results, correction), rank_slope()
    low, value, high = MERGE_EXPONENT
    return {
        "description": "Samples over those of dense small-batch training for equal loss; written by "
        "bench/studies/samples.py",
        "merge_every": 10,
        "lte_rank_share": round(RANK_SHARE, 6),
        "minimum_steps": figure([MINIMUM_STEPS, steps], f"guess (200); docs/convergence.jsonl, dense ({steps:.0f})"),
        "merge_exponent": figure([value], "guess: ten times rarer merges cost 1.4x, 1.1x to 2x", (low, high)),
        "rank_exponent": figure(
            [slope / exponent for exponent in ERROR_EXPONENTS],
            "rank sweep of arXiv 2402.16828, error falling as samples ^ -0.35 (arXiv 1712.00409) to samples ^ -1",
        ),
        "methods": {name: methods[name] for name in ORDER},
        "muon": {name: muon[name] for name in ORDER if name in muon},
    }


def main() -> None:
    """Fit; print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    text = tomli_w.dumps(fit(Results(arguments.results)))
    if arguments.write:
        TARGET.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
