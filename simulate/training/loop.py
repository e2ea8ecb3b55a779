"""The training loop: local step, maybe merge, maybe evaluate, emit events, maybe save.

`train` is the algorithm; the functions below follow in the order in which it calls them. The loop is the same for all
devices in one process and for one process of a launched run: method, communicator and clock hide the difference.
`lte train` (ltecli.commands.train) and simulate.launch.worker build a Session and call `train`; `restore` and
`continue_from` continue from a checkpoint, or from a state that other processes sent.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from simulate.comm.base import Communicator
from simulate.common.errors import RunFailedError
from simulate.common.events import Emit, Event
from simulate.config.run import Run
from simulate.data.batches import Batches
from simulate.layers.convert import call_with_weights
from simulate.methods.base import Method
from simulate.methods.build_network import empty_model
from simulate.methods.paced import Paced
from simulate.methods.quorum import Quorum
from simulate.methods.state import State
from simulate.methods.unequal import Unequal
from simulate.models.losses import row_losses_of
from simulate.rules.cadence import MEETING_STEPS, Cadence, evaluation_samples
from simulate.training.activity import Activity
from simulate.training.checkpoints import Progress, begin_checkpoint, load_checkpoint, prune
from simulate.training.diagnostics import Diagnostics
from simulate.training.saving import Saving
from simulate.training.simulated_clock import SimulatedClock
from simulate.training.together import Group, StateReplacedError, together

STOP_DELAY_S = 1.0
"""Longest time that a wish to stop takes from a launched run's supervisor to its first process."""


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
    """Asked at every meeting: true to save and leave."""
    step: int = 0
    """Steps done."""
    wall_s: float = 0.0
    """Measured seconds of earlier sessions of this run."""
    val_loss: float | None = None
    """Loss of the newest evaluation."""
    scores: dict[str, float] = field(default_factory=dict)
    """Means of the newest evaluation by name, the validation loss among them."""
    started_s: float = field(default_factory=time.monotonic)
    writes_shared: bool = True
    """Whether this process writes what all devices share: one of those that write into the same folder."""
    folder_devices: range | None = None
    """Devices of all processes that save into the same folder; None: this process's."""
    recovers: bool = False
    """Whether lost processes are restarted, from checkpoints at merges."""
    group: Group | None = None
    """The processes that are there now, of a launched run that goes on without lost ones; None: losses restart all."""
    is_merging: bool = False
    """Whether the step that is under way has been taken, and its merge is not complete."""
    is_simulation: bool = False
    """Whether devices are simulated here, in one process or in several that act as one would."""
    saved_at: int = 0
    """Steps done at the last checkpoint."""
    saving: Saving | None = None
    """The last checkpoint, while it is being written beside training."""
    pending_steps: list[tuple[Tensor, Event]] = field(default_factory=list)
    """Local devices' losses and the figures of steps since the last meeting."""
    pending_diagnostics: list[Event] = field(default_factory=list)
    """Diagnostics of merges since the last meeting."""
    activity: Activity = field(default_factory=Activity)
    """Phase of the run, for whoever watches it."""
    diagnostics: Diagnostics | None = field(init=False)
    cadence: Cadence = field(init=False)
    """Steps after which devices meet; in a simulation after every merge at least, for evaluations and checkpoints."""

    def __post_init__(self) -> None:
        self._launched_cadence = cadence = Cadence.of(self.run)
        # All devices in one process meet without a message; so must those of a simulation in several.
        is_close = self.communicator.is_whole or self.is_simulation
        self.cadence = replace(cadence, apart=self.run.method.steps_apart) if is_close else cadence
        self.diagnostics = Diagnostics(self.method) if self.run.train.diagnostics_every else None
        # A simulation counts steps by the profile's seconds; only launched processes go by their clocks.
        if isinstance(self.method, Paced | Unequal) and self.run.method.is_paced:
            self.method.step_s = self.clock.device_step_s
        if isinstance(self.method, Paced):
            several = self.communicator.processes > 1 and not self.is_simulation
            given = self.run.method.given_steps or self.run.cluster.merges_given
            self.method.goes_by_clock = several and given is None
        by_clock = isinstance(self.method, Paced) and self.method.goes_by_clock
        if isinstance(self.method, Quorum | Unequal) and self.run.cluster.has_quorum and not by_clock:
            self.method.attendance = self.clock.attendance

    def elapsed_s(self) -> float:
        """Measured seconds of the run, over all its sessions."""
        return self.wall_s + time.monotonic() - self.started_s

    def meets(self) -> bool:
        """Whether devices exchange losses now: within one process always, else when a merge has arrived."""
        return bool(self.is_simulation and self.pending_diagnostics) or self._meets_after(self.step)

    def _meets_after(self, step: int) -> bool:
        if self.communicator.is_whole or not self.is_simulation:
            return self.communicator.is_whole or self.cadence.meets(step)
        # A message at every step would make each wait for the slowest. But what one process does after a step, several
        # must do after the same one; and a user who stops a long round, or looks on, waits for few steps.
        asked = self._evaluates_after(step) or step % self.run.train.checkpoint_every == 0
        return asked or step % MEETING_STEPS == 0 or self._launched_cadence.meets(step)

    def evaluates(self) -> bool:
        """Whether it is time for an evaluation; it waits for the merged weights to be complete."""
        return self._evaluates_after(self.step)

    def _evaluates_after(self, step: int) -> bool:
        is_due = step == self.run.train.steps or self.cadence.is_due(step, self.run.train.evaluate_every)
        return is_due and self.method.merged_weights_ready(step - 1)

    def saves(self) -> bool:
        """Whether it is time for a checkpoint: as often as the run says, of a launched one also to recover from."""
        every = self.run.train.checkpoint_every
        if not self.recovers:
            return self.step % every == 0
        recovery = self.step - self.saved_at >= self.cadence.recover_steps
        return recovery or self.cadence.is_due(self.step, every)

    def stopping_text(self) -> str:
        """Return in words what follows a wish to stop, and how long it takes."""
        activity, steps = self.activity, self.run.train.steps
        done, is_whole = activity.step, self.communicator.is_whole
        meeting = next((step for step in range(done + 1, steps) if self._meets_after(step)), steps)
        is_evaluated = meeting == steps or self.cadence.is_due(meeting, self.run.train.evaluate_every)
        name = "this step" if is_whole else "a few steps" if self.is_simulation else "the round"
        delay_s = 0.0 if is_whole or self.is_simulation else STOP_DELAY_S
        return activity.stopping_text(meeting, is_evaluated, delay_s, name)


def train(session: Session) -> bool:
    """Run to the last step; returns False when `stop` asked to leave early, after a checkpoint was saved.

    Raises RunFailedError for losses that are not finite.
    """
    try:
        is_finished = _train(session)
        _finish_saving(session)
    except BaseException:
        # A checkpoint that is under way counts, however training ended; its own failure is not the reason for that.
        with contextlib.suppress(Exception):
            _finish_saving(session)
        raise
    return is_finished


def _train(session: Session) -> bool:
    steps, log_every = session.run.train.steps, session.run.train.log_every
    activity = session.activity
    activity.step = session.step
    takes_step = True
    while session.step < steps:
        try:
            if not _step(session, session.step, log_every, takes_step):
                return False
            takes_step = True
        except StateReplacedError as replaced:  # this process was away: the loop goes on where the others are
            activity.step, takes_step = session.step, not replaced.is_at_merge
    return True


def _step(session: Session, step: int, log_every: int, takes_step: bool) -> bool:
    """Take one step, and do what is due after it; returns False when the run was asked to stop, and is saved.

    Without `takes_step` the others have taken it, and wait to merge.
    """
    activity = session.activity
    if session.saving is not None and session.saving.is_done():
        _finish_saving(session)
    activity.begin("training")
    losses_L = _local_step(session, step) if takes_step else torch.full((session.method.local_devices,), math.nan)
    if session.method.merge_due(step):
        session.is_merging = True
        _end_round(session, step)
        session.is_merging = False
    session.step = activity.step = step + 1
    is_last = session.step == session.run.train.steps
    if is_last or session.step % log_every == 0:
        session.pending_steps.append((losses_L, _step_figures(session)))
    if not (is_last or session.meets()):
        return True  # a process learns of the others at meetings alone: other steps cost no message
    activity.begin("exchanging")
    stopping = _emit_steps(session) and not is_last
    activity.end_round()
    # Charged where a launched run would evaluate, even where this process does so more often.
    session.clock.charge_evaluation(session.step)
    if session.evaluates():
        activity.begin("evaluating")
        _evaluate(session)
    _emit_diagnostics(session)
    session.clock.charge_checkpoint(session.step)
    if is_last or stopping or session.saves():
        activity.begin("saving")
        save(session)
    if session.group is not None and not (is_last or stopping):
        session.group.admit(session)
    return not stopping


def _local_step(session: Session, step: int) -> Tensor:
    """Take one step of every local device on its own batch; returns their losses, (L,)."""
    inputs, targets = session.batches.batch(step, session.communicator.local_devices)
    step_s = session.method.begin_step(step, session.clock.now_s)
    session.clock.charge_step(step_s)  # before the step, which may wait for an exchange when its compute is done
    return session.method.step(inputs.to(session.device), targets.to(session.device), step)


def _end_round(session: Session, step: int) -> None:
    """Merge, and where it is due diagnose the round before the merge and gradients at the merged weights after it."""
    together(session, lambda: session.method.close_round(step), arrives=True)
    diagnostics = _diagnostics_due(session, step + 1)
    if diagnostics is None:
        _merge(session, step)
        return
    session.activity.begin("diagnosing")
    session.communicator.current_phase = f"the diagnostics of the round after step {step + 1}"
    # Before the merge, which overwrites the heads' changes; gradients after it, at the weights that all share.
    event = {"kind": "diagnostics", "step": step + 1, **diagnostics.of_round(step)}
    _merge(session, step)
    session.activity.begin("diagnosing")
    session.communicator.current_phase = f"the diagnostics of gradients after step {step + 1}"
    event |= diagnostics.of_gradients(session.batches, step + 1, session.device)
    session.pending_diagnostics.append({**event, "own_sent_bytes": diagnostics.take_sent_bytes()})


def _diagnostics_due(session: Session, step: int) -> Diagnostics | None:
    """Return the diagnostics if they are due at the merge after `step` steps.

    They are where a multiple of the interval went by since the last merge, in one process or many; a run too short for
    that is diagnosed at its end.
    """
    every, steps, apart = session.run.train.diagnostics_every, session.run.train.steps, session.run.method.steps_apart
    if every is None:
        return None
    last = (step - 1) // apart * apart
    due = step // every > last // every or steps == step < every
    return session.diagnostics if due else None


def _merge(session: Session, step: int) -> None:
    """Merge the devices' updates, without devices whose weights are no longer finite; these take the merged weights."""
    method = session.method
    session.activity.begin("exchanging")
    session.communicator.current_phase = f"the merge after step {step + 1}"
    steps_done = method.steps_done()
    if steps_done is not None:
        _emit_now(session, {"kind": "round", "step": step + 1, "steps_done": steps_done})
    excluded, record = together(session, lambda: _merge_healthy(session, step), changes=True)
    if excluded:
        _emit_now(session, {"kind": "left-out", "step": step + 1, "devices": excluded})
    if record is not None:
        _emit_now(session, record)
    session.clock.charge_merge()


def _merge_healthy(session: Session, step: int) -> tuple[list[int], Event | None]:
    """Merge without devices whose weights are not finite; returns these, and an event about who takes part."""
    excluded = _exclude_devices(session, step) if session.method.can_exclude_devices else []
    record = session.method.merge_record(step)
    session.method.merge(step)
    return excluded, record


def _exclude_devices(session: Session, step: int) -> list[int]:
    """Exclude devices with weights that are not finite; raises RunFailedError where no other is left."""
    healthy_L1 = session.method.healthy().double().unsqueeze(1)
    # Every process must exclude the same devices, or the merge's messages would not match.
    healthy_N = session.communicator.all_gather_scalars(healthy_L1).squeeze(1).bool()
    if not healthy_N.any():
        raise RunFailedError(f"no device's weights are finite at step {step + 1}; try a lower train.learning_rate")
    excluded = [device for device in session.communicator.present if not healthy_N[device]]
    if excluded:
        session.method.exclude_devices(healthy_N)
    return excluded


def _emit_now(session: Session, event: Event) -> None:
    """Emit what all processes learned in a merge; in a simulation behind the steps before it, as one process does."""
    if session.is_simulation and session.pending_steps:
        _emit_steps(session)
    session.emit(event)


def _step_figures(session: Session) -> Event:
    """Return the figures of a step event beside the losses."""
    run, counter = session.run, session.communicator.counter
    return {
        "step": session.step,
        "learning_rate": run.train.learning_rate * session.method.rate_factor(session.step - 1),
        "sent_bytes": counter.sent_bytes,
        "received_bytes": counter.received_bytes,
        "simulated_s": session.clock.now_s,
        "simulated_exchange_s": session.clock.exchange_s,
        "simulated_pause_s": session.clock.pause_s,
        "wall_s": session.elapsed_s(),
    }


def _emit_steps(session: Session) -> bool:
    """Emit the steps since the last meeting with all devices' losses; returns whether any process was asked to stop."""
    own = [losses_L.double().cpu() for losses_L, _ in session.pending_steps]
    # The wish to stop travels with the losses, so that all processes leave after the same step.
    wish_L = torch.full((session.method.local_devices,), float(session.stop()), dtype=torch.float64)
    session.communicator.current_phase = f"step {session.step}"
    everyones = together(session, lambda: session.communicator.all_gather_scalars(torch.stack([*own, wish_L], dim=1)))
    pending, session.pending_steps = session.pending_steps, []
    for losses_N, (_, figures) in zip(everyones.T, pending, strict=False):  # the last column is the wish
        _emit_step(session, losses_N.tolist(), figures)
    return bool(everyones[:, -1].any())


def _emit_step(session: Session, losses: list[float], figures: Event) -> None:
    """Emit one step; raises RunFailedError for a loss that is not finite, unless the merge excludes its device."""
    step, present = figures["step"], session.communicator.present
    finite = [device in present and math.isfinite(loss) for device, loss in enumerate(losses)]
    healthy = [finite[device] for device in present]
    if not any(healthy) or not (all(healthy) or session.method.can_exclude_devices):
        device = present[healthy.index(False)]
        raise RunFailedError(
            f"the loss of device {device} is {losses[device]} at step {step}; try a lower train.learning_rate"
        )
    trained = session.method.active(step - 1)
    # The mean is over devices that trained in this step: idle ones repeat their last loss, excluded ones have none.
    active = [losses[device] for device in trained if finite[device]]
    samples = session.method.samples_done(step - 1)
    if session.method.steps_done() is not None:  # a device that has taken its steps of the round has no loss
        finite = [fine and device in trained for device, fine in enumerate(finite)]
    session.emit(
        {
            "kind": "step",
            "step": step,
            "train_loss": sum(active) / len(active) if active else None,
            "device_losses": [loss if fine else None for loss, fine in zip(losses, finite, strict=True)],
            "samples": samples,
            "tokens": samples * session.run.model.units_per_sample,
            **figures,
        }
    )


def _evaluate(session: Session) -> None:
    """Emit the scores of the merged weights on a plain network, without the method's adapters."""
    communicator, names = session.communicator, ("val_loss", *session.batches.score_names)
    sums_NX = together(session, lambda: communicator.all_gather_scalars(_score_sums(session, len(names))))
    count, *totals = sums_NX.sum(0).tolist()
    session.scores = {name: total / count for name, total in zip(names, totals, strict=True)}
    session.val_loss = session.scores["val_loss"]
    session.emit(
        {
            "kind": "evaluate",
            "step": session.step,
            **session.scores,
            "tokens": session.method.samples_done(session.step - 1) * session.run.model.units_per_sample,
            "simulated_s": session.clock.now_s,
            "sent_bytes": communicator.counter.sent_bytes,
            "wall_s": session.elapsed_s(),
        }
    )


@torch.no_grad()
def _score_sums(session: Session, names: int) -> Tensor:
    """Return the number of samples and the sums of `names` scores over this process's batches, (L, 1 + names).

    Processes take turns with the batches; their sums are added in order of processes, so that all get equal scores.
    """
    model, weights = empty_model(session.run, session.device), session.method.weights_in_use()
    communicator, settings = session.communicator, session.run.train
    samples = evaluation_samples(session.run)
    batches = session.batches.validation(settings.evaluate_samples, samples)
    row_losses = row_losses_of(session.run.model)
    sums_LX = torch.zeros(len(communicator.local_devices), 1 + names, dtype=torch.float64)
    for inputs, targets in islice(batches, communicator.process, None, communicator.processes):
        targets = targets.to(session.device)
        outputs = call_with_weights(model, weights, inputs.to(session.device))
        scores = [row_losses(outputs, targets), *session.batches.scores(outputs, targets)]
        # In the first local device's row: the exchange has one row a device, and a process sums its own batches.
        sums_LX[0] += torch.tensor([scores[0].numel(), *(float(score_M.double().sum()) for score_M in scores)])
    return sums_LX


def _emit_diagnostics(session: Session) -> None:
    # At a meeting, so that the event follows its step's, which is emitted there.
    for event in session.pending_diagnostics:
        session.emit(event)
    session.pending_diagnostics.clear()


def progress_of(session: Session) -> Progress:
    """Return everything but tensors that the next step depends on."""
    counter = session.communicator.counter
    return Progress(
        step=session.step,
        compute_s=session.clock.compute_s,
        exchange_s=session.clock.exchange_s,
        link_free_s=session.clock.link_free_s,
        pause_s=session.clock.pause_s,
        sent_bytes=counter.sent_bytes,
        received_bytes=counter.received_bytes,
        messages=counter.messages,
        wall_s=session.elapsed_s(),
        val_loss=session.val_loss,
    )


def save(session: Session) -> None:
    """Begin a checkpoint of the step that was just done; training goes on while it is written."""
    began_s = time.monotonic()
    _finish_saving(session)
    progress, state = progress_of(session), session.method.state.sharded()
    if session.diagnostics is not None:
        state.shared.update(session.diagnostics.state_dict())
    fingerprint = session.batches.fingerprint
    begun = begin_checkpoint(session.checkpoints, session.run, fingerprint, progress, state, session.writes_shared)
    session.saved_at = session.step
    simulated_s, path = session.clock.now_s, str(begun.path)
    event = {"kind": "checkpoint", "step": session.step, "path": path, "simulated_s": simulated_s}
    session.saving = Saving(begun, event, began_s)
    # Processes of a simulation may not exchange at different steps, and learn of the others' parts by an exchange.
    # Those of a run that goes on without lost ones may recover at any moment, and remove checkpoints then.
    if session.group is not None or (session.is_simulation and not session.communicator.is_whole):
        _finish_saving(session)


def _finish_saving(session: Session) -> None:
    """Wait until the checkpoint under way is on the disk, remove older ones, and emit its event. Raises OSError."""
    saving, session.saving = session.saving, None
    if saving is None:
        return
    if not saving.is_done():
        session.activity.begin("saving")
    session.activity.keep("saving", saving.wait())
    if session.is_simulation:
        # Nobody removes older ones, or says that this one is there, before all processes have written their parts.
        session.communicator.all_gather_scalars(torch.zeros(session.method.local_devices, 1))
    if session.writes_shared:
        devices = session.folder_devices or session.communicator.local_devices
        present = session.communicator.present
        prune(session.checkpoints, [device for device in devices if device in present], devices)
    session.emit({**saving.event, "wall_s": session.elapsed_s(), "paused_s": saving.paused_s})


def restore(session: Session, path: Path) -> None:
    """Continue from a checkpoint, bit for bit; raises InputError where it does not belong to this run."""
    method, fingerprint = session.method, session.batches.fingerprint
    progress, state = load_checkpoint(path, session.run, fingerprint, method.row_devices())
    assert progress is not None
    continue_from(session, progress, state)


def continue_from(session: Session, progress: Progress, state: State) -> None:
    """Continue where a state was saved: restore method, diagnostics, simulated clock and byte counters."""
    session.method.state.load_sharded(state)
    if session.diagnostics is not None:
        session.diagnostics.load_state_dict(state.shared)
    set_progress(session, progress)


def set_progress(session: Session, progress: Progress) -> None:
    """Set everything but tensors to where a run is."""
    session.step, session.val_loss, session.wall_s = progress.step, progress.val_loss, progress.wall_s
    session.saved_at = progress.step
    # Clock and counters go on, so that a resumed run reports the figures of one that was never interrupted.
    session.clock.compute_s, session.clock.exchange_s = progress.compute_s, progress.exchange_s
    session.clock.link_free_s, session.clock.pause_s = progress.link_free_s, progress.pause_s
    counter = session.communicator.counter
    counter.sent_bytes, counter.received_bytes = progress.sent_bytes, progress.received_bytes
    counter.messages = progress.messages
    session.started_s = time.monotonic()
