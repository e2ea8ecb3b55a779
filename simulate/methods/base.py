"""The base class of all methods: a network on L local devices, its training steps and its merges.

A method says which parameters it trains, what a step does, and when and how devices become one model. The rest has
modules of its own: simulate.methods.loss (losses and gradients), simulate.methods.stepper (the optimizers),
simulate.methods.method_state (what checkpoints hold), and simulate.methods.paced and overlapped, which the registry
puts in front of a method with `pace` or `merge_delay`. The training loop, the measurements and the launcher's recovery
call it.

Legend: L local devices, N devices, K heads of a device, B samples of a device's step, S samples, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simulate.comm.base import Communicator, Exchanges
from simulate.config.run import Run
from simulate.layers.convert import unused_tensors
from simulate.methods.build_network import build_model
from simulate.methods.loss import Loss
from simulate.methods.method_state import MethodState
from simulate.methods.round_updates import LayerUpdates, Rows
from simulate.methods.stepper import (
    ParameterGroup,
    Stepper,
    clear_rows,
    decay_groups,
    learning_rate_factor,
    muon_matrices,
)
from simulate.models.losses import group_means_of
from simulate.optim.loss_scale import LossScale, check_autocast


class Method(ABC):
    """A way to train; subclasses say which parameters there are, and what devices exchange and when."""

    is_trained_per_device = True
    """Whether each device trains parameters of its own; else all share one copy."""
    weighs_devices = False
    """Whether devices' shares of a merge differ from round to round."""
    can_exclude_devices = False
    """Whether a merge can leave out a device whose weights are no longer finite."""

    def __init__(
        self, run: Run, communicator: Communicator, device: torch.device, network: nn.Module | None = None
    ) -> None:
        self.run, self.communicator = run.of_devices(communicator.local_devices), communicator
        self.local_devices = len(communicator.local_devices)
        self.between = self.exchanges_between(communicator)
        """Exchanges between what has weights of its own: devices, or the nodes that train as one."""
        self.healthy_N: Tensor | None = None
        """Devices, or nodes that train as one, that the next merge counts, bool; None: all."""
        check_autocast(self.run.train, device)  # before the network is built, which takes longer
        self.loss_scale = LossScale(self.gradient_rows, device) if self.run.train.autocast == "fp16" else None
        self.install(build_model(self.run) if network is None else network, device)

    def install(self, network: nn.Module, device: torch.device) -> None:
        """Make `network` the one that is trained, with a new optimizer."""
        train = self.run.train
        self.model = self.prepare(network).to(device)
        self.parameters = self.trained_parameters()
        # One device's overflow must not reach a mean of gradients, so it is zeroed before; else its row skips the step.
        zeroes = self.keeps_gradients_apart and not self.is_trained_per_device
        # Converted layers tell matrices inside the network from those at its ends, so Muon's are found here.
        matrices = muon_matrices(self.model, self.parameters)
        scale = None if zeroes else self.loss_scale
        self.stepper = Stepper(self.parameters, self.parameter_groups(), matrices, train, scale)
        self.loss = Loss(
            self.model, train, self.loss_scale, zeroes, self.stepper.allocate_state, self.parameters_in_use,
            unused_tensors(self.model), group_means_of(self.run.model),
        )  # fmt: skip

    # What is trained, and how a step goes.

    def exchanges_between(self, communicator: Communicator) -> Exchanges:
        """Return the exchanges between what has weights of its own: all devices, unless a method joins some."""
        return communicator

    @abstractmethod
    def prepare(self, model: nn.Module) -> nn.Module:
        """Give the plain network the parameters that this method trains."""

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the optimizer steps, with a leading axis of copies, by the network's names."""
        return dict(self.model.named_parameters())

    def parameters_in_use(self) -> Iterator[nn.Parameter]:
        """Yield the network's parameters that the current step trains."""
        return self.model.parameters()

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the optimizer's groups: unless a method says otherwise, all parameters at the run's rate."""
        train = self.run.train
        return decay_groups(self.parameters.values(), train.learning_rate, train.weight_decay)

    @property
    def keeps_gradients_apart(self) -> bool:
        """Whether each row of copies has gradients of its own; else all local devices share one gradient."""
        return True

    @property
    def gradient_rows(self) -> int:
        """Rows of copies that have gradients of their own."""
        return len(self.row_devices()) if self.keeps_gradients_apart else 1

    @abstractmethod
    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """Take one optimizer step on (L*B, T) tokens; return the devices' mean losses before it, (L,)."""

    def rate_factor(self, step: int) -> float:
        """Return the share of the peak learning rate at a step, counted from 0."""
        return learning_rate_factor(self.run.train, step)

    # When and how devices become one model.

    def merge_due(self, step: int) -> bool:
        """Whether devices merge after this step: at the end of a round or of its fragments, and of the run."""
        return (step + 1) % self.run.method.steps_apart == 0 or self.is_last(step)

    def merged_weights_ready(self, step: int) -> bool:
        """Whether newly merged weights are there after this step."""
        return self.merge_due(step)

    def is_last(self, step: int) -> bool:
        """Whether this is the run's last step."""
        return step + 1 == self.run.train.steps

    def fragments_in_flight(self) -> list[int]:
        """Return the groups of layers whose merge was sent and has not arrived: none, but with `merge_delay`."""
        return []

    def fragments_due(self, step: int) -> list[int]:
        """Return the groups of layers that merge after this step: one after the other, all at the run's end."""
        options = self.run.method
        if self.is_last(step):
            return list(range(options.merges_per_round))
        return [((step + 1) // options.steps_apart - 1) % options.merges_per_round]

    @abstractmethod
    def merge(self, step: int) -> None:
        """Make all devices' weights one model."""

    @abstractmethod
    def merged_state(self) -> dict[str, Tensor]:
        """Return the one model's weights by the plain network's names; right after a merge."""

    def weights_in_use(self) -> dict[str, Tensor]:
        """Return `merged_state` for immediate use: weights that must be computed first exist one at a time."""
        return self.merged_state()

    # Devices that a merge leaves out.

    def healthy(self) -> Tensor:
        """Return which local devices' weights are finite, (L,), bool."""
        # One sum a device: a mask of all elements would take a quarter of the weights' memory.
        rows = len(self.between.local_devices)
        sums = [p.detach().view(rows, -1).sum(1, dtype=torch.float64) for p in self.parameters.values()]
        return torch.stack(sums).isfinite().all(0).repeat_interleave(self.local_devices // rows)

    @torch.no_grad()
    def exclude_devices(self, healthy_N: Tensor) -> None:
        """Leave devices that are not healthy out of the next merge; they go on from the merged weights.

        Subclasses that `can_exclude_devices` also clear non-finite numbers from their own tensors.
        """
        self.healthy_N = healthy_N
        for state in self.stepper.state.values():
            for tensor in state.values():
                if tensor.ndim > 0:  # step counters are no rows
                    clear_rows(tensor, self.healthy_L)

    @property
    def healthy_L(self) -> Tensor:
        """Local devices, or nodes that train as one, that the next merge counts, bool."""
        local = self.between.local_devices
        assert self.healthy_N is not None
        return self.healthy_N[local.start : local.stop]

    def counted(self, weights_N: Tensor | None) -> Tensor | None:
        """Return devices' shares of a mean, without those that are left out; None: all are equal."""
        if self.healthy_N is None:
            return weights_N
        first = next(iter(self.parameters.values()))
        weights = torch.ones(len(self.healthy_N)).to(first) if weights_N is None else weights_N
        weights = weights * self.healthy_N.to(weights)  # and the others' shares add up to 1 again
        return weights / weights.sum()

    # Devices that are late, or come back.

    def base_state(self) -> dict[str, Tensor]:
        """Return what all devices of a round started from alike, by name: merged weights and outer momentum."""
        raise NotImplementedError("only methods that merge by rounds have a base")

    def load_base(self, base: Mapping[str, Tensor]) -> None:
        """Move the local devices from the base that they trained on to another's `base_state`, with their changes."""
        raise NotImplementedError("only methods that merge by rounds have a base")

    # Rounds in which devices take unequal numbers of steps.

    def begin_step(self, step: int, now_s: float) -> float | None:
        """Prepare a step of a simulation that begins at `now_s`; return its seconds where they are not the planned."""
        return None

    def active(self, step: int) -> list[int]:
        """Return the devices that train in this step, in global order."""
        return list(range(self.run.cluster.devices))

    def close_round(self, step: int) -> None:  # noqa: B027 - most methods' rounds end with their merge
        """Settle the round that ends with this step, before its weights are looked at or merged."""

    def steps_done(self) -> list[int] | None:
        """Return the steps that each device took in the last round, where they may differ."""
        return None

    def merge_record(self, step: int) -> dict[str, Any] | None:
        """Return an event about who takes part in the merge after this step, where not all devices may."""
        return None

    def shares(self, sizes: Sequence[float] | None = None) -> Tensor | None:
        """Return w_n, (N,): all devices' shares of the round's merge, in proportion to `sizes`; None: all are equal."""
        sizes_N = self.times_samples(sizes)
        return self.counted(None if sizes_N is None else self._as_shares(sizes_N))

    def times_samples(self, sizes: Sequence[float] | None) -> Tensor | None:
        """Return `sizes` times the devices' samples of a step, where these differ, (N,); None: all are equal."""
        samples = self.run.method.device_samples
        if not samples:
            return None if sizes is None else torch.tensor(sizes, dtype=torch.float64)
        return torch.tensor(samples, dtype=torch.float64) * torch.tensor(sizes or 1.0, dtype=torch.float64)

    def shares_of_samples(self) -> Tensor | None:
        """Return all devices' shares of the samples of a step, (N,), healthy or not; None where they are equal."""
        samples_N = self.times_samples(None)
        return None if samples_N is None else self._as_shares(samples_N)

    @property
    def own_weight(self) -> float:
        """Weight of each local device in a mean over samples, in units of an equal share of the devices."""
        run = self.run
        return run.train.device_batch * run.cluster.devices / run.samples_per_step if run.method.device_samples else 1.0

    def _as_shares(self, sizes_N: Tensor) -> Tensor:
        return (sizes_N / sizes_N.sum()).to(next(iter(self.parameters.values())))

    def samples_done(self, step: int) -> int:
        """Return the samples that all devices together have trained on after this step of the last round."""
        return (step + 1) * self.run.samples_per_step

    # Changes between merges, for diagnostics.

    def keep_merged(self) -> None:  # noqa: B027 - most methods have nothing to keep
        """Keep the weights of every merge from here on, for `updates`; called before a state is loaded."""

    def updates(self, step: int) -> Iterator[LayerUpdates]:
        """Yield the changes of local heads and devices since the last merge, right before the merge of `step`.

        Nothing where all devices agree at every step.
        """
        return iter(())

    def rows(self) -> Rows:
        """Return which device owns each row, here and elsewhere, and its merge weight."""
        return Rows(self.communicator, self.row_devices(), self.all_row_devices(), self.shares())

    def row_devices(self) -> list[int]:
        """Return the devices, in global order, to which the rows of tensors with a copies axis belong here."""
        return list(self.communicator.local_devices)

    def all_row_devices(self) -> list[int]:
        """Return the devices, in global order, that have rows of their own somewhere."""
        return list(range(self.run.cluster.devices))

    # What a method adds to its state.

    @property
    def state(self) -> MethodState:
        """Everything that the next step depends on: to save, to divide among devices, to restore."""
        return MethodState(self)  # made when asked for: a kept one would hold the method alive in a cycle

    def extra_state(self) -> dict[str, Tensor]:
        """Return the method's own tensors that the next step depends on, beside parameters, buffers and moments."""
        return {}

    def is_kept_per_device(self, name: str) -> bool:
        """Whether a tensor of `extra_state` has a leading axis over devices: errors of messages and snapshots do."""
        return "error" in name or "snapshot." in name

    def before_saving(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - most methods save what they train with
        """Replace entries of a collected state that must be saved otherwise than they are in use."""

    def before_loading(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - most methods' tensors are there
        """Make tensors for the entries of a state that is about to be loaded."""

    def init_lost_device(
        self, shared: Mapping[str, Tensor], donor: Mapping[str, Tensor], device: int
    ) -> dict[str, Tensor]:
        """Return the start of a device whose state is lost, as `sharded` names it; right after a merge.

        What is trained starts like another device's, since all were equal then; moments and errors start at zero.
        """
        # Another device's moments belong to gradients of other data.
        new = {name for name in donor if name.startswith("optimizer.") or "error" in name}
        return {name: torch.zeros_like(t) if name in new else t.clone() for name, t in donor.items()}

    def init_returning_device(
        self, shared: Mapping[str, Tensor], donor: Mapping[str, Tensor], own: Mapping[str, Tensor], device: int
    ) -> dict[str, Tensor]:
        """Return the start of a device that comes back after a merge: as if lost, but for what is its own.

        `own` has the tensors of its last state; they may be missing.
        """
        start = self.init_lost_device(shared, donor, device)
        return {name: own[name] if name in own and self.is_devices_own(name) else t for name, t in start.items()}

    def is_devices_own(self, name: str) -> bool:
        """Whether a device's tensor, as `sharded` names it, is unlike others' right after a merge: moments, errors."""
        return name.startswith("optimizer.") or "error" in name

    def after_lost_devices_init(self) -> None:  # noqa: B027 - most methods' merged weights need nothing of a lost device
        """Correct for the lost devices' part of the merged weights, once everything is loaded; all processes join."""
