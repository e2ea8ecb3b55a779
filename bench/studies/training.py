"""A whole simulated run from its table in this process, for the studies that train."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from simulate.comm.virtual import VirtualCommunicator
from simulate.common.errors import RunFailedError
from simulate.config.hardware import Profile
from simulate.config.profiles import load_profile
from simulate.config.run import build_run
from simulate.data.batches import build_batches
from simulate.data.load import load_data
from simulate.methods.registry import build_method
from simulate.training.loop import Session, train
from simulate.training.simulated_clock import SimulatedClock

PROFILE = "gtx1080ti_x8"
"""Profile of the simulated clock; no bench prints its seconds."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Trained:
    """Results of a run."""

    val_loss: float | None
    """None for a run that diverged."""
    curve: list[tuple[int, float]]
    """(tokens, validation loss) of every evaluation."""
    sent_bytes_per_device: float
    simulated_s: float = 0.0
    samples: int = 0
    val_accuracy: float | None = None
    """Share of images that were classified right; None for text."""
    diagnostics: list[dict[str, Any]] = field(default_factory=list)
    """Events of a run with train.diagnostics_every, oldest first."""
    seconds: list[tuple[float, float]] = field(default_factory=list)
    """(simulated seconds, validation loss) of every evaluation."""


def train_table(table: dict[str, Any], profile: Profile | None = None) -> Trained:
    """Train the run that a table describes, on a profile's clock."""
    run = build_run({**table, "cluster": {"profile": PROFILE, **table["cluster"]}})
    profile, events = profile or load_profile(PROFILE), []
    clock = SimulatedClock(run, profile.devices(run.cluster.devices), profile.link)
    communicator = VirtualCommunicator(run.cluster.devices, clock.charge_transfer, clock.wait)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(
            run=run,
            method=build_method(run, communicator, CPU),
            batches=build_batches(run, load_data(run)),
            communicator=communicator,
            clock=clock,
            emit=events.append,
            checkpoints=Path(folder),
            device=CPU,
        )
        try:
            train(session)
        # Weights that are not finite end a run; in a study that is a result.
        except RunFailedError:
            session.val_loss = None
    curve = [(event["tokens"], round(event["val_loss"], 4)) for event in events if event["kind"] == "evaluate"]
    loss = session.val_loss if session.val_loss is not None and math.isfinite(session.val_loss) else None
    samples = next((event["samples"] for event in reversed(events) if event["kind"] == "step"), 0)
    sent_bytes = communicator.counter.sent_bytes / run.cluster.devices
    diagnosed = [event for event in events if event["kind"] == "diagnostics"]
    seconds = [(event["simulated_s"], event["val_loss"]) for event in events if event["kind"] == "evaluate"]
    accuracy = session.scores.get("val_accuracy")
    return Trained(loss, curve, sent_bytes, clock.now_s, samples, accuracy, diagnosed, seconds)
