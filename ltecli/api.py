"""The API: lte.plan, lte.train and lte.open, for scripts and notebooks; docs/api.md is its reference.

Each function calls what the command of its name calls, with the same names for the same things, so that both give the
same plan and the same run. What Python adds: networks, data sets and losses may be objects, events go to a function,
and results are values. Mistakes raise InputError, a plan without a choice NothingFeasibleError, a run that fails
RunFailedError; nothing is written to stdout. torch is imported by what needs it, as in the commands.
"""

from __future__ import annotations

import html
import io
import logging
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltecli.commands.export import merged_weights, newest_checkpoint
from ltecli.commands.launch import LaunchArgs
from ltecli.commands.plan import LINE, nearest_miss_text, show_details, show_verdict
from ltecli.commands.report import show_one
from ltecli.commands.train import RUNS, TrainArgs, train_run
from ltecli.console import Output, text_of
from ltecli.environment import set_defaults_of_libraries
from ltecli.errors import INTERRUPTED
from ltecli.plan_request import PlanArgs, plan_request
from ltecli.runs.figures import RunRecord, figures, metrics, read_run
from ltecli.runs.run_folder import check_run_folder, stored_shape
from simulate.common import toml_io
from simulate.common.errors import InputError, NothingFeasibleError, RunFailedError, near_match
from simulate.common.events import Emit, Event
from simulate.common.live_objects import is_live
from simulate.common.quantities import read_count
from simulate.common.run_files import RUN_FILE
from simulate.config.run import Run as RunConfig
from simulate.config.run import dump_run, load_run
from simulate.config.tables import Train
from simulate.models.families.table import family_of
from simulate.models.schema import FactoryModel
from simulate.planning.candidate import Candidate, describe
from simulate.planning.planner import Plan as PlannerPlan
from simulate.planning.verdict import Verdict, verdict_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.text import Text
    from torch import Tensor, nn

    Loss = Callable[[Tensor, Tensor], Tensor]
    Metrics = Any
    """A pandas.DataFrame, or a list of dicts where pandas is not installed."""

__all__ = ["InputError", "NothingFeasibleError", "Plan", "Report", "Run", "RunFailedError", "open", "plan", "train"]

logger = logging.getLogger("lte")


def plan(
    profile: str | Path | None = None,
    *,
    model: str | nn.Module | None = None,
    data: str | Path | Iterable[Any] | None = None,
    method: str | None = None,
    loss: str | Loss | None = None,
    validation: Iterable[Any] | None = None,
    batched: bool = False,
    devices: int | None = None,
    tokens: int | str | None = None,
    samples: int | str | None = None,
    batch_tokens: int | str | None = None,
    batch_samples: int | str | None = None,
    rank: int | None = None,
    heads_per_device: int | None = None,
    quantize: str | None = None,
    merge_every: int | None = None,
    objective: str = "time",
    within: str | None = None,
    probe: str | Path | None = None,
    link_from: str | Path | None = None,
    efficiency: str | Path | None = None,
    set: Mapping[str, Any] | None = None,
    **train: Any,
) -> Plan:
    """Find what fits the hardware and what it costs, and choose, as `lte plan` does; nothing is written.

    Arguments are the command's options. `model`, `data` and `loss` may also be objects: a network; a torch data set, a
    pair of tensors or an iterable of (input, target), with `batched` of batches; a function of (outputs, targets).
    `validation` is another data set to evaluate on. `set` has further keys, as {"table.key": value}, and keywords that
    are none of these are keys of [train]. Raises InputError.
    """
    set_defaults_of_libraries()
    given = _given(model, data, loss, validation, batched)
    if loss is not None and not given.is_own:
        raise InputError(f"loss is for networks of your own, and model = {model!r} is trained with cross-entropy")
    request = PlanArgs(
        profile=None if profile is None else str(profile),
        model=given.model,
        data=given.data,
        devices=devices,
        tokens=_count("tokens", tokens),
        samples=_count("samples", samples),
        batch_tokens=_count("batch_tokens", batch_tokens),
        batch_samples=_count("batch_samples", batch_samples),
        pins={
            "name": method,
            "rank": rank,
            "heads_per_device": heads_per_device,
            "quantize": quantize,
            "merge_every": merge_every,
        },
        assignments=(*given.assignments, *_assignments(set, train, plan)),
        probe=_path(probe),
        link_from=_path(link_from),
        objective=objective,
        within=within,
        efficiency=_path(efficiency),
    )
    # As the command without -o: a plan may be looked at before there is data for it; train() checks the data.
    return Plan(plan_request(request, to_train=False), given.held)


def train(
    run: str | Path | Plan | Run | RunConfig | None = None,
    *,
    out: str | Path | None = None,
    data: str | None = None,
    device: str = "auto",
    launch: bool = False,
    processes: int | None = None,
    diagnostics: bool = False,
    tiny: bool = False,
    ignore_memory: bool = False,
    on_event: Emit | None = None,
    quiet: bool = True,
    set: Mapping[str, Any] | None = None,
    **keys: Any,
) -> Run:
    """Train a run to its end as `lte train` does, simulated here or with `launch` for real; returns it.

    `run` is the path of a run.toml, a plan, a run to train anew, or None for a run that is planned now. The folder is
    `out`; without it a run.toml's is runs/NAME as on the command line, and others' the first runs/NAME-N that is free.
    `on_event` gets each event as a dict; what it raises ends the run with a checkpoint, and is raised here. `set` and
    further keywords are as in lte.plan. Raises InputError, NothingFeasibleError, RunFailedError, and KeyboardInterrupt
    after Ctrl-C, which saves a checkpoint first.
    """
    set_defaults_of_libraries()
    held: tuple[object, ...] = ()
    given: Path | RunConfig | None
    if isinstance(run, Plan):
        if run.chosen is None:
            raise NothingFeasibleError(nearest_miss_text(run.planned))
        given, held = run.chosen.run, run.held
    elif isinstance(run, Run):
        given, held = run.config, run.held
    else:
        given = Path(run) if isinstance(run, str) else run
    if data is not None and isinstance(given, RunConfig):
        raise InputError(f"data = {data!r} replaces that of a run.toml; give it to lte.plan")
    folder = _path(out)
    if folder is None and isinstance(given, RunConfig):
        folder = _free_folder(given.model.name)
    args = TrainArgs(data, tuple(_assignments(set, keys, train)), diagnostics, tiny)
    options = LaunchArgs(processes=processes)
    options.check(launch)
    output = _ApiOutput(quiet)
    path, code = train_run(
        given, folder, False, device, args, options if launch else None, output, ignore_memory, on_event, processes
    )
    return _trained(path, code, held)


def open(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    validation: Iterable[Any] | None = None,
    batched: bool = False,
) -> Run:
    """Return the run of an existing run folder. Raises InputError where there is none.

    A run that was trained with objects of another Python process needs them again, to be resumed or to give its
    weights: what is given must compute as it did then, from the same start weights and samples, or it is refused.
    """
    set_defaults_of_libraries()
    folder = Path(path)
    check_run_folder(folder)
    given = _given(model, data, loss, validation, batched)
    table = toml_io.parse(toml_io.read(folder / RUN_FILE), str(folder / RUN_FILE))
    for section, key, name in (
        ("model", "name", given.model),
        ("data", "name", given.data),
        ("model", "loss", given.loss),
    ):
        was = table.get(section, {}).get(key)
        if name is not None and name != was:
            raise InputError(
                f"{folder} was trained with {section}.{key} = {was!r}, and what is given is {name!r}: its weights, "
                "samples, settings or code differ, so that the run could not go on as it began; give what it was, or "
                "plan anew"
            )
    return Run(folder, given.held)


class Plan:
    """A plan: the verdict, the choice and all candidates; `print` shows what `lte plan` prints."""

    def __init__(self, planned: PlannerPlan, held: tuple[object, ...] = ()) -> None:
        self.planned, self.held = planned, held

    @property
    def verdict(self) -> Verdict:
        """The answers to can it, how long and is it worth it, and the warnings."""
        return verdict_of(self.planned)

    @property
    def chosen(self) -> Candidate | None:
        """The choice; None where nothing fits."""
        return self.planned.chosen

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All candidates that fit, the best ones first."""
        return self.planned.candidates

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the plan: what was assumed, and what becomes of the network's layers."""
        return self.planned.notes

    def to_dict(self, top: int | None = None) -> dict[str, Any]:
        """Return the plan as `lte plan --json` prints it; with `top`, the best candidates."""
        return {**self.planned.to_dict(top), "verdict": self.verdict.to_dict()}

    def details(self) -> str:
        """Return the text of `lte plan --all`: figures, candidates and notes."""
        return text_of(lambda output: show_details(self.planned, output))

    def run_toml(self) -> str:
        """Return the choice as the run.toml that `lte plan -o run.toml` writes; raises NothingFeasibleError."""
        if self.chosen is None:
            raise NothingFeasibleError(nearest_miss_text(self.planned))
        return dump_run(self.chosen.run, self.planned.profile)

    def train(
        self,
        *,
        out: str | Path | None = None,
        device: str = "auto",
        launch: bool = False,
        processes: int | None = None,
        diagnostics: bool = False,
        ignore_memory: bool = False,
        on_event: Emit | None = None,
        quiet: bool = True,
        set: Mapping[str, Any] | None = None,
        **keys: Any,
    ) -> Run:
        """Train the choice, as lte.train does; `keys` are keys of [train], as in plan.train(steps=60)."""
        return train(
            self, out=out, device=device, launch=launch, processes=processes, diagnostics=diagnostics,
            ignore_memory=ignore_memory, on_event=on_event, quiet=quiet, set=set, **keys,
        )  # fmt: skip

    def __str__(self) -> str:
        text = text_of(lambda output: show_verdict(self.verdict, output))
        lines = [line for note in self._start_notes() for line in ("", *textwrap.wrap(f"note: {note}", LINE))]
        return "\n".join([text, *lines])

    def __repr__(self) -> str:
        chosen = "nothing fits" if self.chosen is None else describe(self.chosen.run)
        return f"<lte.Plan {self.verdict.title}: {chosen}>"

    def _repr_html_(self) -> str:
        """Return the verdict as a notebook shows it."""
        verdict = self.verdict
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(x.question)}</th>"
            f"<td style='text-align:left'>{html.escape(x.answer)}</td>"
            f"<td style='text-align:left'>{html.escape(x.because)}</td></tr>"
            for x in verdict.answers
        )
        items = "".join(f"<li>{html.escape(text)}</li>" for text in (*verdict.warnings, *self._start_notes()))
        return f"<b>{html.escape(verdict.title)}</b><table>{rows}</table>" + (f"<ul>{items}</ul>" if items else "")

    def _start_notes(self) -> list[str]:
        """Return the note on the start weights of a network that is an object."""
        name = self.planned.base.model.name
        return [note for note in self.notes if is_live(name) and note.startswith(f"{name}: the run starts")]


class Report(dict[str, Any]):
    """The figures that `lte report --json` prints; `print` shows the text of `lte report`."""

    def __init__(self, record: RunRecord) -> None:
        super().__init__(figures(record))
        self._record = record

    def __str__(self) -> str:
        return text_of(lambda output: show_one(self._record, self, output))

    __repr__ = __str__


@dataclass(frozen=True)
class Run:
    """A run folder: its run, its figures and its weights. All are read when they are asked for."""

    path: Path
    held: tuple[object, ...] = ()
    """Objects that the run names."""

    @property
    def config(self) -> RunConfig:
        """The run.toml, validated."""
        return load_run(self.path / RUN_FILE, stored_shape(self.path))

    @property
    def events(self) -> list[Event]:
        """All events so far, as dicts with a kind and a step."""
        return list(self._record().events)

    @property
    def is_finished(self) -> bool:
        """Whether the last step is done."""
        record = self._record()
        step = record.last("step")
        return step is not None and step["step"] == record.run.train.steps

    @property
    def metrics(self) -> Metrics:
        """A row for each logged step, as a pandas.DataFrame, or as a list of dicts where pandas is not installed."""
        rows = metrics(self._record())
        try:
            import pandas
        except ImportError:
            return rows
        return pandas.DataFrame(rows)

    def report(self) -> Report:
        """Return planned, simulated, counted and measured figures; printed, they are `lte report`."""
        return Report(self._record())

    def plot(self) -> Figure:
        """Return a figure of the losses over the steps; raises InputError where matplotlib is not installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise InputError("run.plot() needs matplotlib, which is not installed: pip install matplotlib") from None

        class Picture(Figure):
            """A figure that notebooks show without pyplot, whose state other threads would share."""

            def _repr_png_(self) -> bytes:
                picture = io.BytesIO()
                self.savefig(picture, format="png")
                return picture.getvalue()

        record = self._record()
        figure = Picture(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for key, label in (("train_loss", "training"), ("val_loss", "validation")):
            points = record.curve(key)
            axes.plot(*zip(*points, strict=True), label=label, marker="." if key == "val_loss" else "")
        axes.set(xlabel="step", ylabel="loss", title=f"{self.path}: {describe(record.run)}")
        axes.legend()
        return figure

    def state_dict(self) -> dict[str, Tensor]:
        """Return the merged weights of the newest checkpoint by the plain network's names, as `lte export` writes them.

        Raises InputError where there is no checkpoint yet.
        """
        _, weights, _ = merged_weights(*newest_checkpoint(self.path))
        return {name: weight.detach().clone() for name, weight in weights.items()}

    def resume(
        self,
        *,
        device: str = "auto",
        launch: bool = False,
        processes: int | None = None,
        ignore_memory: bool = False,
        on_event: Emit | None = None,
        quiet: bool = True,
    ) -> Run:
        """Continue from the newest checkpoint to the end, as `lte train RUN --resume` does, bit for bit.

        Returns the run; raises what lte.train raises.
        """
        options = LaunchArgs(processes=processes)
        options.check(launch)
        path, code = train_run(
            self.path, None, True, device, TrainArgs(), options if launch else None, _ApiOutput(quiet), ignore_memory,
            on_event,
        )  # fmt: skip
        return _trained(path, code, self.held)

    def _record(self) -> RunRecord:
        return read_run(self.path, logger.warning)

    def __repr__(self) -> str:
        return f"<lte.Run {self.path}>"


class _ApiOutput(Output):
    """Output of the API: no result is printed, progress goes to stderr unless quiet, and warnings are logged."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(quiet=quiet)

    def text(self, text: str | Text) -> None:
        """Print nothing: the caller gets the result."""

    def warning(self, text: str) -> None:
        """Log a problem that does not end the run."""
        logger.warning(text)


@dataclass(frozen=True)
class _Given:
    """Names of what was given as objects or names, and the keys that follow from them."""

    model: str | None
    data: str | None
    loss: str | None
    is_own: bool
    """Whether the network is of the user's: an object, or module:factory."""
    assignments: list[str]
    held: tuple[object, ...]


def _given(model: Any, data: Any, loss: Any, validation: Any, batched: bool) -> _Given:
    """Name what is given; raises InputError for objects that cannot be trained with."""
    held: list[object] = []
    assignments: list[str] = []
    if not (data is None or isinstance(data, str | Path)):
        from simulate.data.samples import register_samples

        data, samples = register_samples(data, validation, batched)
        held.append(samples)
    elif validation is not None or batched:
        raise InputError("validation and batched belong to data that is an object; files have a split of their own")
    if not (model is None or isinstance(model, str)):
        from torch import nn

        from simulate.models.live import register_network

        if not isinstance(model, nn.Module):
            raise InputError(f"model = {model!r}: a torch.nn.Module, or a name from docs/models.md, is needed")
        model, network = register_network(model)
        held.append(network)
    if not (loss is None or isinstance(loss, str)):
        from simulate.models.live import register_loss

        loss, own = register_loss(loss)
        held.append(own)
    is_own = model is not None and family_of(model) == FactoryModel.family
    if loss is not None and is_own:
        assignments.append(_assignment("model.loss", loss))
    if is_own and is_live(data):
        assignments.append(_assignment("model.samples", data))
    return _Given(model, None if data is None else str(data), loss, is_own, assignments, tuple(held))


def _assignments(
    keys: Mapping[str, Any] | None, train: Mapping[str, Any], function: Callable[..., object]
) -> list[str]:
    """Return keys as --set has them; raises InputError for a keyword that the function and [train] do not know."""
    for key in train:
        if key not in Train.model_fields:
            options = [name for name, x in signature(function).parameters.items() if x.kind is x.KEYWORD_ONLY]
            hint = near_match(key, [*options, *Train.model_fields])
            raise InputError(f"{key} is no option, and no key of [train]: {hint}")
    every = {**(keys or {}), **{f"train.{key}": value for key, value in train.items()}}
    return [_assignment(key, value) for key, value in every.items()]


def _assignment(key: str, value: Any) -> str:
    try:
        text = "" if isinstance(value, Mapping) else toml_io.dump({"value": value}).partition("=")[2].strip()
    except TypeError:
        text = ""
    if not text:
        raise InputError(f"{key} = {value!r}: a run.toml holds numbers, texts, booleans and lists of them")
    return f"{key}={text}"


def _count(name: str, value: int | str | None) -> int | None:
    try:
        return read_count(value) if isinstance(value, str) else value
    except ValueError as error:
        raise InputError(f"{name} = {value!r}: {error}") from None


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _free_folder(model: str) -> Path:
    """Return the first of runs/NAME, runs/NAME-2, ... that does not exist."""
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", model.removeprefix("live:")).strip("-.") or "run"
    paths = (RUNS / (name if number == 1 else f"{name}-{number}") for number in count(1))
    return next(path for path in paths if not path.exists())


def _trained(path: Path, code: int, held: tuple[object, ...]) -> Run:
    if code == INTERRUPTED:
        raise KeyboardInterrupt(f"interrupted and saved; lte.open({str(path)!r}).resume() continues")
    return Run(path, held)
