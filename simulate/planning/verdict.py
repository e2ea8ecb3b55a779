"""Answer the questions of somebody with a plan in hand: can it, how long, is it worth it, what limits it.

A plan has dozens of figures; most readers want five answers and the most important caveats, each with its remedy. `lte
plan` prints a Verdict by default, and everything else with --all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from simulate.common.live_objects import find, is_live
from simulate.common.units import bytes_text
from simulate.config.hardware import LOCAL
from simulate.config.method_table import BASELINE
from simulate.config.profile_slips import slips
from simulate.config.run import Run
from simulate.config.tables import BYTE_VALUES, BYTES, Data
from simulate.models.schema import text_sizes
from simulate.planning.candidate import LINK_DOMINATES, Candidate, Rejected, batch_text, candidate_of, describe
from simulate.planning.notes import stretched
from simulate.planning.planner import Plan, evaluate
from simulate.planning.time_ranges import equivalent_range, simulated_here_text, time_text
from simulate.rules.method_plan import plan_of

MOST_PASSES = 4
"""Passes over a text up to which repeated tokens teach nearly as much as new ones (Muennighoff et al. 2023, arXiv
2305.16264)."""
STDLIB_BYTES = 1_800_000
"""Training bytes of the embedded text: nine tenths of simulate.data.text.STDLIB_BYTES."""
TRAINED_SHARE = 0.9
"""Share of a text that is trained on; the rest is held out."""
FASTER_LINK = 10
LEAST_GAIN = 1.1
"""Speedup below which a faster link would change nothing that anybody notices."""


@dataclass(frozen=True)
class Answer:
    """A question, its answer in a word or a figure, and what stands behind it."""

    question: str
    answer: str
    because: str


@dataclass(frozen=True)
class Verdict:
    """All that a plan's reader wants first."""

    title: str
    answers: tuple[Answer, ...]
    warnings: tuple[str, ...]
    """Caveats with their remedies, the most important ones first."""

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as the plan's JSON has it."""
        answers = {answer.question: [answer.answer, answer.because] for answer in self.answers}
        return {"title": self.title, "answers": answers, "warnings": list(self.warnings)}


def verdict_of(plan: Plan) -> Verdict:
    """Return the answers of a plan, also of one in which nothing fits."""
    passes = _passes(plan)
    title = _title(plan, passes)
    if plan.chosen is None:
        return Verdict(title, (Answer("Can it?", "no", _why_not(plan)),), ())
    return Verdict(title, tuple(_answers(plan, plan.chosen)), tuple(_warnings(plan, plan.chosen, passes)))


def _title(plan: Plan, passes: tuple[float, str] | None) -> str:
    shape, base = plan.base.shape(), plan.base
    kinds = [device.kind.removeprefix("NVIDIA ").removeprefix("GeForce ") for device in plan.profile.device]
    devices = f"{base.cluster.devices} x {kinds[0]}" if len(kinds) == 1 else f"{base.cluster.devices} mixed devices"
    parts = [f"{shape.name} ({_count_text(shape.all_parameters)}) on {devices}"]
    if base.cluster.devices > 1:
        lines = plan.profile.link.lines
        slowest = min((line.outer_rates[0] for line in lines), default=plan.profile.link.up_bytes_per_s)
        parts.append(f"links of {bytes_text(slowest)}/s{' and more' if lines else ''}")
    tokens = f"{_count_text(plan.tokens)} {base.model.unit}"
    over = {"tokens": "text", "samples": "data" if is_live(base.data.name) else "images"}[base.model.unit]
    parts.append(tokens if passes is None else f"{tokens}, {_passes_text(passes)} over the {over}")
    return "; ".join(parts)


def _count_text(count: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return str(int(count))


def _passes_text(passes: tuple[float, str]) -> str:
    number, about = passes
    return f"{about}{number:,.0f} passes" if number >= 10 else f"{about}{number:.2g} passes"


def _passes(plan: Plan) -> tuple[float, str] | None:
    """Return how often the data is read, and "about " where its tokens are estimated; None where it is unknown."""
    data = plan.base.data
    if plan.base.model.unit == "samples":
        images = _training_images(data)
        return (plan.tokens / images, "") if images else None
    if plan.base.model.unit != "tokens":
        return None
    if data.name == "stdlib" and data.tokenizer == BYTES:
        return plan.tokens / STDLIB_BYTES, ""
    from simulate.data.text_size import count_tokens  # only plans of text that is named need the readers of data

    count = count_tokens(data)
    if count is None or count.count == 0:
        return None
    return plan.tokens / (TRAINED_SHARE * count.count), "about " if count.is_about else ""


def _training_images(data: Data) -> int:
    """Return the number of samples to train on that are not text; 0 where only images of digits stand in for them."""
    if is_live(data.name):
        return len(find("data.name", str(data.name)).train)
    if data.path is None and not data.from_hub:
        return 0
    from simulate.data.load import image_source  # plans without data of their own do without its readers

    source = image_source(data)
    return 0 if source is None else int((~source.held_out).sum())


def _why_not(plan: Plan) -> str:
    miss = plan.nearest_miss()
    return "" if miss is None else f"nearest is {describe(miss.candidate.run)}, which {miss.reason}"


def _answers(plan: Plan, chosen: Candidate) -> Iterator[Answer]:
    memory, device = chosen.memory, plan.tightest_device()
    with_allocator = ", allocator included" if memory.allocator else ""
    room = f"{bytes_text(memory.total)} of {bytes_text(device.memory_bytes)} a device{with_allocator}"
    yield Answer("Can it?", "yes", room)
    dense = plan.dense
    is_dense = chosen.run.method.name == BASELINE
    beside = "" if is_dense or dense is None else f" (dense here: {_dense_text(dense)})"
    # Samples count against dense AdamW's, whatever the plan's own optimizer is.
    theirs = "dense's loss" if chosen.run.train.optimizer == "adamw" else "dense AdamW's loss"
    after = "for the tokens" if chosen.run.train.optimizer == "adamw" else f"to {theirs} after the tokens"
    reached = after if is_dense else f"to {theirs}{beside}"
    yield Answer(
        "How long?", time_text(chosen, equivalent_range(chosen)), reached.replace("tokens", plan.base.model.unit)
    )
    yield _worth(plan, chosen, dense)
    yield Answer("Bottleneck", *_bottleneck(plan, chosen))
    if plan.equal is not None and chosen.run.cluster.classes and not chosen.run.cluster.has_quorum:
        yield Answer("Idle", f"{chosen.idle_share:.1%}", f"of compute; {plan.equal.idle_share:.0%} with equal batches")
    if (rule := plan.quorum_rule) is not None:
        because = f"suffice: nobody waits, no rerun is the same to the bit (--set cluster.quorum={rule.devices}: all)"
        yield Answer("Merges", f"{rule.quorum} of {rule.devices}", because)
    yield Answer("Settings", ", ".join(_settings(chosen.run)), "")


def _dense_text(dense: Candidate | Rejected) -> str:
    if isinstance(dense, Rejected):
        return "does not fit" if dense.short_bytes or dense.host_short_bytes else "too slow for --within"
    return time_text(dense, equivalent_range(dense))


def _worth(plan: Plan, chosen: Candidate, dense: Candidate | Rejected | None) -> Answer:
    """Return whether the choice is worth it: yes where the ranges lie apart, probably where its middle is lower."""
    if chosen.run.method.name == BASELINE:
        return Answer("Worth it?", "no: use dense", _why_dense(plan, chosen))
    if dense is None or isinstance(dense, Rejected):
        return Answer("Worth it?", "yes", "dense training does not fit these devices")
    sent = dense.sent_bytes_per_round / dense.time.steps, chosen.sent_bytes_per_round / chosen.time.steps
    fewer = f"; {sent[0] / sent[1]:.0f}x fewer bytes a step" if sent[1] and sent[0] > sent[1] else ""
    ours, theirs = equivalent_range(chosen), equivalent_range(dense)
    if ours[1] < theirs[0]:
        return Answer("Worth it?", "yes", f"{dense.equivalent_wall_s / chosen.equivalent_wall_s:.2g}x as fast{fewer}")
    if chosen.equivalent_wall_s < dense.equivalent_wall_s:
        return Answer("Worth it?", "probably", f"the ranges overlap{fewer}")
    return Answer("Worth it?", "no", f"dense takes {chosen.equivalent_wall_s / dense.equivalent_wall_s:.2g}x less time")


def _why_dense(plan: Plan, chosen: Candidate) -> str:
    """Return why dense training ranks first: what the best other method would take."""
    other = next((c for c in plan.candidates if c.run.method.name != BASELINE), None)
    if plan.pins.method == BASELINE or other is None:
        return "no other method was asked for, or fits"
    share = chosen.time.exchange_s / chosen.time.round_s
    times = other.equivalent_wall_s / chosen.equivalent_wall_s
    return f"{other.run.method.name} takes {times:.2g}x as long; exchange is {share:.0%} of dense's"


def _bottleneck(plan: Plan, chosen: Candidate) -> tuple[str, str]:
    """Return what limits the choice, and what a link of ten times the bandwidth would gain it."""
    if plan.base.cluster.devices == 1:
        return "compute", "one device sends nothing"
    share = chosen.time.exchange_s / chosen.time.round_s
    profile = plan.profile.model_copy(update={"link": plan.profile.link.faster(FASTER_LINK)})
    faster = candidate_of(evaluate(chosen.run, profile, plan.tokens))
    gain = chosen.wall_s / faster.wall_s
    of_time = f"{share:.0%} is exchange; {FASTER_LINK}x the bandwidth gains {gain:.2g}x"
    if share > LINK_DOMINATES and gain < LEAST_GAIN:
        of_time = f"{share:.0%} is exchange, which waits for delays, not for bandwidth"
    return ("the link" if share > LINK_DOMINATES else "compute"), of_time


def _settings(run: Run) -> Iterator[str]:
    method, train = run.method, run.train
    yield method.name.upper() if len(method.name) <= len("ddp") else method.name
    if (rank := getattr(method, "rank", None)) is not None:
        yield f"rank {rank}"
    if plan_of(method).has_separate_heads:
        heads = getattr(method, "heads_per_device", 1)
        size = getattr(method, "devices_per_node", 1)
        owner = "a device" if size == 1 else f"a node of {size} devices"
        yield f"{heads} head{'s' if heads > 1 else ''} {owner}"
    if (merge_every := getattr(method, "merge_every", None)) is not None:
        yield f"merge every {merge_every} steps"
    if method.frozen_format != "none":
        yield f"{method.frozen_format} weights"
    if (wire := getattr(method, "wire", "full")) != "full":
        yield f"{wire} messages"
    if train.optimizer == "muon":
        yield "Muon"
    if train.optimizer == "apollo":
        yield "APOLLO"
    yield batch_text(run)
    if train.activation_checkpointing:
        yield "checkpointing"
    if train.autocast != "none":
        yield train.autocast


def _warnings(plan: Plan, chosen: Candidate, passes: tuple[float, str] | None) -> Iterator[str]:
    """Yield caveats with their remedies: of the profile, of the data, of the choice, of the figures."""
    for slip in slips(plan.profile):
        yield f"{slip} (lte profile check {plan.base.cluster.profile})"
    base = plan.base
    for text in stretched(plan.profile, base.cluster.devices):
        yield f"{text[0].upper()}{text[1:]}"
    # Images are drawn anew at every pass where data.augment says so, and are usually seen dozens of times.
    if base.model.unit == "tokens" and passes is not None and passes[0] > MOST_PASSES:
        times = _passes_text(passes).replace("passes", "times")
        yield f"Text is read {times}; beyond {MOST_PASSES} it teaches little: --data, fewer --tokens"
    if base.model.unit == "tokens" and base.data.tokenizer == BYTES:
        vocab = text_sizes(base.model).vocab
        if vocab > BYTE_VALUES:
            yield f"Text is bytes: {BYTE_VALUES} of {vocab:,} tokens used; --set data.tokenizer=bpe:{vocab}"
    if base.model.unit == "samples" and base.data.name == "digits":
        yield "Small images of digits stand in for yours: name them by --data"
    yield from _faster_rival(plan, chosen)
    if chosen.time.exchange_s / chosen.time.round_s > LINK_DOMINATES:
        full = getattr(chosen.run.method, "wire", "") == "full"
        yield f"Exchange takes most time: {'--set method.wire=int8, or ' if full else ''}a higher --merge-every"
    for warning in chosen.warnings:
        if not warning.startswith("the link dominates"):
            yield f"{warning[0].upper()}{warning[1:]}"
    if plan.profile.name == LOCAL:
        yield f"Devices are imaginary; lte train simulates them here: {simulated_here_text(chosen)}"
    if chosen.context.margins.is_order:
        yield "Times are orders of magnitude: lte profile measure --quick, or train once"
    elif not chosen.context.margins.is_point:
        yield "Times are estimates: run lte profile measure on such a device"


def _faster_rival(plan: Plan, chosen: Candidate) -> Iterator[str]:
    """Warn of the best method that the plan does not choose from, where it may be as fast."""
    fitting = [rival for rival in plan.rivals if isinstance(rival, Candidate)]
    rival = min(fitting, key=lambda candidate: candidate.equivalent_wall_s, default=None)
    if rival is not None and rival.equivalent_wall_s < chosen.equivalent_wall_s:
        name, times = rival.run.method.name, time_text(rival, equivalent_range(rival))
        yield f"{name} may be faster ({times}, less tried): lte plan --method {name}"
