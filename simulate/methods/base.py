"""What every method shares: the model on L local devices, their losses, clipping, the optimizer and the state.

Legend: L local devices, K heads of a device, S samples, T tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from simulate.comm.base import Communicator
from simulate.config.run import Run
from simulate.config.tables import Train
from simulate.layers.cross_entropy import row_losses
from simulate.layers.lora import LoraLinear
from simulate.layers.per_device import ReplicatedEmbedding, ReplicatedLinear, VectorLora
from simulate.methods.build_network import build_model
from simulate.methods.round_updates import LayerUpdates, Rows
from simulate.methods.state import State
from simulate.optim.adamw8bit import CODES, AdamW8bit, prune
from simulate.optim.loss_scale import LossScale, check_autocast, lower_precision
from simulate.optim.muon import Muon
from simulate.rules.optimizer import is_eight_bit

COSINE_FLOOR = 0.1
"""The learning rate ends at this share of its peak."""


def learning_rate_factor(train: Train, step: int) -> float:
    """Return the share of the peak rate at a step, from 0: linear warm-up, then a cosine down to COSINE_FLOOR."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    progress = min(1.0, (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    return COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))


class Method(ABC):
    """A way to train; subclasses say which parameters there are and what devices exchange, and when."""

    def __init__(
        self, run: Run, communicator: Communicator, device: torch.device, network: nn.Module | None = None
    ) -> None:
        self.run, self.communicator = run, communicator
        self.local_devices = len(communicator.local_devices)
        check_autocast(run.train, device)
        self.install(build_model(run) if network is None else network, device)
        self.loss_scale = LossScale(self.gradient_rows, device) if run.train.autocast == "fp16" else None

    def install(self, network: nn.Module, device: torch.device) -> None:
        """Make `network` the one that is trained, with a new optimizer."""
        train = self.run.train
        self.model = self.prepare(network).to(device)
        self.parameters = self.trained_parameters()
        groups = self.parameter_groups()
        matrices = self._matrices() if train.optimizer == "muon" else set()
        adam_groups, muon_groups = split_groups(groups, lambda p: id(p) not in matrices)
        small_groups, large_groups = adam_groups, list[dict[str, object]]()
        if train.optimizer_state == "8bit":
            small_groups, large_groups = split_groups(adam_groups, lambda p: not is_eight_bit(p[0].numel()))
        betas = (train.adam_beta1, train.adam_beta2)
        # Fused: one pass over the state and no temporaries, unlike the foreach form.
        self.optimizer = torch.optim.AdamW(small_groups or [{"params": []}], betas=betas, fused=True)
        self.optimizers: list[torch.optim.Optimizer] = [self.optimizer]
        if large_groups:
            self.optimizers.append(AdamW8bit(large_groups, betas=betas))
        self.muon = Muon(muon_groups, momentum=train.muon_momentum) if muon_groups else None
        if self.muon is not None:
            self.optimizers.append(self.muon)
        for optimizer in self.optimizers[1:]:
            optimizer.state = self.optimizer.state  # one state, by parameter
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.peak_rates = [group["lr"] for group in self.groups]

    def _matrices(self) -> set[int]:
        """Return the ids of what Muon steps: factors, and linear layers' weights but for those at a network's ends."""
        names, embeddings = set(), set()
        trained_whole = getattr(self.model, "trained_whole", ())
        for name, module in self.model.named_modules():
            if isinstance(module, ReplicatedLinear) and name not in trained_whole:
                names.add(f"{name}.weight")
            elif isinstance(module, LoraLinear):
                names |= {f"{name}.{key}" for key, _ in module.named_parameters() if key != "bias"}
            elif isinstance(module, ReplicatedEmbedding):
                embeddings.add(id(module.weight))
        shared = {n for n, p in self.model.named_parameters() if id(p) in embeddings}
        return {id(self.parameters[name]) for name in names - shared if name in self.parameters}

    @abstractmethod
    def prepare(self, model: nn.Module) -> nn.Module:
        """Give the plain network the parameters that this method trains."""

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return what the optimizer steps, with a leading axis of copies, by the network's names."""
        return dict(self.model.named_parameters())

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, object]]:
        """Return the optimizer's groups."""

    @abstractmethod
    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """Take one optimizer step on (L*B, T) tokens; return the devices' mean losses before it, (L,)."""

    def merge_due(self, step: int) -> bool:
        """Whether devices merge after this step: at the end of a round or of its fragments, and of the run."""
        return (step + 1) % self.run.method.steps_apart == 0 or self.is_last(step)

    def merged_weights_ready(self, step: int) -> bool:
        """Whether newly merged weights are there after this step."""
        return self.merge_due(step)

    def is_last(self, step: int) -> bool:
        """Whether this is the run's last step."""
        return step + 1 == self.run.train.steps

    def fragments_due(self, step: int) -> list[int]:
        """Return the groups of layers that merge after this step: one after the other, all at the run's end."""
        options = self.run.method
        if self.is_last(step):
            return list(range(options.merges_per_round))
        return [((step + 1) // options.steps_apart - 1) % options.merges_per_round]

    @abstractmethod
    def merge(self, step: int) -> None:
        """Make all devices' weights one model."""

    can_exclude_devices = False
    """Whether a merge can leave a device out whose weights are not finite any more."""
    healthy_N: Tensor | None = None
    """Which devices the next merge counts; None: all."""

    def healthy(self) -> Tensor:
        """Return which local devices' weights are finite, (L,), bool."""
        sums = [p.detach().view(self.local_devices, -1).sum(1, dtype=torch.float64) for p in self.parameters.values()]
        return torch.stack(sums).isfinite().all(0)

    @torch.no_grad()
    def exclude_devices(self, healthy_N: Tensor) -> None:
        """Have the next merge count nothing of devices that are not healthy; they go on from what is merged.

        Subclasses that `can_exclude_devices` also take out of their own tensors what is not finite.
        """
        self.healthy_N = healthy_N
        for state in self.optimizer.state.values():
            for tensor in state.values():
                if tensor.ndim > 0:
                    clear_rows(tensor, self.healthy_L)

    @property
    def healthy_L(self) -> Tensor:
        """Which local devices the next merge counts."""
        local = self.communicator.local_devices
        assert self.healthy_N is not None
        return self.healthy_N[local.start : local.stop]

    def counted(self, weights_N: Tensor | None) -> Tensor | None:
        """Return devices' shares of a mean, without those that are left out; None: all are equal."""
        if self.healthy_N is None:
            return weights_N
        first = next(iter(self.parameters.values()))
        weights = torch.ones(len(self.healthy_N)).to(first) if weights_N is None else weights_N
        weights = weights * self.healthy_N.to(weights)
        return weights / weights.sum()

    @abstractmethod
    def merged_state(self) -> dict[str, Tensor]:
        """Return the one model's weights by the plain network's names; right after a merge."""

    def weights_in_use(self) -> dict[str, Tensor]:
        """As `merged_state`, to compute with right away: weights that have to be made are there one at a time."""
        return self.merged_state()

    def keep_merged(self) -> None:  # noqa: B027 - most methods have nothing to keep
        """Remember the weights of every merge from here on, for `updates`; called before `load_state_dict`."""

    def rows(self) -> Rows:
        """Return whose rows are where, and what they count in the round's merge; what makes everyone's of `updates`."""
        return Rows(self.communicator, self.row_devices(), self.all_row_devices(), self.round_shares())

    def updates(self, step: int) -> Iterator[LayerUpdates]:
        """Yield what this process's heads and devices changed since the last merge, right before that of `step`.

        Nothing where all devices agree at every step.
        """
        return iter(())

    def active(self, step: int) -> list[int]:
        """Return the devices that train in this step, in global order."""
        return list(range(self.run.cluster.devices))

    def close_round(self, step: int) -> None:  # noqa: B027 - most methods' rounds end with their merge
        """Settle what devices did in the round that ends with this step, before anybody looks at it."""

    def steps_done(self) -> list[int] | None:
        """Return the steps that each device took in the last round, where they may differ."""
        return None

    def round_shares(self) -> Tensor | None:
        """Return all devices' shares of the round's merge, (N,), by the steps that each took; None: all are equal."""
        return None

    def samples_done(self, step: int) -> int:
        """Return the samples that all devices together have trained on after this step of the last round."""
        return (step + 1) * self.run.samples_per_step

    def rate_factor(self, step: int) -> float:
        """Return the share of the peak learning rate at a step, counted from 0."""
        return learning_rate_factor(self.run.train, step)

    def group_losses(self, inputs: Tensor, targets: Tensor, groups: int) -> Tensor:
        """Return the mean loss of each of `groups` equal parts of the batch, (groups,): nobody's mean mixes parts."""
        self.model.train()
        return self.row_losses(self._outputs(inputs), targets).view(groups, -1).mean(1)

    def _outputs(self, inputs: Tensor) -> Tensor:
        with lower_precision(self.run.train, inputs.device):
            outputs: Tensor = self.model(inputs)
            return outputs

    def row_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every sample or token, (M,), in order: cross-entropy with logits."""
        return row_losses(outputs, targets)

    @property
    def gradient_rows(self) -> int:
        """Rows of copies that have gradients of their own: local devices, unless several share one gradient."""
        return self.local_devices

    def backward(self, losses: Tensor) -> None:
        """Leave the gradients of the sum of losses, each row's own, in the network's parameters."""
        if self.loss_scale is None:
            losses.sum().backward()
            return
        self.loss_scale.scaled(losses).sum().backward()
        self.loss_scale.unscale(p.grad for p in self.model.parameters() if p.grad is not None)

    def clip(self, parameters: Iterable[nn.Parameter]) -> None:
        """Scale each local device's gradients to the run's largest norm; keeps none of them."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        clip_per_device(gradients, self.local_devices, self.run.train.clip_norm)

    def apply_gradients(self, step: int) -> None:
        """Take the optimizer step at the schedule's rate and free the gradients."""
        factor = self.rate_factor(step)
        for group, peak in zip(self.groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        self._step_where_finite()
        for parameter in self.parameters.values():
            parameter.grad = None

    def _step_where_finite(self) -> None:
        """Step, with a loss scale only rows whose gradients are finite; the others stay as they are."""
        if self.loss_scale is None:
            self._step_optimizers()
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        finite_C = self.loss_scale.finite_rows(gradients)
        if self.loss_scale.lets_all_step(finite_C):
            self._step_optimizers()
        elif not finite_C.any():
            self._count_step()
        else:
            before = {name: rows_of(tensor, ~finite_C).clone() for name, tensor in self.stepped().items()}
            for gradient in gradients:
                clear_rows(gradient, finite_C)  # also so that moments which begin with this step begin at zero
            self._step_optimizers()
            after = self.stepped()
            for name, rows in before.items():
                after[name].view(len(finite_C), -1)[~finite_C] = rows
        self.loss_scale.update(finite_C)

    def _count_step(self) -> None:
        """Step without a change, and without room for copies: counters go on, and new moments begin at zero."""
        for group in self.groups:
            group["lr"] = 0.0
        for parameter in self.parameters.values():
            if parameter.grad is not None and (state := self.optimizer.state.get(parameter)):
                parameter.grad = None
                if "step" in state:
                    state["step"] += 1
            elif parameter.grad is not None:
                parameter.grad.zero_()
        self._step_optimizers()

    def _step_optimizers(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def stepped(self) -> dict[str, Tensor]:
        """Return what a step changes, (rows, ...), by the names of `state`."""
        moments = {
            f"optimizer.{name}.{key}": moment
            for name, parameter in self.parameters.items()
            for key, moment in self.optimizer.state.get(parameter, {}).items()
            if moment.ndim > 0
        }
        return {**{f"model.{name}": p.detach() for name, p in self.parameters.items()}, **moments}

    def decay_groups(self, named: Iterable[tuple[str, nn.Parameter]], rate: float) -> list[dict[str, object]]:
        """Split parameters with a leading copies axis into decayed matrices and undecayed vectors."""
        parameters = [parameter for _, parameter in named]
        matrices = [p for p in parameters if p.ndim > 2]
        vectors = [p for p in parameters if p.ndim <= 2]
        decay = self.run.train.weight_decay
        groups: list[dict[str, object]] = [
            {"params": matrices, "lr": rate, "weight_decay": decay},
            {"params": vectors, "lr": rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def extra_state(self) -> dict[str, Tensor]:
        """Return the method's own tensors that the next step depends on, beside parameters, buffers and moments."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, by name."""
        state = {f"model.{name}": tensor.detach() for name, tensor in self._model_tensors().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{name}.{key}"] = value
        return {
            **state,
            **self._scale_state(),
            **{f"kept.{name}": tensor for name, tensor in self.extra_state().items()},
        }

    def _scale_state(self) -> dict[str, Tensor]:
        scale = {} if self.loss_scale is None else self.loss_scale.state_dict()
        return {f"loss_scale.{name}": tensor for name, tensor in scale.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned; raises KeyError or RuntimeError where names or shapes differ."""
        for name, tensor in self._model_tensors().items():
            tensor.copy_(state[f"model.{name}"])
        for name, tensor in self._scale_state().items():
            tensor.copy_(state[name])
        for name, tensor in self.extra_state().items():
            tensor.copy_(state[f"kept.{name}"])
        for name, parameter in self.parameters.items():
            prefix = f"optimizer.{name}."
            moments = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            self.optimizer.state.pop(parameter, None)
            if moments:
                # A fused optimizer keeps its step counter on the device, too.
                self.optimizer.state[parameter] = {k: v.to(parameter.device).clone() for k, v in moments.items()}

    def row_devices(self) -> list[int]:
        """Return the devices, in global order, to which the rows of tensors with a copies axis belong here."""
        return list(self.communicator.local_devices)

    def all_row_devices(self) -> list[int]:
        """Return the devices, in global order, that have rows of their own somewhere."""
        return list(range(self.run.cluster.devices))

    def is_per_device(self, name: str) -> bool:
        """Whether a tensor of `state`, by its name, has a leading axis over `row_devices`; all devices share others."""
        kind, _, rest = name.partition(".")
        if kind == "kept":
            return self.is_kept_per_device(rest)
        if kind == "loss_scale":
            return self.is_scaled_per_device
        if kind == "optimizer":
            rest, _, key = rest.rpartition(".")
            return key != "step" and self.is_trained_per_device
        return rest in self._per_device_tensors

    def is_kept_per_device(self, name: str) -> bool:
        """Whether a tensor of `kept` has a leading axis over devices: errors of messages and snapshots do."""
        return "error" in name or "snapshot." in name

    is_trained_per_device = True
    """Whether each device trains parameters of its own; else all share one copy."""

    @property
    def is_scaled_per_device(self) -> bool:
        """Whether each device's losses have a scale of their own; else all share one."""
        return self.is_trained_per_device

    @property
    def _per_device_tensors(self) -> set[str]:
        """The names of parameters and buffers with a leading axis over devices or their heads."""
        if not self.is_trained_per_device:
            return set()
        own = set(self.parameters)
        for name, module in self.model.named_modules():
            keys = ("a", "a0", "b0", "merged") if isinstance(module, LoraLinear | VectorLora) else ()
            own |= {f"{name}.{key}" for key in keys if isinstance(getattr(module, key, None), Tensor)}
        return own

    def sharded_state(self) -> State:
        """Return `state` divided into what all devices have in common, and what local ones have for themselves."""
        self.communicator.finish()
        owners, divided, own = self.row_devices(), State(), set(self.communicator.local_devices)
        divided.of_devices.update({device: {} for device in own})
        for name, tensor in self.state_dict().items():
            if not self.is_per_device(name):
                divided.shared[name] = tensor
                continue
            rows = tensor.shape[0] // len(owners)
            for device, part in zip(owners, tensor.split(rows), strict=True):
                if device in own:  # a node's copy is its first device's
                    divided.of_devices[device][name] = part
        return divided

    def load_divided(self, divided: State) -> None:
        """Restore what `sharded_state` of any processes returned, of all devices that have rows here."""
        joined, owners = dict(divided.shared), self.row_devices()
        for name in divided.of_devices[owners[0]]:
            joined[name] = torch.cat([divided.of_devices[device][name] for device in owners])
        self.load_state_dict(joined)

    def init_lost_device(
        self, shared: Mapping[str, Tensor], donor: Mapping[str, Tensor], device: int
    ) -> dict[str, Tensor]:
        """Return what a device starts from whose state nobody has, as `sharded_state` has it; right after a merge.

        What is trained starts like another device's, since all were equal then; moments and errors start at zero.
        """
        new = {name for name in donor if name.startswith("optimizer.") or "error" in name}
        return {name: torch.zeros_like(t) if name in new else t.clone() for name, t in donor.items()}

    def after_lost_devices_init(self) -> None:  # noqa: B027 - most methods' merged weights need nothing of a lost device
        """Make good for what lost devices had, once everything is loaded; all processes take part."""

    def _model_tensors(self) -> dict[str, Tensor]:
        return {**self.parameters, **dict(self.model.named_buffers())}


def rows_of(tensor: Tensor, chosen_C: Tensor) -> Tensor:
    """Return the chosen rows of a tensor with a leading axis over C rows of copies, or over their heads."""
    return tensor.view(len(chosen_C), -1)[chosen_C]


def clear_rows(tensor: Tensor, healthy_L: Tensor) -> None:
    """Zero the rows of devices that are not healthy in a tensor with a leading axis over local devices or heads."""
    tensor.view(len(healthy_L), -1)[~healthy_L.to(tensor.device)] = 0


def split_groups(
    groups: list[dict[str, object]], chosen: Callable[[nn.Parameter], bool]
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Return the optimizer's groups in two: of the chosen parameters, and of the others."""
    parts: list[list[dict[str, object]]] = []
    for wanted in (True, False):
        part = [{**g, "params": [p for p in g["params"] if chosen(p) is wanted]} for g in groups]  # type: ignore[attr-defined]
        parts.append([group for group in part if group["params"]])
    return parts[0], parts[1]


def prune_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], share: float) -> None:
    """Zero the `share` smallest entries, by magnitude, of each copy's and each moment's tensor.

    Adam's first moment goes as well wherever its second is zero: divided by almost nothing, it would blow up the step.
    """
    for parameter in parameters:
        if f"exp_avg{CODES}" in optimizer.state[parameter]:
            prune(optimizer.state[parameter], share)
            continue
        moments = (m for m in optimizer.state[parameter].values() if m.shape == parameter.shape)
        for moment_CX in (moment.flatten(1) for moment in moments):
            count = int(share * moment_CX.shape[1])
            if count:
                threshold_C1 = moment_CX.abs().kthvalue(count, dim=1, keepdim=True).values
                moment_CX.masked_fill_(moment_CX.abs() <= threshold_C1, 0.0)
        if "exp_avg_sq" in (state := optimizer.state[parameter]):
            state["exp_avg"].masked_fill_(state["exp_avg_sq"] == 0, 0.0)


def forget_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Let the optimizer start anew for these parameters, its step counter included."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def clip_per_device(gradients: list[Tensor], devices: int, clip_norm: float) -> None:
    """Scale each device's gradients, in place, so that their joint norm is at most `clip_norm`.

    Every gradient has a leading axis of `devices`, or of devices * K heads in device order.
    """
    norms = torch.stack([torch.linalg.vector_norm(g.view(devices, -1), dim=1) for g in gradients])
    factor_L = (clip_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp_(max=1.0)
    for gradient in gradients:
        flat = gradient.view(devices, -1)
        flat.mul_(factor_L.unsqueeze(1))
