"""Merges that nobody can block: who is late or lost is left out, and who is late brings its change to a later merge.

With the participants P of merge m, their changes since the weights that each started from, and W the current base:

    W ← W + Σ_{n in P} w_n·Δ_n,    w_n ∝ c_n·(1 + age_n)^−p,    Σ_{n in P} w_n = 1

c_n are the steps that device n brings (times its shard's size, where a method weighs by these), and age_n the merges
that it missed on its own base. Δ_n is the mean of its heads' s·B·A for LTE, and θ_n − base_n for whatever is averaged;
methods with an outer optimizer step it with the sum. The weight is Decoupled DiLoCo's (arXiv 2604.21428: by what was
trained on, any quorum) times FedAsync's polynomial discount (arXiv 1903.03934); bench/studies/quorum.py measures what
both cost. A device takes at most T steps between its merges, so that what it brings is a round's at most.

A device that is late takes the steps of the round in which its base was current, of that round's batches and rates. In
a simulation all local devices share one tensor program, so it takes them there and then, stands still until the merge
that it reaches, and is moved to each new base as merges pass it by: θ_n ← W + (θ_n − base_n). A device that is lost
takes no steps, and is moved likewise: it comes back with its adapters and moments as of its last merge.

A simulation asks simulate.rules.attendance who is there when a round begins. In a launched run the loop says so:

    1. `base_state()` of a device that is up to date goes to one that missed merges, which calls `catch_up` with it: W
       and averages become the current ones, with its own change on top, and Adam's counters the run's. The receiver
       counts it: `communicator.count_base`.
    2. All that take part call `set_participants(present_N, ages_N)`, with equal arguments, and then `close_round` and
       `merge`, as for any merge. Exchanges run inside `communicator.among(participants)`. Devices that do not take part
       call none of the three.

simulate.methods.registry puts this class in front of a method where `cluster.has_quorum`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from simulate.common.errors import RunFailedError
from simulate.common.events import Event
from simulate.config.tables import LOST
from simulate.methods.paced import Paced
from simulate.methods.stepper import clear_rows
from simulate.rules.attendance import Attendance, GivenAttendance, SimulatedAttendance
from simulate.rules.pace import discounts


class Quorum(Paced):
    """A method whose merges go on without devices that are late or lost."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        devices = self.run.cluster.devices
        self.keep_merged()  # changes of averaged parameters are taken against it
        self.attendance: GivenAttendance | SimulatedAttendance | None = None
        """The rule of who is there; the training loop gives simulations theirs. None: it is told, merge by merge."""
        if self.run.cluster.merges_given is not None:
            self.attendance = GivenAttendance(self.run)
        self._attended: int | None = None
        self.present_N = torch.ones(devices, dtype=torch.bool)
        """Devices that take part in the merge that ends this round."""
        self.lost_N = torch.zeros(devices, dtype=torch.bool)
        self.ages_N = torch.zeros(devices, dtype=torch.int64)
        """Merges that each device has missed on the base that it trains on."""
        self.pending_N = torch.zeros(devices, dtype=torch.int64)
        """Steps that late devices took on their base in earlier rounds."""
        self.round_s = torch.zeros((), dtype=torch.float64)
        """Seconds of computing and waiting of a simulation's current round."""

    # Who is there.

    def set_participants(self, present_N: Tensor, ages_N: Tensor, lost_N: Tensor | None = None) -> None:
        """Tell who takes part in the coming merge, bool (N,), and how many merges each has missed, int (N,).

        Others are late, or `lost`. Every process that takes part gives the same, right before `close_round`.
        """
        self.present_N.copy_(present_N)
        self.ages_N.copy_(ages_N)
        self.lost_N.copy_(torch.zeros_like(self.lost_N) if lost_N is None else lost_N)

    def begin_step(self, step: int, now_s: float) -> float | None:
        if self.attendance is None:
            return None
        every = self.run.method.round_steps
        first = step - step % every
        if step == first and self._attended != step:
            self.attend(self.attendance.begin(step, now_s), step, now_s)
        return float(self.round_s) / min(every, self.run.train.steps - first)  # the run's last round may be short

    def _begin_round(self, step: int) -> None:
        if self._attended == step:
            return
        if self.attendance is None:
            super()._begin_round(step)
        else:  # nobody has a clock
            self.attend(self.attendance.begin(step, 0.0), step, 0.0)

    def attend(self, round_: Attendance, step: int, now_s: float) -> None:
        """Take a simulation's next round, which begins at `now_s`, and give devices that are back the merged weights.

        Programs of several classes of devices get one attendance.
        """
        self._attended = step
        if step:
            self.trained += (self.counts_N * self._samples_N).sum()
        self.counts_N.copy_(torch.from_numpy(round_.takes_N))
        self.present_N.copy_(torch.from_numpy(round_.present_N))
        self.lost_N.copy_(torch.from_numpy(round_.brought_N == LOST))
        self.round_s.fill_(max(0.0, float(round_.ends_s_N.max()) - now_s))
        with self.communicator.background():  # the others train meanwhile
            for _ in range(int(round_.joined_N.sum())):
                self._count_base()

    # Deadlines by the clock.

    @property
    def _deadline_s(self) -> float | None:
        return self.run.cluster.deadline_s

    def _pace(self, seconds_N: Tensor) -> float:
        present = seconds_N[self.present_N].sort().values
        return float(present[min(self.run.cluster.needed, len(present)) - 1])

    def _share_counts(self, step: int) -> None:
        with self.communicator.among(self.participants):
            super()._share_counts(step)

    # Merges.

    @property
    def brought_N(self) -> Tensor:
        """Steps that each device brings to the coming merge; 0 for those that do not take part."""
        return torch.where(self.present_N, self.pending_N + self.counts_N, 0)

    @property
    def participants(self) -> list[int]:
        """The devices that take part in the coming merge, in global order."""
        return torch.nonzero(self.present_N).flatten().tolist()

    def shares(self, sizes: Sequence[float] | None = None) -> Tensor | None:
        # w_n = m_n·c_n·(1 + age_n)^−p / Σ, with m_n the samples of a step where classes differ in them
        sizes_N = self.times_samples(sizes)
        discounts_N = torch.tensor(discounts(self.ages_N.tolist(), self.run.cluster.age_exponent), dtype=torch.float64)
        weights_N = self.brought_N * discounts_N * (1.0 if sizes_N is None else sizes_N)
        if bool((weights_N == weights_N[0]).all()):
            return self.counted(None)
        return self.counted((weights_N / weights_N.sum()).to(next(iter(self.parameters.values()))))

    @torch.no_grad()
    def merge(self, step: int) -> None:
        self.close_round(step)
        absent_L = ~self.present_N[self._local]
        held = {device: self._rows(device) for device in torch.nonzero(absent_L).flatten().tolist()}
        before = {name: tensor.clone() for name, tensor in self._averages().items()} if held else {}
        self._clear_absent()
        for _ in range(int((self.present_N & (self.ages_N > 0)).sum())):
            self._count_base()
        with self.communicator.among(self.participants):
            # Not Paced's merge, which would close the round again.
            super(Paced, self).merge(step)  # type: ignore[safe-super]
        for device, rows in held.items():
            self._put_rows(device, rows, before)
        late_N = ~self.present_N & ~self.lost_N
        self.pending_N.copy_(torch.where(late_N, self.pending_N + self.counts_N, 0))
        self.ages_N.copy_(torch.where(late_N, self.ages_N + 1, 0))

    def _rows(self, device: int) -> dict[str, Tensor]:
        """Return copies of all that a local device trains with."""
        self._set_aside(device)
        return self._aside.pop(device)

    def _averages(self) -> dict[str, Tensor]:
        """Return the averaged parameters as of the last merge, by their names in a step's tensors."""
        prefix = "last."
        base = self.base_state().items()
        return {f"model.{name.removeprefix(prefix)}": tensor for name, tensor in base if name.startswith(prefix)}

    def _clear_absent(self) -> None:
        """Zero the rows of local devices that do not take part: their weight is 0, and 0 times NaN would be NaN."""
        present_L = self.present_N[self._local]
        if not bool(present_L.all()):
            for parameter in self.parameters.values():
                clear_rows(parameter, present_L)

    def _put_rows(self, device: int, rows: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        """Give a device that took no part its rows back, moved from the base `before` the merge to the merged one."""
        after, tensors = self._averages(), self.stepper.tensors()
        for name, own in rows.items():
            if name not in tensors:  # moments that the merge dropped; they end with the device's own merge
                continue
            if name in before:
                own = own + (after[name] - before[name])
            tensors[name][device * len(own) : (device + 1) * len(own)] = own

    def _count_base(self) -> None:
        payload_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self.base_state().values())
        self.communicator.count_base(payload_bytes, getattr(self.run.method, "merge_transport", "") == "server")

    @torch.no_grad()
    def catch_up(self, base: Mapping[str, Tensor], missed_steps: int) -> None:
        """Go on from another's `base_state`, with what the local devices learned since their own; for launched runs.

        `missed_steps` are the steps of the run that went by while these devices took none: Adam's counters follow it.
        """
        self.load_base(base)
        for state in self.stepper.state.values():
            if "step" in state:
                state["step"] += missed_steps

    def healthy(self) -> Tensor:
        # Who takes no part is asked when it does.
        return super().healthy() | ~self.present_N[self._local]

    def counted(self, weights_N: Tensor | None) -> Tensor | None:
        shares_N = super().counted(weights_N)
        if shares_N is not None and not bool(shares_N.isfinite().all()):
            raise RunFailedError("no device that takes part in the merge has finite weights")
        return shares_N

    def merge_record(self, step: int) -> Event | None:
        """Return an event about the coming merge, which `cluster.merges_given` can replay."""
        shares_N = self.shares()
        weights = [1 / len(self.ages_N)] * len(self.ages_N) if shares_N is None else shares_N.tolist()
        brought = torch.where(self.lost_N, LOST, self.brought_N)
        return {
            "kind": "merge", "step": step + 1, "participants": self.participants, "ages": self.ages_N.tolist(),
            "weights": weights, "brought": brought.tolist(),
        }  # fmt: skip

    def steps_done(self) -> list[int] | None:
        return None  # `merge_record` says more

    # State.

    def extra_state(self) -> dict[str, Tensor]:
        own = {"present": self.present_N, "lost": self.lost_N, "ages": self.ages_N, "pending": self.pending_N}
        arrays = {} if self.attendance is None else self.attendance.state_dict()
        draws = {name: torch.from_numpy(array) for name, array in arrays.items()}
        kept = {**own, "round_s": self.round_s, **draws}
        return {**super().extra_state(), **{f"quorum.{name}": tensor for name, tensor in kept.items()}}
