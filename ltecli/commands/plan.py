"""lte plan: from a request to a plan, shown, or written as run.toml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltecli.candidates import Candidate, Rejected, candidate_of, describe
from ltecli.errors import NothingFeasibleError
from ltecli.grid import Pins
from ltecli.objective import Choice, parse_duration_s, parse_objective
from ltecli.output import Output, bytes_text, plain_table, range_text, seconds_text
from ltecli.planner import Plan, make_plan
from ltecli.ranges import equivalent_range, time_range, wall_range
from simulate import toml
from simulate.config import BYTE_VALUES, BYTES, Run, Train, build_run, dump_run
from simulate.costs.samples import load_efficiency
from simulate.errors import InputError
from simulate.hardware import LOCAL, Profile, load_profile
from simulate.models.options import sees_images, text_sizes
from simulate.options import METHODS, AdapterOptions

if TYPE_CHECKING:
    from ltecli.commands.explain import Explained, Extras
    from simulate.tracking import Tracked

EMBEDDED_BYTES = 500_000
"""That the embedded text has at least, whichever Python's library it is."""
TOKENS_PER_PARAMETER = 20
"""Hoffmann et al. 2022 (arXiv 2203.15556): compute-optimal training takes about 20 tokens a parameter."""
DEMO_TOKENS = 400_000
"""What a request without a model trains on: about a minute on two cores."""
REFERENCE_WIDTH, REFERENCE_RATE = 128, 3e-3
"""The learning rate falls with the width (Yang et al. 2022, arXiv 2203.03466); 3e-3 at 128 was measured to do well."""
COLUMNS = ("memory/device", "sent/round", "sent/step", "step", "round", "wall", "x samples", "to equal loss")
SECONDARY = ("sent/round", "step", "round", "x samples")
"""Columns that a narrow terminal can do without."""
_WHERE = "command line"


@dataclass(frozen=True)
class Request:
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


def plan_command(
    request: Request, out: Path | None, force: bool, top: int, as_json: bool, extras: Extras | None = None,
    verify: bool = False,
) -> int:  # fmt: skip
    """Plan, show, and write the choice where `out` asks for it; raises NothingFeasibleError where nothing fits.

    With `verify`, follow the choice's own program without numbers, and set what it was seen to hold beside the plan.
    """
    if out is not None:
        check_target(out, force)
    if extras is not None:
        extras.check()
    plan = plan_request(request, to_train=out is not None)
    output = Output(as_json)
    explained = _explained(plan, extras)
    verified = verify_choice(plan) if verify and plan.chosen is not None else None
    if as_json:  # thousands of candidates, which nobody else reads
        added = explained.to_dict() if explained else {"why": None, "timeline": None}
        output.json({**plan.to_dict(), **added, **({"verify": asdict(verified)} if verified else {})})
    _show(plan, output, top)
    if explained is not None and extras is not None:
        from ltecli.commands.explain import show_explained

        show_explained(plan, explained, extras, output)
    if verified and plan.chosen:
        _show_verified(plan.chosen, verified, output)
    if plan.chosen is None:
        raise NothingFeasibleError(nearest_miss_text(plan))
    if out is not None:
        try:
            toml.write_atomically(out, dump_run(plan.chosen.run).encode())
        except OSError as error:
            raise InputError(f"--out {out} cannot be written ({error.strerror}); choose another folder") from None
        output.hint(f"wrote {out}; next: lte train {out}")
    else:
        output.hint("next: lte plan ... -o run.toml, then lte train run.toml")
    return 0


def _explained(plan: Plan, extras: Extras | None) -> Explained | None:
    """Work out what else was asked for; the simulation and its numpy are loaded only then."""
    if extras is None or not (extras.why or extras.wants_timeline):
        return None
    from ltecli.commands.explain import explain_plan

    return explain_plan(plan, extras)


def _choice(request: Request) -> Choice:
    """Return how to choose; raises InputError."""
    return Choice(
        objective=parse_objective(request.objective),
        efficiency=load_efficiency(request.efficiency) if request.efficiency else None,
        within_s=parse_duration_s(request.within) if request.within is not None else None,
    )


def plan_request(request: Request, to_train: bool = True) -> Plan:
    """Turn a request into a plan; raises InputError for what is wrong in it.

    A plan that is only looked at may be for more devices than the embedded text has data for.
    """
    choice = _choice(request)
    table: toml.Table = {"model": {}, "data": {}, "method": {}, "train": {}, "cluster": {}}
    for assignment in request.assignments:
        toml.set_key(table, assignment)
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
        from ltecli.probing import PlanProbe

        choice = replace(choice, probe=PlanProbe(request.probe, base.model.shape()))
    return make_plan(base, profile, tokens, pins, notes, choice)


def _with_link_from(run: Path, profile: Profile) -> tuple[Profile, str]:
    """Return the profile with the links that a launched run measured, and a note that says so; raises InputError."""
    from ltecli.linking import link_from, link_text

    link = link_from(run, profile.link)
    said = (
        f"the link is what the nodes of {run} measured, {link_text(link)}, in the place of profile {profile.name}'s; "
        "training goes by the profile: lte profile measure --link-from writes one with that link"
    )
    return profile.model_copy(update={"link": link}), said


def _put(table: toml.Table, section: str, key: str, value: Any) -> None:
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
    owners = [name for name, options in METHODS.items() if key in options.model_fields]
    if value is not None and method in METHODS and method not in owners and key != "name":
        option = f"--{key.replace('_', '-')}"
        raise InputError(f"{option} is for {', '.join(owners)}, and the method is {method}; leave {option} away")


def _pins(table: toml.Table) -> Pins:
    method, train = table["method"], table["train"]
    return Pins(
        method=method.get("name") or ("lte" if method else None),
        keys=frozenset(method),
        micro_batch=train.get("micro_batch"),
        activation_checkpointing=train.get("activation_checkpointing"),
    )


def _base_run(table: toml.Table, profile: Profile) -> tuple[Run, list[str]]:
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


def _keep_rank_within_layers(table: toml.Table) -> None:
    """Where no rank was given, let the default be at most what the smallest adapted layer allows."""
    kind = METHODS.get(table["method"].get("name", "lte"))
    if kind is None or not issubclass(kind, AdapterOptions) or "rank" in table["method"]:
        return
    shape = _build({**table, "method": {"name": "ddp"}}).model.shape()
    limit = min(min(linear.out_features, linear.in_features) for linear in shape.adapted)
    if limit < kind.model_fields["rank"].default:
        table["method"]["rank"] = limit


def _build(table: toml.Table) -> Run:
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
    from simulate.data.sources import check_data

    check_data(run)


def _embedded_fits(run: Run) -> bool:
    """Whether the embedded text is surely enough, so that nothing need be imported to look at it."""
    data, model = run.data, run.model
    if data.name != "stdlib" or data.tokenizer != BYTES or data.shards is not None or model.unit != "tokens":
        return False
    sizes = text_sizes(model)
    windows = max(10, 2 * run.cluster.devices)  # one in the tenth for validation, one in every device's shard
    return sizes.vocab >= BYTE_VALUES and windows * (sizes.context + 1) <= EMBEDDED_BYTES


def _tokens(request: Request, base: Run, table: toml.Table) -> int:
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


def _given_tokens(request: Request, unit: str) -> int | None:
    """Return what --tokens or --samples asks for, whichever fits the model."""
    given, other = (request.tokens, request.samples) if unit == "tokens" else (request.samples, request.tokens)
    if other is not None:
        wrong = "samples" if unit == "tokens" else "tokens"
        raise InputError(f"--{wrong} {other}: this model is trained on {unit}; use --{unit}")
    if given is None:
        return None
    if given <= 0:
        raise InputError(f"--{unit} {given}: must be greater than 0; leave it out for 20 tokens a parameter")
    if given > toml.LARGEST_INTEGER:
        raise InputError(f"--{unit}: must fit in 64 bits; leave it out for 20 tokens a parameter")
    return given


def check_target(out: Path, force: bool, name: str = "run.toml") -> None:
    """Raise InputError where a file cannot be written; `name` is what it could be called."""
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; name a file in it, for example {out / name}")
    if out.exists() and not force:
        raise InputError(f"--out {out} exists; add --force to replace it, or choose another name")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: {out.parent} is no folder; create it first, or choose another")


def nearest_miss_text(plan: Plan) -> str:
    """Return what comes closest to fitting, and what would make it fit."""
    miss = plan.nearest_miss()
    assert miss is not None, "a plan without candidates has rejected at least one"
    if miss.late_s > 0:
        return (
            f"nothing reaches equal loss within {seconds_text(plan.choice.within_s)}: the nearest miss is "
            f"{describe(miss.candidate.run)}, which needs {seconds_text(miss.candidate.equivalent_wall_s)}; allow more "
            "--within, train on fewer tokens, or add devices"
        )
    model, places = plan.base.model, {"device": miss.short_bytes, "host": miss.host_short_bytes}
    more = " and ".join(f"{bytes_text(size)} more on each {place}" for place, size in places.items() if size)
    keys = [model.larger_with] if miss.short_bytes else []  # which activations grow with, and no host memory
    layers = getattr(model, "layers", None)
    keys += [] if layers is None else [f"model.layers (now {layers})"]
    return (
        f"nothing fits profile {plan.profile.name}: the nearest miss is {describe(miss.candidate.run)}, which "
        f"{miss.reason}; {more} would do" + (f", or a smaller --set {' or '.join(keys)}" if keys else "")
    )


def _show(plan: Plan, output: Output, top: int) -> None:
    shape, base = plan.base.model.shape(), plan.base
    output.heading(
        f"{shape.name}: {shape.parameters:,} parameters ({shape.adapted_parameters:,} adapted), "
        f"{plan.tokens:,} {base.model.unit} on {base.cluster.devices} x {plan.profile.name}"
    )
    link = plan.profile.link
    output.text(
        f"planned: {len(plan.candidates):,} candidates fit, {len(plan.rejected):,} do not; link {link.topology}, "
        f"{bytes_text(link.up_bytes_per_s)}/s up, {bytes_text(link.down_bytes_per_s)}/s down, "
        f"{seconds_text(link.latency_s)} latency"
    )
    if plan.candidates:
        output.table(_candidate_table(plan, top), secondary=SECONDARY)
    if plan.rejected:
        output.text(f"rejected, for example: {_example(plan.rejected)}")
    if plan.chosen is not None:
        _show_choice(plan, plan.chosen, output)
    if plan.rivals:
        output.text("")
        output.heading("other methods, each at its best here; plan one with --method NAME")
        output.table(_rival_table(plan), secondary=SECONDARY)
    for note in plan.notes:
        output.text(f"note: {note}")


def _candidate_table(plan: Plan, top: int) -> Any:
    """Return the best candidates, and the choice wherever it ranks."""
    table = plain_table("#", "method", *COLUMNS)
    table.columns[1].justify = "left"
    for index, candidate in enumerate(plan.candidates, 1):
        if index > top and candidate is not plan.chosen:
            continue
        mark = "*" if candidate is plan.chosen else ""
        table.add_row(
            f"{index}{mark}",
            describe(candidate.run) + (" (!)" if candidate.warnings else ""),
            *_cells(candidate),
        )
    return table


def _cells(candidate: Candidate) -> list[str]:
    return [
        bytes_text(candidate.memory.total),
        bytes_text(candidate.sent_bytes_per_round),
        bytes_text(candidate.sent_bytes_per_round / candidate.time.steps),
        seconds_text(candidate.step_s),
        seconds_text(candidate.time.round_s),
        range_text(*wall_range(candidate)),
        f"{candidate.samples_factor:.2f}",
        range_text(*equivalent_range(candidate)),
    ]


def _rival_table(plan: Plan) -> Any:
    """Return the best of each method that was not chosen from, fastest to equal loss first."""
    table = plain_table("method", *COLUMNS)
    table.columns[0].justify = "left"
    ranked = sorted(plan.rivals, key=lambda rival: candidate_of(rival).equivalent_wall_s)
    for rival in sorted(ranked, key=lambda rival: isinstance(rival, Rejected)):
        unfit = " (does not fit)" if isinstance(rival, Rejected) else ""
        table.add_row(describe(candidate_of(rival).run) + unfit, *_cells(candidate_of(rival)))
    return table


def _example(rejected: tuple[Rejected, ...]) -> str:
    nearest = min(rejected, key=lambda r: r.missing)
    return f"{describe(nearest.candidate.run)} {nearest.reason}"


def _show_choice(plan: Plan, chosen: Candidate, output: Output) -> None:
    dense = plan.dense.candidate if isinstance(plan.dense, Rejected) else plan.dense
    output.text("")
    output.heading(f"chosen: {describe(chosen.run)}")
    table = plain_table(
        "per device, planned", describe(chosen.run), f"dense: {describe(dense.run)}" if dense else "dense"
    )
    ours, theirs = _figures(chosen), _figures(dense) if dense else {}
    for name, value in ours.items():
        table.add_row(name, value, theirs.get(name, "-"))
    output.table(table)
    if isinstance(plan.dense, Rejected):
        output.text(f"dense does not fit: {plan.dense.reason}")
    elif dense and chosen is not dense:
        output.text(_comparison(chosen, dense))
    phases = (f"{_phase(name)} {bytes_text(size)}" for name, size in chosen.memory_by_phase.items())
    output.text(f"memory by phase: {', '.join(phases)}")
    if chosen.host_memory_bytes:
        parts = (f"{_phase(name)} {bytes_text(size)}" for name, size in chosen.host_memory_by_part.items() if size)
        output.text(f"host memory: {bytes_text(chosen.host_memory_bytes)} ({', '.join(parts)})")
    for warning in chosen.warnings:
        output.text(f"warning: {warning}")


def _phase(name: str) -> str:
    return name.replace("_", " ")


def verify_choice(plan: Plan) -> Tracked:
    """Follow what the chosen run holds; raises InputError where it cannot be followed."""
    assert plan.chosen is not None
    run = plan.chosen.run
    from simulate.tracking import tracked_memory

    return tracked_memory(run, with_host=plan.tightest_device().host_memory_bytes == 0)


def _show_verified(chosen: Candidate, verified: Tracked, output: Output) -> None:
    """Set planned beside tracked bytes, part by part; then what an allocator and the system add.

    A round's figures depend on numbers, so they are planned only.
    """
    followed = replace(chosen.heights, phases=tuple(x for x in chosen.heights.phases if x.name != "round_figures"))
    memory = followed.peak()
    output.text("")
    table = plain_table("memory of the choice, per device", "planned", "tracked", "difference")
    planned = memory.parts()
    reserved = planned.pop("reserved")
    for part, size in planned.items():
        table.add_row(part, bytes_text(size), bytes_text(verified.by_part[part]), "")
    total = memory.total - reserved
    share = f"{total / verified.tracked_bytes - 1:+.2%}"
    table.add_row("peak", bytes_text(total), bytes_text(verified.tracked_bytes), share)
    output.table(table)
    if len(followed.phases) < len(chosen.heights.phases):
        height = chosen.memory_by_phase["round_figures"] - reserved
        output.text(
            f"not followed, since they depend on numbers: figures of a round, {bytes_text(height)} as planned, and the "
            "directions that they keep, which the planned optimizer state includes"
        )
    output.text(
        f"with the CUDA allocator's rounding and segments {bytes_text(verified.allocator_bytes)}; the system and its "
        f"context reserve {bytes_text(reserved)} more"
    )


def _figures(candidate: Candidate) -> dict[str, str]:
    """Return what one device is planned to need, line by line."""
    steps, stops = candidate.time.steps, candidate.pauses
    return {
        "memory at peak": bytes_text(candidate.memory.total),
        **{f"  {part}": bytes_text(size) for part, size in candidate.memory.parts().items()},
        "sent per round": f"{bytes_text(candidate.sent_bytes_per_round)} / {steps} step{'s' if steps > 1 else ''}",
        "sent per step": bytes_text(candidate.sent_bytes_per_round / steps),
        "compute per step": range_text(*time_range(candidate, candidate.time.compute_s, 0.0)),
        "exchange per round": range_text(*time_range(candidate, 0.0, candidate.time.exchange_s)),
        "evaluations": _times(stops.evaluations, stops.evaluation_s),
        "checkpoints": _times(stops.saves, stops.save_s),
        f"wall-clock for the {candidate.run.model.unit}": range_text(*wall_range(candidate)),
        "assumed to equal loss": range_text(*equivalent_range(candidate)),
    }


def _times(count: int, seconds: float | None) -> str:
    return f"{count:,} x {seconds_text(seconds)}"


def _comparison(chosen: Candidate, dense: Candidate) -> str:
    ratio = dense.equivalent_wall_s / chosen.equivalent_wall_s
    sent = dense.sent_bytes_per_round / dense.time.steps, chosen.sent_bytes_per_round / chosen.time.steps
    wires = f"{sent[0] / sent[1]:.1f}x fewer bytes a step" if sent[1] else "no bytes either way"
    memory = dense.memory.total / chosen.memory.total
    return f"beside dense: {ratio:.2f}x as fast to equal loss (assumed samples), {wires}, {memory:.2f}x less memory"
