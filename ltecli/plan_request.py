"""Turn the options of `lte plan` into a run, a profile and pins, and make the plan.

A key may come from its own option or from --set, but once. Keys that are missing follow from those that are given: the
profile's devices, the embedded text, a rank that fits the smallest layer, a learning rate from the width. `lte plan`
calls plan_request, and so does `lte train` without a run.toml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simulate.common import toml_io
from simulate.common.errors import InputError
from simulate.config.calibration import find_calibration
from simulate.config.hardware import LOCAL, Profile
from simulate.config.method_options import AdapterOptions, MethodOptions
from simulate.config.method_table import BASELINE, DEFAULT_METHOD, METHOD_NAMES, method_options
from simulate.config.profiles import load_profile
from simulate.config.run import Run, build_run
from simulate.config.tables import BYTE_VALUES, BYTES, Data, Train, data_key
from simulate.costs.samples import load_efficiency
from simulate.models.families.table import family_of, sees_images
from simulate.models.schema import FactoryModel, text_sizes
from simulate.planning.best_known import OPEN_KEYS, learning_rate
from simulate.planning.objective import SelectionCriteria, parse_duration_s, parse_objective
from simulate.planning.planner import Plan, make_plan
from simulate.planning.search_space import Pins

EMBEDDED_BYTES = 500_000
"""Lower bound of the embedded text's size, which differs from one Python version to the next."""
TOKENS_PER_PARAMETER = 20
"""Hoffmann et al. 2022 (arXiv 2203.15556): compute-optimal training takes about 20 tokens a parameter."""
ATTENDANCE_KEYS = (
    "cluster.quorum", "cluster.deadline_s", "cluster.merges_given", "cluster.age_exponent", "cluster.min_devices",
    "cluster.rejoin_s", "method.pace", "method.round_deadline_s", "method.steps_taken", "method.merge_delay",
)  # fmt: skip
"""Keys that say who may be missing or late: where one is given, a plan chooses no quorum."""
_WHERE = "command line"


@dataclass(frozen=True)
class PlanArgs:
    """Options of a plan; the planner chooses what is None or not pinned."""

    profile: str | None = None
    model: str | None = None
    data: str | None = None
    devices: int | None = None
    tokens: int | None = None
    """Tokens to train on, for models of text."""
    samples: int | None = None
    """Images to train on, for models of images."""
    batch_tokens: int | None = None
    """Tokens of a step over all devices, to come near to, for models of text."""
    batch_samples: int | None = None
    """Images of a step over all devices, to come near to, for models of images."""
    pins: Mapping[str, Any] = field(default_factory=dict)
    """Keys of [method] that have options of their own."""
    assignments: tuple[str, ...] = ()
    """Further keys, as table.key=value."""
    probe: Path | None = None
    """File that lte probe wrote about the same network."""
    link_from: Path | None = None
    """Folder of a launched run that measured its links."""
    objective: str = "time"
    within: str | None = None
    """Longest time to equal loss: 8h, 3d."""
    efficiency: Path | None = None
    """Samples model of the user, like samples.toml."""


def plan_request(request: PlanArgs, to_train: bool = True) -> Plan:
    """Make the plan of a request; raises InputError for mistakes in it.

    Where `to_train` is False, the default data may be missing or too small for the devices: the plan gets a note.
    """
    criteria = SelectionCriteria(
        objective=parse_objective(request.objective),
        efficiency=load_efficiency(request.efficiency) if request.efficiency else None,
        within_s=parse_duration_s(request.within) if request.within is not None else None,
    )
    table = _given_keys(request)
    pins = _pins(table)
    profile = load_profile(str(table["cluster"].setdefault("profile", LOCAL)))
    _, ignored = find_calibration() if profile.name == LOCAL else (None, "")
    link_notes = [ignored] if ignored else []
    if request.link_from is not None:
        profile, note = _with_measured_link(request.link_from, profile)
        link_notes.append(note)
    # Asked before _base_run fills in the default data.
    names_data = bool(table["data"])
    base, notes = _base_run(table, profile)
    notes += link_notes
    # Default images (digits) fit every model; of default data, only text can be too short.
    if (names_data or base.model.unit == "tokens") and not _embedded_text_suffices(base):
        # Imported only here: most plans are sure of their data without reading it.
        from simulate.data.load import check_data

        try:
            notes += check_data(base)
        except InputError as error:
            if names_data or to_train:
                raise
            notes.append(f"to train, name your own data by --data; {error}")
    batch = _by_unit("batch-", request.batch_tokens, request.batch_samples, base.model.unit)
    if batch is not None:
        pins = replace(pins, batch=batch)
        if pins.micro_batch and pins.accumulate:
            raise InputError(
                f"--batch-{base.model.unit} and train.micro_batch x train.accumulate both say how large a step is; "
                "leave one of the three away"
            )
    tokens = _tokens(request, base, table, batch)
    if request.probe is not None:
        from simulate.planning.probe_ranks import PlanProbe

        criteria = replace(criteria, probe=PlanProbe(request.probe, base.shape()))
    return make_plan(base, profile, tokens, pins, notes, criteria)


def _given_keys(request: PlanArgs) -> toml_io.Table:
    """Return the keys of run.toml that the request gives; raises InputError for one given twice."""
    table: toml_io.Table = {"model": {}, "data": {}, "method": {}, "train": {}, "cluster": {}}
    for assignment in request.assignments:
        toml_io.set_key(table, assignment)
    # --set was applied first, so that a key given both ways shows here.
    _put(table, "model", "name", request.model)
    if request.data is not None:
        _put(table, "data", data_key(request.data), request.data)
    _put(table, "cluster", "profile", request.profile)
    _put(table, "cluster", "devices", request.devices)
    for key, value in request.pins.items():
        _put(table, "method", key, value)
        _check_owner(key, value, table["method"].get("name"))
    return table


def _put(table: toml_io.Table, section: str, key: str, value: Any) -> None:
    """Set a key from its own option, unless the option is not given; raises InputError where --set disagrees."""
    if value is None:
        return
    if table[section].get(key, value) != value:
        raise InputError(
            f"{section}.{key} is given twice: {value!r} by its own option and {table[section][key]!r} by --set; "
            "keep one"
        )
    table[section][key] = value


def _check_owner(key: str, value: Any, method: Any) -> None:
    """Raise InputError for a pin that the chosen method does not have."""
    owners = [name for name in METHOD_NAMES if key in method_options(name).model_fields]
    if value is not None and method in METHOD_NAMES and method not in owners and key != "name":
        option = f"--{key.replace('_', '-')}"
        raise InputError(f"{option} is for {', '.join(owners)}, and the method is {method}; leave {option} away")


def _pins(table: toml_io.Table) -> Pins:
    """Return what the planner must not vary."""
    method, train = table["method"], table["train"]
    return Pins(
        method=method.get("name") or (DEFAULT_METHOD if method else None),
        keys=frozenset(method),
        micro_batch=train.get("micro_batch"),
        accumulate=train.get("accumulate"),
        activation_checkpointing=train.get("activation_checkpointing"),
        open_keys=frozenset(key for key in OPEN_KEYS if not _is_given(table, key)),
        is_quorum_open=not any(_is_given(table, key) for key in ATTENDANCE_KEYS),
    )


def _is_given(table: toml_io.Table, key: str) -> bool:
    section, _, name = key.partition(".")
    return name in table[section]


def _with_measured_link(run: Path, profile: Profile) -> tuple[Profile, str]:
    """Return the profile with the link that a launched run measured, and a note about it; raises InputError."""
    from ltecli.runs.measured_link import link_from, link_text

    link = link_from(run, profile.link)
    note = (
        f"the link is what the nodes of {run} measured, {link_text(link)}, in place of profile {profile.name}'s; "
        "-o run.toml keeps it for training, too"
    )
    return profile.model_copy(update={"link": link}), note


def _base_run(table: toml_io.Table, profile: Profile) -> tuple[Run, list[str]]:
    """Return the run of the given keys with defaults for the others, and notes on those; raises InputError."""
    notes = _take_image_sizes(table)
    embedded = not {"name", "path"} & table["data"].keys()
    if embedded and not sees_images(table["model"]):
        table["data"]["name"] = "stdlib"
    table["cluster"].setdefault("devices", profile.count)
    options = _named_options(table)
    if options is not None and options.heads_split_batch and "micro_batch" not in table["train"]:
        # A device needs at least one sample for each of its heads.
        heads = table["method"].get("heads_per_device", 1)
        table["train"]["micro_batch"] = heads if isinstance(heads, int) and heads > 0 else 1
    if options is not None and issubclass(options, AdapterOptions):
        _limit_default_rank(table, options)
    run = _build(table)
    if embedded and run.model.unit == "samples":
        notes.append(
            "data.name = 'digits', enlarged to the model's pixels, stands in for your images: name them by --data"
        )
    if "learning_rate" not in table["train"]:
        method, optimizer = run.method.name, run.train.optimizer
        table["train"]["learning_rate"] = learning_rate(method, optimizer, run.model.unit, run.shape().width)
        run = _build(table)
    return run, notes


def _take_image_sizes(table: toml_io.Table) -> list[str]:
    """Give a user's network without sizes those of the images at the data's path; return a note where it got some."""
    model, data, name = table["model"], table["data"], table["model"].get("name")
    has_sizes = {"image", "colours", "classes", "context", "vocab", "samples"} & model.keys()
    if not isinstance(name, str) or family_of(name) != FactoryModel.family or has_sizes or "path" not in data:
        return []
    from simulate.data.load import image_source  # other plans are sure of their data without reading it

    source = image_source(toml_io.validate(Data, data, _WHERE))
    if source is None:
        return []
    model |= {"image": source.pixels, "colours": source.colours, "classes": len(source.classes)}
    sizes = ", ".join(f"model.{key} = {model[key]}" for key in ("image", "colours", "classes"))
    return [f"{sizes} are those of {data['path']}; --set others if the network wants them"]


def _named_options(table: toml_io.Table) -> type[MethodOptions] | None:
    """Return the options class of the table's method; None for a name that `_build` refuses or imports."""
    name = table["method"].get("name", DEFAULT_METHOD)
    return method_options(name) if name in METHOD_NAMES else None


def _limit_default_rank(table: toml_io.Table, options: type[AdapterOptions]) -> None:
    """Lower the method's default rank to the smallest adapted layer's size; a given rank stays."""
    if "rank" in table["method"]:
        return
    # The baseline stands in, as it has no rank that could be too large; it needs all devices, whatever the run does.
    cluster = {key: value for key, value in table["cluster"].items() if key in ("profile", "devices")}
    shape = _build({**table, "method": {"name": BASELINE}, "cluster": cluster}).model.shape()
    limit = min(min(linear.out_features, linear.in_features) for linear in shape.adapted)
    if limit < options.model_fields["rank"].default:
        table["method"]["rank"] = limit


def _build(table: toml_io.Table) -> Run:
    """Validate the keys; a warm-up longer than the default steps passes, since the planner sets the steps later."""
    train, warmup = table["train"], table["train"].get("warmup_steps")
    if "steps" in train or not isinstance(warmup, int):
        return build_run(table, _WHERE)
    run = build_run({**table, "train": {**train, "steps": warmup + 1}}, _WHERE)
    # Only given keys count as set, so that the planner replaces the steps that stood in.
    given = Train.model_construct(_fields_set=set(train), **dict(run.train))
    return run.model_copy(update={"train": given})


def _embedded_text_suffices(run: Run) -> bool:
    """Whether the run's data is the embedded text and surely long enough; saves the imports of a closer look."""
    data, model = run.data, run.model
    if data.name != "stdlib" or data.tokenizer != BYTES or data.shards is not None or model.unit != "tokens":
        return False
    sizes = text_sizes(model)
    # A tenth of the text is for validation and must hold one window; so must every device's shard.
    windows = max(10, 2 * run.cluster.devices)
    return sizes.vocab >= BYTE_VALUES and windows * (sizes.context + 1) <= EMBEDDED_BYTES


def _tokens(request: PlanArgs, base: Run, table: toml_io.Table, batch: int | None) -> int:
    """Return how long to train, in tokens or images; raises InputError where two options say so."""
    given = _by_unit("", request.tokens, request.samples, base.model.unit)
    if given is not None:
        if "steps" in table["train"]:
            raise InputError(f"--{base.model.unit} and train.steps both say how long to train; keep one")
        return given
    if "steps" in table["train"]:
        return base.train.steps * (batch or base.tokens_per_step)
    shape = base.shape()
    # Of images, a sample counts as many tokens as the network makes of it.
    tokens = TOKENS_PER_PARAMETER * shape.parameters
    return tokens if base.model.unit == "tokens" else max(1, tokens // shape.tokens)


def _by_unit(prefix: str, tokens: int | None, samples: int | None, unit: str) -> int | None:
    """Return the value of --PREFIXtokens or --PREFIXsamples, whichever fits the model; raises InputError otherwise."""
    given, other = (tokens, samples) if unit == "tokens" else (samples, tokens)
    if other is not None:
        wrong = "samples" if unit == "tokens" else "tokens"
        raise InputError(f"--{prefix}{wrong} {other}: this model is trained on {unit}; use --{prefix}{unit}")
    default = "a batch that the plan chooses" if prefix else "20 tokens a parameter"
    if given is not None and given <= 0:
        raise InputError(f"--{prefix}{unit} {given}: must be greater than 0; leave it out for {default}")
    if given is not None and given > toml_io.LARGEST_INTEGER:
        raise InputError(f"--{prefix}{unit}: must fit in 64 bits; leave it out for {default}")
    return given
