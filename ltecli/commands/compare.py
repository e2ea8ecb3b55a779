"""lte compare: train a run's own method and others on the same network, data, samples and seeds, and say who is best.

It is a sweep over methods (commands/sweep.py), so that it is resumed, and refused, like one. A rival's keys of [method]
are those that the planner chooses on the run's profile at the run's batch; --set-for sets them otherwise.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltecli.commands.sweep import SweepArgs, run_check, train_variants
from ltecli.console import Output
from ltecli.runs.method_comparison import METHOD
from ltecli.runs.run_folder import RUNS, interrupted_by_sigterm, run_name
from ltecli.runs.variants import expand, read_lists
from simulate.common import toml_io
from simulate.common.errors import InputError
from simulate.config.method_options import MethodOptions
from simulate.config.method_table import default_options
from simulate.config.profiles import load_profile
from simulate.config.run import Run, build_run, load_given_run, with_absolute_paths
from simulate.planning.objective import SelectionCriteria
from simulate.planning.planner import make_plan
from simulate.planning.search_space import Pins

RATE = "train.learning_rate"
ALWAYS_TOLD = ("rank", "merge_every")
"""Keys of [method] that are told also where they are defaults."""
LEAST_ROUNDS = 5
"""Rounds of a run below which a rival would be judged by its first merges; a plan of a short run does not mind."""


@dataclass(frozen=True)
class Rival:
    """A method to compare with: its keys, and where they come from."""

    options: MethodOptions
    source: str

    def text(self, lists: Mapping[str, Sequence[str]]) -> str:
        """Return a line on the method's keys, without most defaults, and on those that --set-for sets."""
        name, default = self.options.name, default_options(self.options.name)
        changed = [
            f"{key} {value}"
            for key, value in self.options.model_dump(exclude_none=True).items()
            if (key in ALWAYS_TOLD or value != getattr(default, key)) and f"method.{key}" not in lists
        ]
        given = "".join(f"; by --set-for {key} {' and '.join(values)}" for key, values in lists.items())
        return f"{name}: {', '.join(changed) or 'its defaults'} ({self.source}){given}"


def compare_command(
    given: Path, others: str, set_for: Sequence[str], args: SweepArgs, as_json: bool, quiet: bool
) -> int:
    """Train all methods; returns the exit code."""
    with interrupted_by_sigterm():
        output = Output(as_json, quiet or as_json)
        lists = read_lists(args.assignments)
        if listed := next((key for key, values in lists.items() if len(values) > 1), None):
            raise InputError(
                f"--set {listed}={','.join(lists[listed])}: compare takes one value a key; lte sweep takes lists"
            )

        def own(assignments: Sequence[str]) -> Run:
            return with_absolute_paths(load_given_run(given, [*args.assignments, *assignments]))

        base = own(())
        names = _names(others, base.method.name)
        lists_of, check = _lists_of(set_for, names), run_check(args)
        variants, refused = expand(own, {}, args.seeds, check, {METHOD: base.method.name})
        for name in names:
            rival = choose_keys(base, name)
            output.hint(rival.text(lists_of[name]))
            more = expand(rival_builder(base, rival), lists_of[name], args.seeds, check, {METHOD: name})
            variants, refused = [*variants, *more[0]], [*refused, *more[1]]
        if untuned := [name for name in names if RATE not in lists_of[name]]:
            output.hint(
                f"{RATE} = {base.train.learning_rate:g} is kept for {' and '.join(untuned)}; methods differ in their "
                f"best rate (docs/results.md), so try several: --set-for {untuned[0]}:{RATE}=RATE,RATE"
            )
        words = [word for text in set_for for word in ("--set-for", text)]
        command = shlex.join(["lte", "compare", str(given), "--with", others, *words, *args.words()])
        path = args.out or RUNS / f"{run_name(given)}-compare"
        return train_variants(path, variants, refused, command, base.method.name, args, output)


def _names(others: str, own: str) -> list[str]:
    """Return the methods to compare with; raises InputError for none, for one named twice, and for unknown ones."""
    names = [name.strip() for name in others.split(",")]
    for name in names:
        if names.count(name) > 1 or name in (own, ""):
            why = "is empty" if not name else "is the run's own method" if name == own else "is named twice"
            raise InputError(f"--with {others}: {name or 'a name'} {why}; leave it away")
        try:
            default_options(name)
        except InputError as error:
            raise InputError(f"--with {others}: {error}") from None
    return names


def _lists_of(set_for: Sequence[str], names: Sequence[str]) -> Mapping[str, Mapping[str, Sequence[str]]]:
    """Return the values of --set-for METHOD:table.key=value by method; raises InputError."""
    assignments: dict[str, list[str]] = {name: [] for name in names}
    for text in set_for:
        # The last colon before the value: names of methods from outside have one of their own.
        key, equals, value = text.partition("=")
        name, _, key = key.rpartition(":")
        if not equals or name not in assignments:
            raise InputError(
                f"--set-for {text}: the form is METHOD:table.key=value with a method of --with ({', '.join(names)}), "
                f"for example --set-for {names[0]}:{RATE}=0.001"
            )
        assignments[name].append(f"{key}={value}")
    return {name: read_lists(given) for name, given in assignments.items()}


def choose_keys(base: Run, name: str) -> Rival:
    """Return a rival's keys: the planner's choice on the run's profile, or its defaults where nothing fits that."""
    train, profile = base.train, load_profile(base.cluster.profile)
    start = base.model_copy(update={"method": default_options(name)})
    pins = Pins(
        method=name,
        micro_batch=train.micro_batch,
        accumulate=train.accumulate,
        activation_checkpointing=train.activation_checkpointing,
    )
    tokens = train.steps * base.tokens_per_step
    plan = make_plan(start, profile, tokens, pins, choice=SelectionCriteria(with_rivals=False))
    if plan.chosen is None:
        return Rival(start.method, f"defaults: none of its settings fits {profile.name}")
    source, methods = f"as lte plan chooses on {profile.name}", [candidate.run.method for candidate in plan.candidates]
    if plan.chosen.run.method.round_steps * LEAST_ROUNDS <= train.steps:
        return Rival(plan.chosen.run.method, source)
    # Candidates come best first, so that among equally long rounds the best one is taken.
    often = [method for method in methods if method.round_steps * LEAST_ROUNDS <= train.steps]
    if often:
        return Rival(often[0], f"{source} for {LEAST_ROUNDS} rounds or more")
    return Rival(min(methods, key=lambda method: method.round_steps), f"{source} for as many rounds as there can be")


def rival_builder(base: Run, rival: Rival) -> Callable[[Sequence[str]], Run]:
    """Return the function that makes the rival's runs: the base run with another method, on as many samples."""

    def build(assignments: Sequence[str]) -> Run:
        table: dict[str, Any] = base.model_dump(exclude_none=True)
        table["method"] = rival.options.model_dump(exclude_none=True)
        assigned = [toml_io.set_key(table, assignment) for assignment in assignments]
        run = build_run(table, "--with", assigned=assigned)
        if run.samples_per_step == base.samples_per_step or "train.steps" in assigned:
            return run
        # Methods in which only some devices train at a time take more steps for the samples.
        ratio = base.samples_per_step / run.samples_per_step
        for key in ("steps", "evaluate_every", "warmup_steps"):
            if table["train"].get(key):
                table["train"][key] = max(1, round(table["train"][key] * ratio))
        return build_run(table, "--with", assigned=assigned)

    return build
