"""Turn the options of `lte plan` into a run, a profile and pins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simulate.common import toml_io
from simulate.common.errors import InputError
from simulate.config.hardware import LOCAL, Profile
from simulate.config.method_options import AdapterOptions
from simulate.config.method_table import DEFAULT_METHOD, METHOD_NAMES, method_options
from simulate.config.profiles import load_profile
from simulate.config.run import Run, build_run
from simulate.config.tables import BYTE_VALUES, BYTES, Train
from simulate.costs.samples import load_efficiency
from simulate.models.schema import sees_images, text_sizes
from simulate.planning.objective import SelectionCriteria, parse_duration_s, parse_objective
from simulate.planning.planner import Plan, make_plan
from simulate.planning.search_space import Pins

EMBEDDED_BYTES = 500_000
"""That the embedded text has at least, whichever Python's library it is."""
TOKENS_PER_PARAMETER = 20
"""Hoffmann et al. 2022 (arXiv 2203.15556): compute-optimal training takes about 20 tokens a parameter."""
DEMO_TOKENS = 400_000
"""What a request without a model trains on: about a minute on two cores."""
REFERENCE_WIDTH, REFERENCE_RATE = 128, 3e-3
"""The learning rate falls with the width (Yang et al. 2022, arXiv 2203.03466); 3e-3 at 128 was measured to do well."""
_WHERE = "command line"


@dataclass(frozen=True)
class PlanArgs:
    """What the user asked for; None and missing pins leave it to the planner."""

    profile: str | None = None
    model: str | None = None
    data: str | None = None
    devices: int | None = None
    tokens: int | None = None
    """Of a model of images: samples."""
    samples: int | None = None
    """The same, by the name that images go by."""
    pins: Mapping[str, Any] = field(default_factory=dict)
    """Keys of [method]."""
    assignments: tuple[str, ...] = ()
    probe: Path | None = None
    """What lte probe wrote of the same network."""
    link_from: Path | None = None
    """Folder of a launched run, whose links were measured."""
    objective: str = "time"
    within: str | None = None
    efficiency: Path | None = None


def _choice(request: PlanArgs) -> SelectionCriteria:
    """Return how to choose; raises InputError."""
    return SelectionCriteria(
        objective=parse_objective(request.objective),
        efficiency=load_efficiency(request.efficiency) if request.efficiency else None,
        within_s=parse_duration_s(request.within) if request.within is not None else None,
    )


def plan_request(request: PlanArgs, to_train: bool = True) -> Plan:
    """Turn a request into a plan; raises InputError for what is wrong in it.

    A plan that is only looked at may be for more devices than the embedded text has data for.
    """
    choice = _choice(request)
    table: toml_io.Table = {"model": {}, "data": {}, "method": {}, "train": {}, "cluster": {}}
    for assignment in request.assignments:
        toml_io.set_key(table, assignment)
    _put(table, "model", "name", request.model)
    _put(table, "data", "path", request.data)
    _put(table, "cluster", "profile", request.profile)
    _put(table, "cluster", "devices", request.devices)
    for key, value in request.pins.items():
        _put(table, "method", key, value)
        _check_owner(key, value, table["method"].get("name"))
    pins = _pins(table)
    profile = load_profile(str(table["cluster"].setdefault("profile", LOCAL)))
    link_notes: list[str] = []
    if request.link_from is not None:
        profile, said = _with_link_from(request.link_from, profile)
        link_notes.append(said)
    named = bool(table["data"])
    base, notes = _base_run(table, profile)
    notes += link_notes
    if named:
        _check_data(base)
    elif base.model.unit == "tokens":  # what is only a default may be missing or too small until it is trained on
        try:
            _check_data(base)
        except InputError as error:
            if to_train:
                raise
            notes.append(f"to train, name data of yours by --data; {error}")
    tokens = _tokens(request, base, table)
    if request.probe is not None:
        from simulate.planning.probe_ranks import PlanProbe

        choice = replace(choice, probe=PlanProbe(request.probe, base.model.shape()))
    return make_plan(base, profile, tokens, pins, notes, choice)


def _with_link_from(run: Path, profile: Profile) -> tuple[Profile, str]:
    """Return the profile with the links that a launched run measured, and a note that says so; raises InputError."""
    from ltecli.runs.measured_link import link_from, link_text

    link = link_from(run, profile.link)
    said = (
        f"the link is what the nodes of {run} measured, {link_text(link)}, in the place of profile {profile.name}'s; "
        "training goes by the profile: lte profile measure --link-from writes one with that link"
    )
    return profile.model_copy(update={"link": link}), said


def _put(table: toml_io.Table, section: str, key: str, value: Any) -> None:
    if value is None:
        return
    if table[section].get(key, value) != value:
        raise InputError(
            f"{section}.{key} is given twice: {value!r} by its own option and {table[section][key]!r} by --set; "
            "keep one"
        )
    table[section][key] = value


def _check_owner(key: str, value: Any, method: Any) -> None:
    """Raise InputError where a pin is not for the method that is asked for."""
    owners = [name for name in METHOD_NAMES if key in method_options(name).model_fields]
    if value is not None and method in METHOD_NAMES and method not in owners and key != "name":
        option = f"--{key.replace('_', '-')}"
        raise InputError(f"{option} is for {', '.join(owners)}, and the method is {method}; leave {option} away")


def _pins(table: toml_io.Table) -> Pins:
    method, train = table["method"], table["train"]
    return Pins(
        method=method.get("name") or ("lte" if method else None),
        keys=frozenset(method),
        micro_batch=train.get("micro_batch"),
        activation_checkpointing=train.get("activation_checkpointing"),
    )


def _base_run(table: toml_io.Table, profile: Profile) -> tuple[Run, list[str]]:
    """Validate everything given, with what follows from it filled in."""
    notes = []
    embedded = not {"name", "path"} & table["data"].keys()
    if embedded and not sees_images(table["model"]):
        table["data"]["name"] = "stdlib"
    table["cluster"].setdefault("devices", profile.count)
    if table["method"].get("name", "lte") == "lte" and "micro_batch" not in table["train"]:
        heads = table["method"].get("heads_per_device", 1)
        table["train"]["micro_batch"] = heads if isinstance(heads, int) and heads > 0 else 1
    _keep_rank_within_layers(table)
    run = _build(table)
    if embedded and run.model.unit == "samples":
        notes.append(
            "data.name = 'digits', enlarged to the model's pixels, stands for images of yours: name them by --data"
        )
    if "learning_rate" not in table["train"]:
        width = run.model.shape().width
        rate = min(REFERENCE_RATE, REFERENCE_RATE * REFERENCE_WIDTH / width)
        table["train"]["learning_rate"] = rate
        notes.append(f"train.learning_rate = {rate:.2g} is a rule of thumb for width {width}; try two beside it")
        run = _build(table)
    return run, notes


def _keep_rank_within_layers(table: toml_io.Table) -> None:
    """Where no rank was given, let the default be at most what the smallest adapted layer allows."""
    name = table["method"].get("name", DEFAULT_METHOD)
    if name not in METHOD_NAMES or "rank" in table["method"]:
        return
    kind = method_options(name)
    if not issubclass(kind, AdapterOptions):
        return
    shape = _build({**table, "method": {"name": "ddp"}}).model.shape()
    limit = min(min(linear.out_features, linear.in_features) for linear in shape.adapted)
    if limit < kind.model_fields["rank"].default:
        table["method"]["rank"] = limit


def _build(table: toml_io.Table) -> Run:
    """Validate; a long warm-up is not held against steps that are still to be planned."""
    train, warmup = table["train"], table["train"].get("warmup_steps")
    if "steps" in train or not isinstance(warmup, int):
        return build_run(table, _WHERE)
    run = build_run({**table, "train": {**train, "steps": warmup + 1}}, _WHERE)
    given = Train.model_construct(_fields_set=set(train), **dict(run.train))
    return run.model_copy(update={"train": given})


def _check_data(run: Run) -> None:
    if _embedded_fits(run):
        return
    from simulate.data.load import check_data

    check_data(run)


def _embedded_fits(run: Run) -> bool:
    """Whether the embedded text is surely enough, so that nothing need be imported to look at it."""
    data, model = run.data, run.model
    if data.name != "stdlib" or data.tokenizer != BYTES or data.shards is not None or model.unit != "tokens":
        return False
    sizes = text_sizes(model)
    windows = max(10, 2 * run.cluster.devices)  # one in the tenth for validation, one in every device's shard
    return sizes.vocab >= BYTE_VALUES and windows * (sizes.context + 1) <= EMBEDDED_BYTES


def _tokens(request: PlanArgs, base: Run, table: toml_io.Table) -> int:
    given = _given_tokens(request, base.model.unit)
    if given is not None:
        if "steps" in table["train"]:
            raise InputError(f"--{base.model.unit} and train.steps both say how long to train; keep one")
        return given
    if "steps" in table["train"]:
        return base.train.steps * base.tokens_per_step
    if request.model is None and not table["model"]:
        return DEMO_TOKENS
    shape = base.model.shape()
    tokens = TOKENS_PER_PARAMETER * shape.parameters
    return tokens if base.model.unit == "tokens" else max(1, tokens // shape.tokens)


def _given_tokens(request: PlanArgs, unit: str) -> int | None:
    """Return what --tokens or --samples asks for, whichever fits the model."""
    given, other = (request.tokens, request.samples) if unit == "tokens" else (request.samples, request.tokens)
    if other is not None:
        wrong = "samples" if unit == "tokens" else "tokens"
        raise InputError(f"--{wrong} {other}: this model is trained on {unit}; use --{unit}")
    if given is None:
        return None
    if given <= 0:
        raise InputError(f"--{unit} {given}: must be greater than 0; leave it out for 20 tokens a parameter")
    if given > toml_io.LARGEST_INTEGER:
        raise InputError(f"--{unit}: must fit in 64 bits; leave it out for 20 tokens a parameter")
    return given
