"""The best known choices for what a plan's user leaves open, with the figures that speak for each; torch-free.

Defaults of run.toml stay what they are, so that an old file means what it meant: only what a plan proposes comes from
here. ltecli.plan_request says which keys are open, the search space asks `proposed` once for each method, and `--why`
prints `choices_of`. A choice that loses somewhere, or that was tried with few methods, says so in its condition.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from simulate.config.method_options import AdapterOptions, MethodOptions
from simulate.config.method_table import METHOD_NAMES
from simulate.config.run import Run


@dataclass(frozen=True)
class Known:
    """One choice, and what is known of it."""

    key: str
    """The key of run.toml that is chosen."""
    value: str | float
    methods: tuple[str, ...]
    """Methods that it is proposed for."""
    figures: str
    """Losses in nats or shares of images with it and without, and on which data."""
    source: str
    condition: str
    """Where it is proposed."""


OPTIMIZER = Known(
    "train.optimizer", "muon", METHOD_NAMES,
    "2.03 against 2.18 nats on text (LTE, 3 seeds), 1.76 against 2.03 (dense, 3 seeds); 0.72 against 1.51 on images of "
    "digits (LTE, ViT, 3 seeds); 55.2 against 40.9 % of CIFAR-10 (dense, ViT, 3 seeds)",
    "docs/results.md, docs/vision.md",
    "methods that do not read Adam's moments or draw A anew (reset = ab), and no train.optimizer_state = 8bit",
)  # fmt: skip
WIRE = Known(
    "method.wire", "int8", ("lte", "ddp", "local-sgd", "diloco"),
    "2.010 against 2.011 nats on text (LTE, 3 seeds), 1.761 against 1.756 (dense with Muon, one seed); on images of "
    "digits (ViT, 3 seeds) 1.027 and 1.027 (LTE), 0.258 and 0.258 (dense); at 26 % of the bytes",
    "docs/results.md; for diloco arXiv 2501.18512, with 4 bits",
    "several devices; it keeps what rounding lost, so not where memory is minimised, or short",
)  # fmt: skip
FINAL_SHARE = Known(
    "train.final_share", 0.3, ("lte", "local-sgd"),
    "2.005 against 2.012 nats on text (LTE with Muon, one seed); 0.828 against 1.027 on images of digits (LTE with "
    "Muon, ViT, 3 seeds)",
    "docs/results.md",
    "methods whose devices train alone for a round, with the cosine",
)  # fmt: skip
KNOWN = (OPTIMIZER, WIRE, FINAL_SHARE)
RATE = "train.learning_rate"
OPEN_KEYS = (*(known.key for known in KNOWN), RATE)
"""Keys that a plan may choose, where the user has not."""


@dataclass(frozen=True)
class Rate:
    """A peak learning rate at REFERENCE_WIDTH, for one optimizer and kind of data."""

    optimizer: str
    unit: str
    """tokens or samples, as models are trained on."""
    methods: tuple[str, ...]
    """Methods that it was found for; none: all others."""
    value: float
    figures: str


REFERENCE_WIDTH = 128
"""Above it, rates fall with the width (Yang et al. 2022, arXiv 2203.03466); Muon's steps are as large as Adam's."""
RATES = (
    Rate("muon", "tokens", ("ddp", "local-sgd"), 9e-3, "dense: 1.756 with 9e-3, 1.773 with 6.5e-3, 1.838 with 4.5e-3"),
    Rate("muon", "tokens", (), 4.5e-3, "LTE: 2.088 with 3e-3, 2.040 with 4.5e-3, 2.034 with 6.5e-3, 2.095 with 9e-3"),
    Rate("muon", "samples", ("ddp", "local-sgd"), 9e-3, "dense, digits, ViT: 0.51 with 4.5e-3, 0.26 with 9e-3"),
    Rate("muon", "samples", (), 2.5e-3, "LTE, ViT, digits: 0.83; CIFAR-10 wants less: 3e-4 was the best of four"),
    Rate("adamw", "tokens", (), 3e-3, "dense: 2.046 with 3e-3, 2.017 with 4.5e-3, 2.519 with 6.5e-3"),
    Rate("adamw", "samples", (), 3e-3, "dense, digits, ViT: 72 % with 1.5e-3, 80 % with 3e-3, 60 % with 6e-3"),
)
"""The first that fits counts; text in nats, one seed, width 128 (docs/convergence.jsonl); images in docs/vision.md."""


def rate_of(method: str, optimizer: str, unit: str) -> Rate:
    """Return the rate to propose for a method, an optimizer and a model's unit, tokens or samples."""
    # APOLLO's steps are as large as AdamW's, and no other rate has been measured as better.
    optimizer = "adamw" if optimizer == "apollo" else optimizer
    fitting = (rate for rate in RATES if (rate.optimizer, rate.unit) == (optimizer, unit))
    return next(rate for rate in fitting if method in rate.methods or not rate.methods)


def learning_rate(method: str, optimizer: str, unit: str, width: int) -> float:
    """Return the peak rate to propose for a network of a width."""
    value = rate_of(method, optimizer, unit).value
    return min(value, value * REFERENCE_WIDTH / width)


def proposed(base: Run, method: MethodOptions, width: int, open_keys: Collection[str]) -> dict[str, Any]:
    """Return the keys of [train] that a plan proposes for a method, with their values; those that are not open stay."""
    train, found = base.train, dict[str, Any]()
    # A method beside a run's own may be unable to use the run's optimizer, whoever chose that.
    optimizer = train.optimizer
    if method.reads_adam_moments or (optimizer == "apollo" and isinstance(method, AdapterOptions)):
        optimizer = "adamw"
    if OPTIMIZER.key in open_keys and _takes_muon(base, method):
        optimizer = "muon"
    if optimizer != train.optimizer:
        found["optimizer"] = optimizer
    if RATE in open_keys:
        found["learning_rate"] = learning_rate(method.name, optimizer, base.model.unit, width)
    if FINAL_SHARE.key in open_keys and method.name in FINAL_SHARE.methods and train.schedule == "cosine":
        found["final_share"] = FINAL_SHARE.value
    return found


def _takes_muon(base: Run, method: MethodOptions) -> bool:
    if method.name not in OPTIMIZER.methods or method.reads_adam_moments:
        return False
    # Momentum would be about an A that is gone, and moments in 8 bits are AdamW's (docs/methods.md).
    return getattr(method, "reset", "b") != "ab" and base.train.optimizer_state == "fp32"


def with_known_wire(base: Run, method: MethodOptions, open_keys: Collection[str]) -> MethodOptions:
    """Return the options with the message format that a plan proposes, where that is open and allowed."""
    if WIRE.key not in open_keys or method.name not in WIRE.methods or base.cluster.devices == 1:
        return method
    try:
        return type(method).model_validate({**method.model_dump(), "wire": WIRE.value})
    except ValidationError:  # other keys refuse compressed messages
        return method


@dataclass(frozen=True)
class ChoiceMade:
    """A key that the plan chose by itself, and what that is worth."""

    key: str
    value: str
    worth: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value}: {self.worth}"


def choices_of(run: Run, open_keys: Collection[str]) -> Iterator[ChoiceMade]:
    """Yield the choices that a plan made by itself for a run, in the order of the table, the rate last."""
    for known in KNOWN:
        table, _, key = known.key.partition(".")
        is_set = getattr(getattr(run, table), key, None) == known.value
        if known.key in open_keys and is_set and run.method.name in known.methods:
            yield ChoiceMade(known.key, str(known.value), f"{known.figures} ({known.source}); for {known.condition}")
    if RATE in open_keys:
        rate, width = rate_of(run.method.name, run.train.optimizer, run.model.unit), run.shape().width
        falls = f", and falls with the width, {width:,} here" if width > REFERENCE_WIDTH else ""
        worth = f"{rate.value:g} at width {REFERENCE_WIDTH}{falls}; {rate.figures}; try two beside it"
        yield ChoiceMade(RATE, f"{run.train.learning_rate:.2g}", worth)
