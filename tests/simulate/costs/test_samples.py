"""The assumed number of samples to equal loss, at points where it is plain arithmetic."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from simulate.common import toml_io
from simulate.common.errors import InputError
from simulate.config.method_table import METHOD_NAMES
from simulate.config.run import Run
from simulate.costs.samples import SHIPPED, Efficiency, load_efficiency, samples_factor, shipped
from tests import tiny
from tests.harness import ROOT, run

WIDE = {"width": 16, "context": 8}
"""Largest layer dimension: 16. Two devices with two samples of eight tokens make steps of 32 tokens."""


def plain(value: float) -> dict[str, object]:
    return {"value": value, "low": value / 2, "high": value * 2, "source": "made up"}


ROUND = Efficiency.model_validate(
    {
        "minimum_steps": plain(200),
        "merge_every": 10,
        "merge_exponent": plain(0.15),
        "lte_rank_share": 1 / 12,
        "rank_exponent": plain(0.5),
        "methods": {name: plain(1.4 if name == "lte" else 1.0) for name in METHOD_NAMES},
    }
)
"""A model of round numbers."""


def factor(run: Run, tokens: float = math.inf) -> float:
    return samples_factor(run, run.model.shape(), tokens, ROUND)


def test_dense_training_with_small_batches_is_the_yardstick() -> None:
    assert factor(tiny.ddp_run(model=WIDE)) == 1
    run = tiny.ddp_run(model=WIDE)
    assert samples_factor(run, run.model.shape(), math.inf) == 1


def test_a_batch_of_one_part_in_two_hundred_doubles_the_samples() -> None:
    assert factor(tiny.ddp_run(model=WIDE), tokens=200 * 32) == 2
    assert factor(tiny.ddp_run(model=WIDE), tokens=400 * 32) == 1.5


def test_enough_rank_and_frequent_merges_cost_what_the_method_does() -> None:
    assert factor(tiny.lte_run(model=WIDE, rank=8, merge_every=10)) == 1.4
    assert factor(tiny.lte_run(model=WIDE, rank=16, merge_every=1)) == 1.4


def test_half_the_rank_that_is_needed_costs_its_square_root() -> None:
    assert factor(tiny.lte_run(model=WIDE, rank=4)) == pytest.approx(1.4 * math.sqrt(2))


def test_ten_times_rarer_merges_cost_a_factor() -> None:
    assert factor(tiny.lte_run(model=WIDE, rank=8, merge_every=100)) == pytest.approx(1.4 * 10**0.15)


@pytest.mark.parametrize("name", list(tiny.VARIANTS))
def test_the_ends_of_the_range_enclose_the_figure(name: str) -> None:
    run = tiny.variant_run(name)
    low, value, high = (samples_factor(run, run.model.shape(), 1e6, None, end) for end in ("low", "value", "high"))  # type: ignore[arg-type]
    least = 1 if run.train.optimizer == "adamw" else 0.4  # over dense AdamW's
    assert least <= low <= value <= high < 200


def test_the_shipped_model_is_what_the_script_makes_of_the_results() -> None:
    made = run([sys.executable, ROOT / "bench/studies/samples.py"], cwd=ROOT / "bench/studies")
    assert made.code == 0, made.stderr
    assert toml_io.validate(Efficiency, toml_io.parse(made.stdout, SHIPPED), SHIPPED) == shipped()


def test_the_shipped_model_is_near_what_was_published() -> None:
    lte = shipped().methods["lte"]
    assert lte.low < 1.4 < lte.high
    assert lte.value == pytest.approx(1.4, rel=0.1)
    run = tiny.lte_run(model=WIDE, rank=8, merge_every=10)
    assert samples_factor(run, run.model.shape(), math.inf) == lte.value


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("merge_every = 10", "merge_every = 0", "merge_every"),
        ("[methods.daso]", "[methods.dasos]", "lacks daso"),
        ("value = 1.0\n", "value = 9.0\n", "not from low"),
        ("value = 1.0\n", "valeu = 1.0\n", "did you mean 'value'"),
    ],
)
def test_a_wrong_file_is_refused_in_a_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = (ROOT / "simulate/costs" / SHIPPED).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "mine.toml").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(InputError, match=said):
        load_efficiency(tmp_path / "mine.toml")
