"""Assume how many more samples a method needs than dense training; this is no measurement of your run.

Time per step alone would always favour the smallest rank and the rarest merge, so candidates are ranked by the time to
the loss that dense training reaches. The numbers are in samples.toml, each with a range and where it comes from;
bench/studies/samples.py fits them, and `lte plan --efficiency FILE` takes others.

    samples over dense's  =  method  ·  batch  ·  merges  ·  rank
    batch   = 1 + minimum_steps · (tokens of a step) / (all tokens)      (a critical batch: McCandlish et al. 2018)
    merges  = max(1, T / merge_every) ^ merge_exponent
    rank    = shortfall ^ rank_exponent

Dense means dense training with AdamW. A method's figure depends on the optimizer: those with Muon are in a table of
their own, since Muon gains dense training more than it gains LTE.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from simulate.common import toml_io
from simulate.config.method_table import METHOD_NAMES
from simulate.config.run import Run
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import plan_of

End = Literal["value", "low", "high"]
SHIPPED = "samples.toml"


class Figure(toml_io.Schema):
    """One number of the model, its range, and where it comes from."""

    value: float = Field(ge=0)
    low: float = Field(ge=0)
    high: float = Field(ge=0)
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _value_within_range(self) -> Figure:
        if not self.low <= self.value <= self.high:
            raise ValueError(
                f"value = {self.value:g} is not from low = {self.low:g} to high = {self.high:g}; correct it"
            )
        return self


class Efficiency(toml_io.Schema):
    """The whole model: each method's factor at its best settings, and the cost of other settings."""

    description: str = ""
    minimum_steps: Figure
    """Optimizer steps at which a run needs twice the samples of a long one."""
    merge_every: int = Field(gt=0)
    """Most steps T of a round at which the methods' factors hold."""
    merge_exponent: Figure
    lte_rank_share: float = Field(gt=0, le=1)
    """Rank that one of LTE's heads needs, as a share of the width."""
    rank_exponent: Figure
    methods: dict[str, Figure]
    """By method, with AdamW."""
    muon: dict[str, Figure] = Field(default_factory=dict)
    """By method, with Muon; a method that is not here needs the samples that it needs with AdamW."""

    @model_validator(mode="after")
    def _methods_known(self) -> Efficiency:
        missing = [name for name in METHOD_NAMES if name not in self.methods]
        unknown = [name for name in (*self.methods, *self.muon) if name not in METHOD_NAMES]
        if missing or unknown:
            wrong = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which is no method"
            raise ValueError(f"methods {wrong}; give each of {', '.join(METHOD_NAMES)} a table")
        return self

    def of(self, method: str, optimizer: str) -> Figure:
        """Return the figure of a method with an optimizer, at its best settings."""
        if optimizer == "muon" and method in self.muon:
            return self.muon[method]
        return self.methods[method]


@lru_cache(maxsize=1)
def shipped() -> Efficiency:
    """Return the model that lte comes with."""
    text = resources.files("simulate.costs").joinpath(SHIPPED).read_text(encoding="utf-8")
    return toml_io.validate(Efficiency, toml_io.parse(text, SHIPPED), SHIPPED, text)


def load_efficiency(path: Path) -> Efficiency:
    """Read a model of the user's; raises InputError with file, line and key."""
    text = toml_io.read(path)
    return toml_io.validate(Efficiency, toml_io.parse(text, str(path)), str(path), text)


def samples_factor(
    run: Run, shape: ModelShape, tokens: float, efficiency: Efficiency | None = None, end: End = "value"
) -> float:
    """Return the assumed samples to equal loss over those of dense small-batch AdamW, or an end of their range."""
    model = efficiency or shipped()

    plan = plan_of(run.method)
    # The product in this module's docstring: batch and method, merges, rank.
    factor = batch_factor(run.tokens_per_step, tokens, model, end)
    muon = model.muon.get(plan.samples_like) if run.train.optimizer == "muon" else None
    factor *= getattr(muon or model.methods[plan.samples_like], end)
    factor *= max(1.0, run.method.round_steps / model.merge_every) ** getattr(model.merge_exponent, end)
    # Of classes, the one whose heads see least.
    plans = [plan_of(one.method) for one in run.classes] if run.cluster.classes else [plan]
    shortfall = 0.0
    for of_class in plans:
        devices, share = run.cluster.devices, model.lte_rank_share
        shortfall = max(shortfall, of_class.rank_shortfall(shape.largest_dimension, devices, share))
    rank_exponent: float = getattr(model.rank_exponent, end)
    return factor * shortfall**rank_exponent


def batch_factor(
    tokens_per_step: float, tokens: float, efficiency: Efficiency | None = None, end: End = "value"
) -> float:
    """Return the part of samples_factor that grows with the tokens of a step."""
    minimum_steps: float = getattr((efficiency or shipped()).minimum_steps, end)
    return 1 + tokens_per_step * minimum_steps / tokens
