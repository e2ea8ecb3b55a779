"""What `lte train` says of a run before its first step and at its end, wherever its devices are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simulate.planning.candidate import describe
from ltecli.runs.run_folder import RunFolder
from simulate.planning.notes import diagnostics_notes
from ltecli.console import Output, scores_text
from simulate.common.units import bytes_text, seconds_text

if TYPE_CHECKING:
    import torch


def start_facts(folder: RunFolder, device: torch.device) -> dict[str, Any]:
    """Return what a run's start event has of versions, device and data."""
    import torch

    from simulate.common.version import version

    return {
        "lte": version(),
        "torch": torch.__version__,
        "simulated_on": str(device),
        "threads": torch.get_num_threads(),
        "data": folder.data.source,
        "data_bytes": folder.data.num_bytes,
        "data_sha256": folder.data.fingerprint,
    }


def report_derived(folder: RunFolder, output: Output) -> None:
    """Say what a run will do, and what is planned for a device."""
    run, chosen = folder.run, folder.plan["chosen"]
    shape = run.model.shape()
    action = f"resuming {folder.path} from {folder.resume_from.name}" if folder.resume_from else f"run {folder.path}"
    output.hint(f"{action}: {describe(run)} per device; {shape.name}, {shape.parameters:,} parameters")
    output.hint(f"  data: {folder.data.describe()}")
    output.hint(
        f"  derived: {run.tokens_per_step:,} {run.model.unit} per step, {run.train.steps:,} steps, "
        f"{run.train.steps * run.tokens_per_step:,} {run.model.unit}"
    )
    output.hint(
        f"  planned per device: {bytes_text(chosen['memory_bytes']['total'])} memory, "
        f"{bytes_text(chosen['sent_bytes_per_round'])} sent per merge, {seconds_text(chosen['wall_s'])} on "
        f"{run.cluster.devices} x {folder.profile.name}"
    )
    for text in diagnostics_notes(run, shape):
        output.hint(f"  {text}")
    for text in (*folder.plan["notes"], *chosen["warnings"]):
        output.hint(f"  warning: {text}")


def report_result(
    folder: RunFolder,
    output: Output,
    steps: int,
    val_loss: float | None,
    sent_bytes: float,
    simulated_s: float,
    measured_s: float,
    val_accuracy: float | None = None,
) -> None:
    """Say what a finished run came to."""
    sent = sent_bytes / folder.run.cluster.devices
    output.json(_result(folder, steps, val_loss, val_accuracy, sent, simulated_s, measured_s))
    output.text(
        f"done: {folder.path}, {scores_text(val_loss, val_accuracy)}, {bytes_text(sent)} sent per device (counted), "
        f"{seconds_text(simulated_s)} on {folder.profile.name} (simulated), {seconds_text(measured_s)} here (measured)"
    )
    output.hint(f"next: lte report {folder.path}")


def report_finished(folder: RunFolder, output: Output) -> None:
    """Say what a run that had finished before came to."""
    from ltecli.runs.figures import figures, read_run

    figure = figures(read_run(folder.path))
    sent, wall = figure["sent_bytes_per_device"]["counted"], figure["wall_s"]
    scores = figure["val_loss"], figure["val_accuracy"]
    output.json(_result(folder, figure["steps"], *scores, sent, wall["simulated"], wall["measured"]))
    output.hint(f"{folder.path} is finished; next: lte report {folder.path}")


def _result(
    folder: RunFolder,
    steps: int,
    val_loss: float | None,
    val_accuracy: float | None,
    sent: float,
    simulated_s: float,
    measured_s: float,
) -> dict[str, Any]:
    return {
        "version": 1,
        "run": str(folder.path),
        "steps": steps,
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
        "sent_bytes_per_device": sent,
        "simulated_s": simulated_s,
        "measured_s": measured_s,
    }
