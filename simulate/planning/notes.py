"""Write the notes that a plan prints below its figures: assumptions, advice and warnings.

Figures alone look more certain than they are, and a better key is easily overlooked; each note is one sentence with the
key to set. The planner calls plan_notes; `lte train` calls diagnostics_notes and mended_notes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from simulate.common.units import bytes_text, change_text, seconds_text
from simulate.config.hardware import LOCAL, Profile
from simulate.config.method_table import BASELINE
from simulate.config.run import Run
from simulate.costs.diagnostics_bytes import diagnostics_exchange
from simulate.costs.eval_and_save_time import AFFORDABLE_SHARE
from simulate.costs.memory import mapped_file_bytes
from simulate.costs.samples import shipped
from simulate.costs.step_time import device_step_s, round_time
from simulate.models.shapes import ModelShape
from simulate.planning.best_known import RATE, choices_of
from simulate.planning.candidate import Candidate, PlanContext, Rejected, batch_text, describe, is_library_installed
from simulate.planning.far_apart import can_have_quorum, majority, reasons
from simulate.planning.margins import RULE
from simulate.planning.number_formats import Format, format_notes
from simulate.planning.objective import MEANINGS
from simulate.planning.search_space import LEAST_IMAGES, LEAST_TOKENS, MICRO_BATCHES, Pins
from simulate.planning.time_ranges import simulated_here_text
from simulate.rules.method_plan import plan_of
from simulate.rules.pace import quorum_deadline_s
from simulate.training.checkpoints import numerics_of

PLURALS = {"norm": "norms", "bias": "biases", "embedding": "embeddings", "other": "other modules"}
LEAST_IDLE = 0.005
"""Smallest idle share that a plan speaks of."""
PACE_MATTERS = 1.1
"""Smallest ratio of the slowest device's step to the fastest's at which the plan suggests deadlines."""


def plan_notes(
    context: PlanContext,
    base: Run,
    chosen: Candidate | None,
    first: Candidate | None,
    equal: Candidate | None,
    rival: Candidate | None,
    picked: Format | None,
    evaluate: Callable[[Run], Candidate | Rejected],
    pins: Pins,
) -> Iterator[str]:
    """Yield a plan's notes in the order in which they are printed.

    `first` ranks first, even if it is not the choice; `equal` is the best with one batch for all devices; `rival` is
    the best candidate of methods that the plan does not choose from; `picked` is the autocast format that the plan took
    by itself; `evaluate` computes the costs of other runs; `pins` are what the user fixed.
    """
    choice, shape = context.choice, context.shape
    yield from _assumptions(context, chosen, first)
    if choice.probe:
        yield from choice.probe.notes(base, chosen.run if chosen else None)
    if chosen:
        yield from _unadapted(chosen, shape)
        yield from draws_notes(chosen.run, shape)
    yield from shape.notes
    if chosen:
        yield _batch(chosen, pins)
        yield from _by_itself(chosen, pins)
        yield from _idle(chosen, equal, pins)
        yield from _worth_trying(chosen)
        if not chosen.run.cluster.classes:  # of classes each has its own format
            yield from format_notes(chosen, context.profile, evaluate, picked)
        yield from _checkpoints(chosen)
        yield from _temporary_files(chosen, shape)
        yield from _deadlines(chosen)
        yield from quorum_notes(chosen)
        yield from diagnostics_notes(chosen.run, shape)
        yield from _faster_rival(chosen, rival)


def _assumptions(context: PlanContext, chosen: Candidate | None, first: Candidate | None) -> Iterator[str]:
    profile, choice = context.profile, context.choice
    # Certainty first: the reader should know how far to trust what follows.
    sources = {device.source for device in profile.device} | {profile.link.source}
    yield f"figures of profile {profile.name} are {' and '.join(sorted(sources))}: times are estimates, bytes are exact"
    if not (context.margins.is_point or context.margins.is_order):
        yield RULE
    yield from stretched(profile, len(context.devices))
    if profile.name == LOCAL:
        yield from _this_machine(context, chosen)
    model, optimizer = choice.efficiency or shipped(), chosen.run.train.optimizer if chosen else "adamw"
    lte, dense = model.of("lte", optimizer), model.of(BASELINE, optimizer)
    beside = "" if optimizer != "muon" else f" and {dense.value:.3g}x for dense training, both with {optimizer},"
    yield (
        f"candidates rank by {MEANINGS[choice.objective]}, with assumed samples over dense AdamW's: {lte.value:.3g}x "
        f"({lte.low:.3g} to {lte.high:.3g}) for lte{beside} at rank x heads >= width and T = {model.merge_every}, more "
        "at lower rank, rarer merges or larger batches (docs/planning.md; --efficiency replaces it)"
    )
    if chosen and first and first is not chosen:
        yield f"{describe(first.run)} would rank first; it needs lte[quantize], so pin it with --quantize"
    if chosen and chosen.run.method.frozen_format != "none":
        yield from _quantized(chosen)


def stretched(profile: Profile, devices: int) -> Iterator[str]:
    """Say so where a plan is for more devices than its profile has; `local` has virtual ones, as many as one likes."""
    if devices > profile.count and profile.name != LOCAL:
        has = f"{profile.count} device{'s' if profile.count > 1 else ''}"
        yield f"profile {profile.name} has {has}: the plan stretches it to {devices:,}, all alike and on the same links"


def _batch(chosen: Candidate, pins: Pins) -> str:
    """Report the batch of the choice, how it comes about, and the one that a power law has for this compute."""
    run, unit = chosen.run, chosen.run.model.unit
    train, participants = run.train, run.method.participants(run.cluster.devices)
    passes = f"micro_batch {train.micro_batch} x accumulate {train.accumulate} x devices {participants}"
    if run.cluster.classes:
        passes = f"{batch_text(run)} by class of devices"
    text = f"a step has {run.tokens_per_step:,} {unit} ({passes})"
    if pins.batch is not None:
        exact = run.tokens_per_step == pins.batch
        return text + (", as asked" if exact else f", in whole passes near the {pins.batch:,} asked for")
    if pins.micro_batch or pins.accumulate:
        return f"{text}, as given"
    least = f"{LEAST_TOKENS} {unit}" if unit == "tokens" else f"{LEAST_IMAGES} {unit}"
    text += f": the best of 1 to {MICRO_BATCHES[-1]} samples a pass, and no step has fewer than {least}"
    if unit == "samples":
        return f"{text} (docs/planning.md); --batch-samples sets it"
    return (
        f"{text}; by DeepSeek's power law about {best_batch(chosen):,} would train best at this compute "
        "(docs/planning.md): --batch-tokens sets it"
    )


def _by_itself(chosen: Candidate, pins: Pins) -> Iterator[str]:
    """Report what the plan took from the best known choices, the rate with the rule that it comes from."""
    made = [f"{choice.key} = {choice.value}" for choice in choices_of(chosen.run, pins.open_keys)]
    if not made:
        return
    width = chosen.context.shape.width
    rate = f" (a rule of thumb for width {width}; try two beside it)" if RATE in pins.open_keys else ""
    yield f"taken as best known: {', '.join(made)}{rate}; --why says what each is worth, --set takes another"


def _idle(chosen: Candidate, equal: Candidate | None, pins: Pins) -> Iterator[str]:
    """Report how long devices that differ wait for each other, and what batches of their own make of it."""
    if equal is None or equal.idle_share < LEAST_IDLE:
        return
    if chosen.run.cluster.has_quorum:  # nobody waits: who is slower takes fewer steps
        if chosen.run.cluster.classes:
            yield (
                f"with one batch for all, devices take {equal.trained_share:.0%} of a round's steps, with a batch for "
                f"each kind of device ([[cluster.class]]) {chosen.trained_share:.0%}, and equal loss takes "
                f"{change_text(equal.equivalent_wall_s / chosen.equivalent_wall_s)} time with one for all"
            )
        return
    waits = f"with one batch for all, devices are idle for {equal.idle_share:.1%} of a round's compute"
    if not chosen.run.cluster.classes:
        given = pins.micro_batch or pins.accumulate
        yield f"{waits}" + ("; without a given batch each kind may have its own" if given else "")
        return
    formats = sorted({one.autocast for one in chosen.classes} - {equal.run.train.autocast})
    beside = f"; a part of that is {' and '.join(formats)}, assumed to train as well as fp32" if formats else ""
    yield (
        f"{waits}, with a batch for each kind of device ([[cluster.class]]) for {chosen.idle_share:.1%}, and equal "
        f"loss takes {change_text(equal.equivalent_wall_s / chosen.equivalent_wall_s)} time with one for all{beside}"
    )


def best_batch(candidate: Candidate) -> int:
    """Return the tokens of a step that train best by B = 0.2920·C^0.3271, to two digits; C = 6·parameters·tokens.

    (DeepSeek-AI 2024, arXiv 2401.02954, equation 1, fitted from 1e17 to 2e19 operations; outside it extrapolates.)
    """
    batch = 0.2920 * (6.0 * candidate.context.shape.parameters * candidate.tokens) ** 0.3271
    return int(round(batch, 1 - math.floor(math.log10(batch))))


def _this_machine(context: PlanContext, chosen: Candidate | None) -> Iterator[str]:
    """Report that local's devices are imaginary, how long simulating the run takes here, and how to measure."""
    if context.margins.is_order:
        yield (
            "nobody has measured this machine, so times on local are orders of magnitude; lte profile measure --quick "
            "-o mine.toml or the first lte train here measures it for later plans"
        )
    if chosen:
        devices = len(context.devices)
        yield (
            f"local is {devices} imaginary machine{'s' if devices > 1 else ''}, each as strong as this one; lte train "
            f"simulates all of them here, which takes {simulated_here_text(chosen)} (their compute, one "
            "after the other)"
        )


def _quantized(chosen: Candidate) -> Iterator[str]:
    method = chosen.run.method
    if method.frozen_format.startswith("nf4") and not is_library_installed():
        yield f"method.quantize = {method.frozen_format} needs bitsandbytes: pip install 'lte[quantize]'"
    # Rounding to few bits swallows updates smaller than half a step, merge after merge.
    if getattr(method, "master", "host") == "none" and getattr(method, "reset", "none") != "none":
        yield (
            "method.master = none with method.reset = "
            f"{getattr(method, 'reset', '')} loses merged updates that are smaller than a rounding step; "
            "try --set method.master=host"
        )


def _unadapted(chosen: Candidate, shape: ModelShape) -> Iterator[str]:
    """Report how the choice trains parameters without adapters."""
    method, elements = chosen.run.method, Counter[str]()
    plan = plan_of(method)
    if plan.adapters(chosen.run.cluster.devices) is None:
        return
    for tensor in shape.replicated:
        elements[tensor.kind] += tensor.elements
    become = {"norm": getattr(method, "norms", "average"), "bias": getattr(method, "biases", "average")}
    parts = (f"{PLURALS[kind]} {count:,} ({become.get(kind, 'average')})" for kind, count in elements.items())
    yield f"not adapted, every device trains its own copy, {plan.synchronisation()}: {', '.join(parts)}"


def draws_by_layer(run: Run, shape: ModelShape) -> dict[str, list[str]] | None:
    """Return the layers of each way to draw A where a run picks columns, which some layers are too wide for."""
    layout = plan_of(run.of_class(0).method).adapters(run.cluster.devices)
    if layout is None or not layout.column_rank:
        return None
    layers: dict[str, list[str]] = {"columns": [], "joint": []}
    for linear in shape.adapted:
        layers["columns" if layout.picks_columns(linear.in_features) else "joint"].append(linear.name)
    return layers


def draws_notes(run: Run, shape: ModelShape) -> Iterator[str]:
    """Report which layers' A pick columns, and which are drawn jointly, and why."""
    layers = draws_by_layer(run, shape)
    if layers is None:
        return
    heads, picked, joint = run.heads, ", ".join(layers["columns"]), ", ".join(layers["joint"])
    covered = f"A picks columns in {picked}" if picked else "A picks columns in no layer"
    yield f"method.draws = {getattr(run.method, 'draws', 'columns')}: {covered}" + (
        f"; A is drawn jointly in {joint}, whose inputs are more than {heads} head{'s' if heads > 1 else ''} x rank "
        f"{getattr(run.method, 'rank', 0)} cover"
        if joint
        else ""
    )


def _worth_trying(chosen: Candidate) -> Iterator[str]:
    """Suggest the optimizer and the message format that trained best in docs/results.md, unless they are chosen."""
    run = chosen.run
    if not plan_of(run.method).has_separate_heads:
        return
    if run.train.optimizer == "adamw":
        yield (
            "train.optimizer = muon trained better than adamw on a small text model, with LTE as with dense training "
            "(docs/results.md); try it with --set"
        )
    if getattr(run.method, "wire", "") == "full" and run.cluster.devices > 1:
        yield (
            "method.wire = int8 sends about a quarter of the bytes, and trained as well as full messages on a small "
            "text model (docs/results.md); try it with --set, and a higher rank for a part of what that saves"
        )


def _temporary_files(chosen: Candidate, shape: ModelShape) -> Iterator[str]:
    """Report what a process keeps in mapped files: their folder may be small, or memory of its own."""
    if size := mapped_file_bytes(chosen.run, shape):
        yield (
            f"every process keeps {bytes_text(size)} in temporary files, weights in full precision and sums of "
            "gradients: export TMPDIR=FOLDER on a disk with room for them"
        )


def _checkpoints(chosen: Candidate) -> Iterator[str]:
    """Report the time of checkpoints where it is unknown, spaces recovery points, or is above the affordable share."""
    context, eval_and_save, run = chosen.context, chosen.eval_and_save, chosen.run
    if eval_and_save.save_s is None:
        name = context.profile.name
        yield f"profile {name} has no device.disk_write_bytes_per_s: checkpoints are planned to take no time"
        return
    every, affordable = run.cluster.recover_every, eval_and_save.affordable_recovery(chosen.step_s)
    steps, drops_lost = eval_and_save.cadence.recover_steps, run.cluster.drops_lost
    beside = "" if drops_lost else ", beside training where rounds are long enough"  # as simulate.training.loop saves
    if context.spaces_recovery and every > 1:
        share = eval_and_save.saves * eval_and_save.save_s / chosen.wall_s
        lost = min(steps, run.train.checkpoint_every, run.train.steps)
        who = "fewer devices than the quorum are left, they" if drops_lost else "a device is lost, all devices"
        yield (
            f"with cluster.recover_every = {every} checkpoints of {bytes_text(eval_and_save.save_bytes)} a device are "
            f"written in {share:.1%} of the time{beside}; if {who} repeat up to {lost:,} steps, "
            f"{seconds_text(lost * chosen.step_s)} of work"
        )
    elif every < affordable:
        yield (
            f"a recovery point after every {steps} steps takes "
            f"{eval_and_save.save_s / (steps * chosen.step_s):.0%} of their time to write{beside}; --set "
            f"cluster.recover_every={affordable} makes that {AFFORDABLE_SHARE:.0%}"
        )


def _deadlines(chosen: Candidate) -> Iterator[str]:
    """Suggest a deadline where all devices wait for slow ones, if the method has deadlines."""
    method, context = chosen.run.method, chosen.context
    shape, devices, profile = context.shape, context.devices, context.profile
    # Batches of their own leave little to wait for.
    cluster = chosen.run.cluster
    if "pace" not in type(method).model_fields or method.is_paced or cluster.classes or cluster.has_quorum:
        return
    step_s = device_step_s(chosen.run, shape, devices)
    # The keys that a deadline excludes (RoundOptions and LteOptions refuse them) must change with it.
    needs: dict[str, Any] = {"pace": "deadline"}
    if getattr(method, "reset", "") == "none":
        needs |= {"reset": "b", "frozen_a": False}
    without = {"merge_delay": 0, "fragments": 1}
    needs |= {key: value for key, value in without.items() if getattr(method, key, value) != value}
    paced = method.model_copy(update=needs)  # compared by samples a second: a deadline trains on fewer samples
    time = round_time(chosen.run.model_copy(update={"method": paced}), shape, devices, profile.link)
    gain = time.device_steps / time.round_s / (chosen.time.device_steps / chosen.time.round_s)
    if max(step_s) > PACE_MATTERS * min(step_s) and gain > 1:
        keys = " and ".join(f"method.{key} = {str(value).lower()}" for key, value in needs.items())
        yield (
            f"devices of profile {profile.name} differ: a step takes the slowest {max(step_s) / min(step_s):.1f}x as "
            f"long as the fastest; with {keys} nobody waits, for {gain:.2f}x the samples a second (docs/methods.md)"
        )


def quorum_notes(chosen: Candidate) -> Iterator[str]:
    """Say what a quorum changes, where the run has one, or where links or devices are far apart and it could."""
    run, context = chosen.run, chosen.context
    devices, cluster = context.devices, run.cluster
    if cluster.has_quorum and cluster.merges_given is None:
        step_s = device_step_s(run, context.shape, devices)
        seconds = seconds_text(quorum_deadline_s(cluster, run.method.round_steps, step_s))
        yield (
            f"merges go on with {cluster.needed} of {cluster.devices} devices, and a round's steps end after "
            f"{seconds}: who is late or lost is not waited for, and an exact rerun needs the run's merge events "
            "(docs/run.md)"
        )
    elif can_have_quorum(run):
        found = list(reasons(context.profile, devices, device_step_s(run, context.shape, devices)))
        if found:
            yield (
                f"{' and '.join(found)}: with cluster.quorum = {majority(cluster.devices)} merges wait for a majority "
                "alone, who is late brings its change to a later one, and an exact rerun needs the run's merge events "
                "(docs/planning.md)"
            )


def diagnostics_notes(run: Run, shape: ModelShape) -> Iterator[str]:
    """Report the bytes of diagnostics on top of the method's, and that their memory is a bound."""
    if run.train.diagnostics_every is not None:
        sent_bytes = diagnostics_exchange(run, shape).sent_bytes / run.cluster.devices
        yield (
            f"diagnostics every {run.train.diagnostics_every:,} steps: devices in processes of their own send another "
            f"{bytes_text(sent_bytes)} each for them, every time, which is in no other figure; their memory is "
            "planned as an upper bound, up to a quarter above what a device then holds"
        )


def mended_notes(run: Run, shape: ModelShape, checkpoint: Path) -> Iterator[str]:
    """Warn where a version of lte that computed other weights from a checkpoint wrote it."""
    if not run.method.frozen_format.startswith("nf4") or numerics_of(checkpoint) > 1:
        return
    # The faulty kernel handled rows that are a multiple of 16 but not of a block of 64.
    touched = [x for x in shape.adapted if x.in_features % 64 and x.in_features % 16 == 0]
    if touched := [x for x in touched if x.out_features > 1 and x.weights > 64]:
        first = f"{touched[0].name}, {touched[0].in_features} wide" + (", and others" if len(touched) > 1 else "")
        yield (
            f"{checkpoint.name} is of an lte that on CPUs with AVX-512 unpacked weights in NF4 with wrong scales "
            f"({first}): if one trained it, the run goes on with the right weights and is not the same run any more"
        )


def _faster_rival(chosen: Candidate, rival: Candidate | None) -> Iterator[str]:
    """Report a method that would be faster by its assumed samples; a guess, so it is not chosen."""
    if rival and rival.equivalent_wall_s < chosen.equivalent_wall_s:
        share = rival.equivalent_wall_s / chosen.equivalent_wall_s
        yield (
            f"{describe(rival.run)} would take {change_text(share)} time to equal loss, if "
            f"{rival.samples_factor:.2f}x dense's samples do; see --method {rival.run.method.name}"
        )
