"""The schema of run.toml: one run, complete, typed and frozen, validated once where it is built.

Every command starts from a Run, so a run that loads is one that can be planned and trained. The [method] table is
checked by the options of the method that it names, which may come from outside this package, so the schema of a whole
run depends on that name. `lte` calls load_run and build_run; planning copies runs with other values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field, SerializeAsAny, ValidationError, create_model, field_validator, model_validator

from simulate.common import toml_io
from simulate.common.errors import InputError
from simulate.common.live_objects import is_live
from simulate.config.hardware import Profile
from simulate.config.method_options import AdapterOptions, FleetClass, MethodOptions
from simulate.config.method_table import DEFAULT_METHOD, default_options, method_options
from simulate.config.profiles import EMBEDDED, is_profile_path, profile_to_embed
from simulate.config.tables import BPE, BYTES, HUB, Cluster, Data, DeviceClass, Train, data_key
from simulate.models.families.gpt import GptModel
from simulate.models.families.table import Model, check_name, family_of, sees_images
from simulate.models.interfaces import HUGGINGFACE, IMAGES_HINT
from simulate.models.schema import FactoryModel, FactorySampleModel, shape_loaded
from simulate.models.shapes import ModelShape


def _with_default_data(given: Any) -> Any:
    """Name the embedded data where none is named: text, or digits for a model of images; other keys stay."""
    if not isinstance(given, dict) or not isinstance(model := given.get("model", {}), dict):
        return given
    data = given.get("data") or {}
    if not isinstance(data, dict) or data.keys() & {"name", "path"}:
        return given
    embedded = {"name": "digits", "upscale": True} if sees_images(model) else {"name": "stdlib"}
    return {**given, "data": {**embedded, **data}}


def _refuse_images_for_text(model: dict[str, Any], data: dict[str, Any]) -> None:
    """Raise ValueError where the user's network would get tokens, and the data are surely images."""
    are_images = data.get("name") == "digits" or data.get("format", "text") != "text"
    if are_images and family_of(model.get("name", "gpt")) == FactoryModel.family and not sees_images(model):
        raise ValueError(f"model.name = {model['name']!r} would get tokens, and the data are images; {IMAGES_HINT}")


class Run(toml_io.Schema):
    """One run, complete."""

    model: Model = GptModel()
    data: Data = Data(name="stdlib")
    method: SerializeAsAny[MethodOptions] = Field(default_factory=lambda: default_options(DEFAULT_METHOD))
    train: Train = Train()
    cluster: Cluster = Cluster()

    @model_validator(mode="before")
    @classmethod
    def _names_known(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(model := given.get("model"), dict):
            check_name(model.get("name", "gpt"))
            data = given.get("data")
            _refuse_images_for_text(model, data if isinstance(data, dict) else {})
        return _with_default_data(given)

    @field_validator("method", mode="before")
    @classmethod
    def _as_its_options(cls, given: Any) -> Any:
        """Parse the table with the options class of the method that it names, unless the schema fixes that class."""
        if cls.model_fields["method"].annotation is not MethodOptions or not isinstance(given, dict):
            return given
        try:
            options = method_options(given.get("name", DEFAULT_METHOD))
        except InputError as error:  # pydantic collects ValueErrors only
            raise ValueError(str(error)) from None
        return options.model_validate(given)

    @model_validator(mode="after")
    def _consistent(self) -> Run:
        method, devices = self.method, self.cluster.devices
        method.check(self.model, self.train, self.cluster)
        # Every rule names both keys and a way out, since either may be the mistake.
        if self.train.optimizer_state == "8bit" and self.train.dtype == "fp64":
            raise ValueError(
                "train.optimizer_state = '8bit' steps weights in fp32, not in train.dtype = 'fp64'; "
                "try --set train.optimizer_state=fp32"
            )
        if self.train.optimizer == "apollo":
            _check_apollo(self)
        # Torch's autocast leaves fp64 tensors alone, so the key would have no effect.
        if self.train.autocast != "none" and self.train.dtype == "fp64":
            raise ValueError(
                f"train.autocast = {self.train.autocast!r} lowers the precision of fp32, not of train.dtype = 'fp64'; "
                "try --set train.dtype=fp32 or --set train.autocast=none"
            )
        if self.train.activation_checkpointing and isinstance(self.model, FactoryModel):
            raise ValueError(
                f"train.activation_checkpointing = true is for networks with blocks of ours, not for {self.model.name};"
                " recompute inside of the network, or try --set train.activation_checkpointing=false"
            )
        if self.data.shards is not None and len(self.data.shards) != devices:
            raise ValueError(
                f"data.shards has {len(self.data.shards)} sizes for cluster.devices = {devices}; give one a device"
            )
        if isinstance(self.model, FactorySampleModel) and self.model.samples != self.data.name:
            raise ValueError(
                f"model.samples = {self.model.samples!r} is the data set that the network is counted on, and "
                f"data.name = {self.data.name!r} another; plan anew with the data that shall be trained on"
            )
        if self.train.num_warmup_steps >= self.train.steps:
            raise ValueError(
                f"train.warmup_steps = {self.train.warmup_steps} is not below train.steps = {self.train.steps}; "
                "lower it, or give train.warmup_share instead, which fits any number of steps"
            )
        if self.cluster.classes:
            check_classes(self)
        return self

    def of_class(self, index: int) -> Run:
        """Return the run as the devices of one class have it: its values in place of the run's, and no classes."""
        return _of_class(self, index) if self.cluster.classes else self

    def class_of(self, device: int) -> int:
        """Return the index of the class that a device belongs to; 0 where there are no classes."""
        return self.cluster.class_of(device)

    def of_devices(self, devices: range) -> Run:
        """Return the run as some devices of one class have it; raises InputError where they are of several."""
        first, last = self.class_of(devices[0]), self.class_of(devices[-1])
        if first != last:
            raise InputError(
                f"devices {devices[0]} to {devices[-1]} would share a process, and are of class {first} and of class "
                f"{last} of cluster.class; try a process for each device"
            )
        return self.of_class(first)

    @property
    def classes(self) -> list[Run]:
        """The run as each of its classes has it, in order; where there are none, the run itself."""
        classes = self.cluster.classes
        return [_of_class(self, index) for index in range(len(classes))] if classes else [self]

    @property
    def live_keys(self) -> dict[str, str]:
        """Names of objects that only one Python process has, by key of run.toml."""
        keys = {
            "model.name": self.model.name,
            "model.loss": getattr(self.model, "loss", None),
            "data.name": self.data.name,
        }
        return {key: str(name) for key, name in keys.items() if is_live(name)}

    @property
    def heads(self) -> int:
        """Low-rank pairs of a layer over all devices, each counted once (0 for dense methods)."""
        return self.of_class(0).method.num_heads(self.cluster.devices)

    def shape(self) -> ModelShape:
        """Return the network's counts, with the layers that the method adapts."""
        return self.method.shape_of(self.model)

    @property
    def samples_per_step(self) -> int:
        """Samples that all devices together train on in one optimizer step."""
        method = self.of_class(0).method if self.cluster.classes else self.method
        if fleet := method.fleet:
            return sum(len(one.devices) * one.samples for one in fleet)
        train = self.train  # not by device_batch: a plan asks for thousands of candidates
        return method.participants(self.cluster.devices) * train.micro_batch * train.accumulate

    @property
    def device_samples(self) -> tuple[int, ...]:
        """Samples that each device trains on in one optimizer step, in global order."""
        samples = (one.train.device_batch for one in self.classes)
        return tuple(n for n, devices in zip(samples, self.cluster.class_devices, strict=True) for _ in devices)

    @property
    def tokens_per_step(self) -> int:
        """Tokens (for images, samples) that all devices together train on in one optimizer step."""
        return self.samples_per_step * self.model.units_per_sample


def _check_apollo(run: Run) -> None:
    """Raise ValueError where APOLLO has no matrices to project, or none that are large enough."""
    method, rank = run.method, run.train.apollo_rank
    if isinstance(method, AdapterOptions):
        raise ValueError(
            f"train.optimizer = 'apollo' projects gradients of dense matrices, and method.name = {method.name!r} "
            "trains adapters, with small moments already; try --set train.optimizer=adamw, or --set method.name=ddp"
        )
    if run.train.optimizer_state == "8bit":
        raise ValueError(
            "train.optimizer_state = '8bit' is the format of AdamW's moments, and train.optimizer = 'apollo' keeps "
            "few; try --set train.optimizer_state=fp32, or --set train.optimizer=adamw"
        )
    for linear in method.shape_of(run.model).adapted:
        limit = min(linear.in_features, linear.out_features)
        if rank is not None and rank > limit:
            raise ValueError(
                f"train.apollo_rank = {rank} exceeds the shorter side, {limit}, of {linear.name}; "
                f"try --set train.apollo_rank={limit}, or leave it away for a quarter of each matrix's"
            )


@lru_cache(maxsize=256)
def _of_class(run: Run, index: int) -> Run:
    """Return the run of one class; one object for equal runs, since costs are cached by their method's."""
    trains = [run.train.model_copy(update=one.changes("train")) for one in run.cluster.classes]
    # A baseline that takes the place of the run's method may lack keys that classes set for it.
    known = type(run.method).model_fields
    methods = [
        run.method.model_copy(update={key: value for key, value in one.changes("method").items() if key in known})
        for one in run.cluster.classes
    ]
    fleet = tuple(
        FleetClass(devices, train.device_batch, method.num_heads(1), getattr(method, "rank", 0))
        for devices, train, method in zip(run.cluster.class_devices, trains, methods, strict=True)
    )
    cluster = run.cluster.model_copy(update={"classes": ()})
    return run.model_copy(
        update={"cluster": cluster, "train": trains[index], "method": methods[index].in_fleet(fleet, index)}
    )


def check_classes(run: Run) -> None:
    """Raise ValueError where a class of devices is no run by itself, or where classes do not go together."""
    method = run.method
    if not method.takes_classes:
        raise ValueError(
            f"cluster.class makes devices unequal, and method.name = {method.name!r} needs equal ones; leave it away, "
            "or try --set method.name=lte"
        )
    if run.train.diagnostics_every is not None:
        raise ValueError(
            f"train.diagnostics_every = {run.train.diagnostics_every} compares heads of equal devices, and "
            "cluster.class makes them unequal; leave one of them away"
        )
    for index, chosen in enumerate(run.cluster.classes):
        for key, value in chosen.changes("method").items():
            if key not in type(method).model_fields:
                raise ValueError(
                    f"cluster.class[{index}]: {key} = {value!r} is no key of method.name = {method.name!r}; leave it "
                    "away"
                )
        try:
            one = run.of_class(index)
            type(run).model_validate(one.model_dump())
        except ValidationError as error:
            raise ValueError(f"cluster.class[{index}]: {_named_by_class(error, index, chosen)}") from None
    if rule := method.classes_rule([one.method for one in run.classes]):
        raise ValueError(rule)


def _named_by_class(error: ValidationError, index: int, chosen: DeviceClass) -> str:
    """Return the first mistake of a class's run; where keys are the class's own, with their names there."""
    first = error.errors(include_url=False)[0]
    text = str(first["ctx"]["error"]) if first["type"] == "value_error" else str(first["msg"])
    for table in ("train", "method"):
        for key in chosen.changes(table):
            text = text.replace(f"--set {table}.{key}=", f"--set cluster.class.{index}.{key}=")
    return text


@lru_cache(maxsize=64)
def _schema(options: type[MethodOptions]) -> type[Run]:
    """Return the schema of runs of one method, so that errors name that method's own keys."""
    return create_model("Run", __base__=Run, method=(options, Field(default_factory=options)))


def build_run(table: toml_io.Table, where: str = "run", text: str = "", assigned: Collection[str] = ()) -> Run:
    """Validate a parsed run table; errors in keys of `assigned` name the command line. Raises InputError."""
    for name in table:
        if name in Run.model_fields and not isinstance(table[name], dict):
            raise InputError(f"{where}: {name} = {table[name]!r} is not a table; write [{name}] and its keys below it")
    try:
        options = method_options(table.get("method", {}).get("name", DEFAULT_METHOD))
    except InputError as error:
        source = "command line" if "method.name" in assigned else where
        raise InputError(f"{source}: {error}") from None
    # The schema with the method's own options: a Run with the abstract ones would name no key in its errors.
    return toml_io.validate(_schema(options), table, where, text, assigned, example=dict)


WHAT_DATA = frozenset({"name", "path", "format", "field", "subset", "column", "rows"})
"""Keys of [data] that belong to one data set: another path does without them."""


def load_run(path: Path, shape: ModelShape | None = None) -> Run:
    """Read the run.toml of a run folder, whose paths are absolute; raises InputError with file, line and key.

    With the `shape` that its plan has, a network of the user's is not imported to count it.
    """
    text = toml_io.read(path)
    table = toml_io.parse(text, str(path))
    table.pop(EMBEDDED, None)  # profile.toml beside it is the same
    with shape_loaded(shape):
        return build_run(table, str(path), text)


def load_given_run(path: Path, assignments: Sequence[str] = (), data_path: str | None = None) -> Run:
    """Read a run.toml of the user's, put other data in place of its own, and apply `--set` assignments.

    Paths in the file are relative to it, all others to the current folder. An embedded profile is found under the
    file's own path. Raises InputError with file, line and key.
    """
    text = toml_io.read(path)
    table = toml_io.parse(text, str(path))
    if not any(table.values()):
        # A thousand steps of all defaults are nobody's wish.
        missing = ", ".join(f"[{name}]" for name in Run.model_fields)
        raise InputError(f"{path}: has no keys: {missing} are missing; lte plan -o {path} --force writes them")
    _take_from_folder(table, path.parent)
    _name_embedded_profile(table, path)
    if data_path is not None and isinstance(data := table.get("data", {}), dict):
        kept = {key: value for key, value in data.items() if key not in WHAT_DATA}
        table["data"] = kept | {data_key(data_path): data_path}
    assigned = [toml_io.set_key(table, assignment) for assignment in assignments]
    _replace_data(table, assigned)
    return build_run(table, str(path), text, assigned)


def with_absolute_paths(run: Run) -> Run:
    """Return the run with absolute paths, which mean the same wherever its file lies."""
    table = run.model_dump(exclude_none=True)
    _take_from_folder(table, Path.cwd())
    return build_run(table)


def _take_from_folder(table: toml_io.Table, folder: Path) -> None:
    """Let the relative paths of a table start in a folder."""
    rules: tuple[tuple[str, str, str, Callable[[str], bool]], ...] = (
        ("data", "path", "", lambda path: True),
        ("data", "tokenizer", "", lambda path: path != BYTES and not path.startswith(BPE)),
        ("data", "name", HUB, lambda path: (folder / path).is_dir()),
        ("model", "name", f"{HUGGINGFACE}:", lambda path: path.endswith(".json")),
        ("cluster", "profile", "", is_profile_path),
    )
    for section, key, prefix, is_path in rules:
        keys = table.get(section)
        value = keys.get(key) if isinstance(keys, dict) else None
        if isinstance(keys, dict) and isinstance(value, str) and value.startswith(prefix):
            path = value.removeprefix(prefix)
            if path and is_path(path):
                keys[key] = prefix + str(folder / path)  # joined to a folder, an absolute path stays


def _name_embedded_profile(table: toml_io.Table, path: Path) -> None:
    """Let cluster.profile lead to the profile that a run.toml embeds; raises InputError where it names another."""
    embedded, cluster = table.pop(EMBEDDED, None), table.setdefault("cluster", {})
    if not isinstance(embedded, dict) or not isinstance(cluster, dict):
        return
    own = embedded.get("name", EMBEDDED)
    if (named := cluster.get("profile", own)) != own:
        raise InputError(
            f"{path}: cluster.profile = {named!r}, and the table [{EMBEDDED}] is {own!r}; use --set "
            f"cluster.profile={named}, or remove one of them"
        )
    cluster["profile"] = str(path.absolute())


def _replace_data(table: toml_io.Table, assigned: Collection[str]) -> None:
    """Let --set data.path or data.name replace the file's data, with all that belongs to it."""
    data = table.get("data", {})
    if {"data.path", "data.name"} & set(assigned) and isinstance(data, dict):
        for key in WHAT_DATA:
            if f"data.{key}" not in assigned:
                data.pop(key, None)


def dump_run(run: Run, profile: Profile | None = None) -> str:
    """Return the run as TOML text, every key written out; with a profile that lte does not ship, its whole table."""
    embedded = None if profile is None else profile_to_embed(profile)
    if embedded is None:
        return _dump_tables(run)
    table = embedded.model_dump(exclude_none=True)
    return _dump_tables(with_profile_name(run, embedded)) + "\n" + toml_io.dump({EMBEDDED: table})


def _dump_tables(run: Run) -> str:
    table = run.model_dump()
    classes = table["cluster"].pop("class", ())
    return toml_io.dump(table) + toml_io.dump_list("cluster.class", classes)


def with_profile_name(run: Run, profile: Profile) -> Run:
    """Return the run with its profile's name in place of a path, which other machines do not have."""
    if not is_profile_path(run.cluster.profile):
        return run
    return run.model_copy(update={"cluster": run.cluster.model_copy(update={"profile": profile.name})})


def run_fingerprint(run: Run) -> str:
    """Return a digest of all keys of run.toml, to detect that a resumed run was changed."""
    return hashlib.sha256(dump_run(run).encode()).hexdigest()


def without_places(run: Run) -> Run:
    """Return the run as every node of a launch has it: data may lie elsewhere on each, and is compared by content."""
    if run.data.path is None:
        return run
    return run.model_copy(update={"data": run.data.model_copy(update={"path": "PATH"})})
