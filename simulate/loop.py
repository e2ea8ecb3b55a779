"""The training loop, which reads as the algorithm: local step, maybe merge, maybe evaluate, tell, maybe save."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from simulate.checkpoints import Progress, load_checkpoint, save_checkpoint
from simulate.clock import SimulatedClock
from simulate.communicator import Communicator
from simulate.config import Run
from simulate.data.batches import Batches
from simulate.diagnostics import Diagnostics
from simulate.errors import RunFailedError
from simulate.events import Emit
from simulate.loss import row_losses
from simulate.methods.base import Method
from simulate.models.build import empty_model

EVALUATION_BATCH = 16
"""Samples in one forward pass of an evaluation."""


@dataclass
class Session:
    """One run in one process: its parts, and how far it is."""

    run: Run
    method: Method
    batches: Batches
    communicator: Communicator
    clock: SimulatedClock
    emit: Emit
    checkpoints: Path
    device: torch.device
    stop: Callable[[], bool] = lambda: False
    """Asked after every step: true to save and leave."""
    step: int = 0
    """Steps done."""
    wall_s: float = 0.0
    """Measured seconds of earlier sessions of this run."""
    val_loss: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    """Means of the newest evaluation by name, the validation loss among them."""
    started_s: float = field(default_factory=time.monotonic)
    diagnostics: Diagnostics | None = field(init=False)

    def __post_init__(self) -> None:
        self.diagnostics = Diagnostics(self.method) if self.run.train.diagnostics_every else None

    def elapsed_s(self) -> float:
        """Measured seconds of the run, over all its sessions."""
        return self.wall_s + time.monotonic() - self.started_s


def train(session: Session) -> bool:
    """Run to the last step; returns False when `stop` asked to leave early, after a checkpoint was saved.

    Raises RunFailedError for a loss that is not finite.
    """
    run, method = session.run, session.method
    for step in range(session.step, run.train.steps):
        inputs, targets = session.batches.batch(step, session.communicator.local_devices)
        losses_L = method.step(inputs.to(session.device), targets.to(session.device), step)
        session.clock.charge_step()
        merged = method.merge_due(step)
        diagnostics = _diagnostics_due(session, step + 1) if merged else None
        round_figures = diagnostics.of_round(step) if diagnostics else {}
        if merged:
            method.merge(step)
            session.clock.charge_merge()
        session.step = step + 1
        last = session.step == run.train.steps
        if last or session.step % run.train.log_every == 0:
            _tell_step(session, losses_L)
        if merged and (last or _due(run, session.step, run.train.evaluate_every)):
            _evaluate(session)
        if diagnostics:
            gradient_figures = diagnostics.of_gradients(session.batches, session.step, session.device)
            session.emit({"kind": "diagnostics", "step": session.step, **round_figures, **gradient_figures})
        stopping = not last and session.stop()
        if last or stopping or session.step % run.train.checkpoint_every == 0:
            save(session)
        if stopping:
            return False
    return True


def _due(run: Run, step: int, every: int) -> bool:
    """Whether a multiple of `every` has gone by since the last merge."""
    apart = run.method.round_steps // run.method.merges_per_round
    last_merge = (step - 1) // apart * apart
    return step // every > last_merge // every


def _diagnostics_due(session: Session, step: int) -> Diagnostics | None:
    """Return what diagnoses this merge, if it is time; a run too short for that is diagnosed at its end."""
    every, steps = session.run.train.diagnostics_every, session.run.train.steps
    due = every is not None and (_due(session.run, step, every) or steps == step < every)
    return session.diagnostics if due else None


def _tell_step(session: Session, losses_L: Tensor) -> None:
    losses = losses_L.tolist()
    for device, loss in zip(session.communicator.local_devices, losses, strict=True):
        if not math.isfinite(loss):
            raise RunFailedError(
                f"the loss of device {device} is {loss} at step {session.step}; try a lower train.learning_rate"
            )
    run, method, counter = session.run, session.method, session.communicator.counter
    active = [loss for device, loss in enumerate(losses) if device in method.active(session.step - 1)]
    session.emit(
        {
            "kind": "step",
            "step": session.step,
            "train_loss": sum(active) / len(active),
            "device_losses": losses,
            "learning_rate": run.train.learning_rate * method.rate_factor(session.step - 1),
            "samples": session.step * run.samples_per_step,
            "tokens": session.step * run.tokens_per_step,
            "sent_bytes": counter.sent_bytes,
            "received_bytes": counter.received_bytes,
            "simulated_s": session.clock.now_s,
            "simulated_exchange_s": session.clock.exchange_s,
            "wall_s": session.elapsed_s(),
        }
    )


@torch.no_grad()
def _evaluate(session: Session) -> None:
    """Emit the validation loss of the merged weights, on plain layers: nothing of the method is involved."""
    model, weights = empty_model(session.run), session.method.merged_state()
    totals, counts = defaultdict[str, float](float), defaultdict[str, int](int)
    for inputs, targets in session.batches.validation(session.run.train.evaluate_samples, EVALUATION_BATCH):
        targets = targets.to(session.device)
        outputs = functional_call(model, weights, (inputs.to(session.device),), tie_weights=False)
        scores = {"val_loss": row_losses(outputs, targets), **session.batches.scores(outputs, targets)}
        for name, score_M in scores.items():
            totals[name] += float(score_M.double().sum())
            counts[name] += score_M.numel()
    session.scores = {name: totals[name] / counts[name] for name in totals}
    session.val_loss = session.scores["val_loss"]
    session.emit(
        {
            "kind": "evaluate",
            "step": session.step,
            **session.scores,
            "tokens": session.step * session.run.tokens_per_step,
            "simulated_s": session.clock.now_s,
            "sent_bytes": session.communicator.counter.sent_bytes,
        }
    )


def save(session: Session) -> None:
    """Save a checkpoint of the step that was just done, and tell."""
    counter = session.communicator.counter
    progress = Progress(
        step=session.step,
        compute_s=session.clock.compute_s,
        exchange_s=session.clock.exchange_s,
        link_free_s=session.clock.link_free_s,
        sent_bytes=counter.sent_bytes,
        received_bytes=counter.received_bytes,
        messages=counter.messages,
        wall_s=session.elapsed_s(),
        val_loss=session.val_loss,
    )
    fingerprint = session.batches.fingerprint
    state = session.method.state()
    if session.diagnostics is not None:
        state.update(session.diagnostics.state())
    path = save_checkpoint(session.checkpoints, session.run, fingerprint, progress, state)
    session.emit({"kind": "checkpoint", "step": session.step, "path": str(path)})


def restore(session: Session, path: Path) -> None:
    """Continue from a checkpoint, bit for bit; raises InputError where it does not belong to this run."""
    progress, state = load_checkpoint(path, session.run, session.batches.fingerprint)
    session.method.load_state(state)
    if session.diagnostics is not None:
        session.diagnostics.load_state(state)
    session.step, session.val_loss, session.wall_s = progress.step, progress.val_loss, progress.wall_s
    session.clock.compute_s, session.clock.exchange_s = progress.compute_s, progress.exchange_s
    session.clock.link_free_s = progress.link_free_s
    counter = session.communicator.counter
    counter.sent_bytes, counter.received_bytes = progress.sent_bytes, progress.received_bytes
    counter.messages = progress.messages
    session.started_s = time.monotonic()
