"""Lines and facts of `lte train` at the start and the end of a run, the same for simulated and launched runs.

commands/train.py and commands/launch.py print them, so that both kinds of runs can be compared.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ltecli.console import Output, memory_text, scores_text
from ltecli.runs.figures import figures, read_run, tensor_bytes
from ltecli.runs.run_folder import RunFolder
from simulate.common.processor import machine_facts
from simulate.common.run_files import CHECKPOINTS
from simulate.common.units import bytes_text, order_text, seconds_text
from simulate.planning.candidate import describe
from simulate.planning.margins import Margins
from simulate.planning.notes import diagnostics_notes, draws_notes, mended_notes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RunResult:
    """Figures of a run's end, as --json prints them."""

    steps: int
    val_loss: float | None
    val_accuracy: float | None
    sent_bytes_per_device: float
    simulated_s: float
    measured_s: float


def start_facts(folder: RunFolder, device: torch.device) -> dict[str, Any]:
    """Return the versions, device and data that a run's start event records."""
    import torch

    from simulate.common.version import version

    return {
        "lte": version(),
        "torch": torch.__version__,
        "simulated_on": str(device),
        "threads": torch.get_num_threads(),
        "machines": [machine_facts()],
        "data": folder.data.source,
        "data_bytes": folder.data.num_bytes,
        "data_sha256": folder.data.fingerprint,
        **({"classes": folder.plan["chosen"]["classes"]} if folder.run.cluster.classes else {}),
    }


def measured_memory_bytes(folder: RunFolder, device: torch.device) -> int:
    """Return the measured peak of one device's program, which is run alone before the run itself starts."""
    from simulate.measure.one_device import measure_memory_bytes

    run = folder.run.of_class(shown_class(folder))
    return of_one_device(folder, device, measure_memory_bytes(run, device))


def shown_class(folder: RunFolder) -> int:
    """Return the class of unequal devices whose memory the plan shows: the one that leaves least room."""
    return int(folder.plan["chosen"].get("fullest_class", 0))


def of_one_device(folder: RunFolder, device: torch.device, measured_bytes: int) -> int:
    """Return what a device holds of the measured bytes of its program on `device`."""
    run, chosen = folder.run.of_class(shown_class(folder)), folder.plan["chosen"]
    if device.type == "cpu" and run.method.frozen_format == "none":
        # On a CPU the measurement includes the start weights, which a device does not hold; quantised ones it cannot
        # see, since they are in mapped files.
        measured_bytes -= int(chosen["host_memory_by_part"]["start_weights"])
    return measured_bytes


def report_derived(folder: RunFolder, output: Output) -> None:
    """Print what was derived before any time is spent: model, data, steps, and planned memory, bytes and time."""
    run, chosen = folder.run, folder.plan["chosen"]
    shape = run.shape()
    action = f"resuming {folder.path} from {folder.resume_from.name}" if folder.resume_from else f"run {folder.path}"
    output.hint(f"{action}: {describe(run)} per device; {shape.name}, {shape.all_parameters:,} parameters")
    output.hint(f"  data: {folder.data.describe()}")
    output.hint(
        f"  derived: {run.tokens_per_step:,} {run.model.unit} per step, {run.train.steps:,} steps, "
        f"{run.train.steps * run.tokens_per_step:,} {run.model.unit}"
    )
    is_order = Margins.of(folder.profile).is_order
    memory = chosen["memory_bytes"]
    wall = order_text(chosen["wall_s"]) if is_order else seconds_text(chosen["wall_s"])
    planned = memory_text(tensor_bytes(chosen), memory.get("allocator", 0), memory["reserved"])
    output.hint(
        f"  planned per device: memory {planned}; {bytes_text(chosen['sent_bytes_per_round'])} sent per merge, {wall} "
        f"on {run.cluster.devices} x {folder.profile.name}"
    )
    for text in (*classes_lines(chosen), *draws_notes(run, shape), *diagnostics_notes(run, shape)):
        output.hint(f"  {text}")
    for text in (*folder.plan["notes"], *chosen["warnings"]):
        output.hint(f"  warning: {text}")
    # Of several nodes none has a whole checkpoint, so resume_from does not know of theirs.
    parts = sorted((folder.path / CHECKPOINTS).glob("step-*/*.json"))
    saved = folder.resume_from or (parts[-1].parent if parts else None)
    if saved is not None and not folder.is_finished:
        for text in mended_notes(run, shape, saved):
            output.warning(text)


def classes_lines(chosen: dict[str, Any]) -> list[str]:
    """Return a line on each class of unequal devices of a plan: its keys, memory and seconds of a step."""
    lines, first = [], 0
    for index, one in enumerate(chosen.get("classes", ())):
        end = first + one["devices"] - 1
        held = f"devices {first} to {end}" if end > first else f"device {first}"
        passes = f" x {one['accumulate']}" if one["accumulate"] > 1 else ""
        pairs = "" if one["rank"] is None else f", rank {one['rank']}"
        pairs += f" x {one['heads_per_device']} heads" if (one["heads_per_device"] or 1) > 1 else ""
        formats = "".join(f", {name}" for name in (one["autocast"], one["quantize"]) if name != "none")
        lines.append(
            f"class {index}, {held}: batch {one['micro_batch']}{passes}{pairs}{formats}, "
            f"{bytes_text(one['memory_bytes'])}, {seconds_text(one['step_s'])} a step"
        )
        first = end + 1
    return lines


def report_result(folder: RunFolder, output: Output, result: RunResult) -> None:
    """Print the result of a run that has just finished."""
    worse = figures(read_run(folder.path))["worse_than_guessing"]
    _print_json(folder, output, result, worse)
    output.text(
        f"done: {folder.path}, {scores_text(result.val_loss, result.val_accuracy)}, "
        f"{bytes_text(result.sent_bytes_per_device)} sent per device (counted), "
        f"{seconds_text(result.simulated_s)} on {folder.profile.name} (simulated), "
        f"{seconds_text(result.measured_s)} here (measured)" + (f"; {worse}" if worse else "")
    )
    output.hint(f"next: lte report {folder.path}")


def report_finished(folder: RunFolder, output: Output) -> None:
    """Print the result of a run that had already finished."""
    figure = figures(read_run(folder.path))
    sent, wall = figure["sent_bytes_per_device"]["counted"], figure["wall_s"]
    scores = figure["val_loss"], figure["val_accuracy"]
    # The same document as at the run's end, so that a script may give its command twice.
    result = RunResult(figure["steps"], *scores, sent, wall["simulated"], wall["measured"])
    _print_json(folder, output, result, figure["worse_than_guessing"])
    output.hint(f"{folder.path} is finished; next: lte report {folder.path}")


def _print_json(folder: RunFolder, output: Output, result: RunResult, worse_than_guessing: str | None) -> None:
    document = {"version": 1, "run": str(folder.path), **asdict(result)}
    output.json({**document, "worse_than_guessing": worse_than_guessing})
