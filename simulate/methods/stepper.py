"""The optimizer step of a method: AdamW, AdamW with moments in 8 bits, Muon and APOLLO, as if they were one optimizer.

Methods say which parameters there are and at which peak rate (`decay_groups`); a Stepper divides them among the
optimizers, follows the learning-rate schedule, and with fp16 leaves out rows of copies whose gradients overflowed.
Methods call `step` once in each training step, and `tensors` for all that it changes.

Legend: C rows of copies (local devices, or 1 where all share one copy), L local devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from simulate.config.tables import Train
from simulate.layers.lora import LoraLinear
from simulate.layers.per_device import ReplicatedEmbedding, ReplicatedLinear
from simulate.methods.loss import gradients_of
from simulate.optim.adamw import AdamW
from simulate.optim.adamw8bit import AdamW8bit
from simulate.optim.apollo import Apollo
from simulate.optim.grouped import GroupedOptimizer
from simulate.optim.loss_scale import LossScale
from simulate.optim.muon import Muon
from simulate.rules.optimizer import is_eight_bit

ParameterGroup = dict[str, object]
"""Parameters with their peak learning rate and weight decay, as torch.optim takes them."""


def learning_rate_factor(train: Train, step: int) -> float:
    """Return the share of the peak rate at a step, from 0: linear warm-up, then `train.schedule` down to its floor.

    wsd is warm-up, stable, decay: the rate stays at its peak until the last `decay_share` of the steps (Hu et al. 2024,
    arXiv 2404.06395, section 4; Hägele et al. 2024, arXiv 2405.18392, whose linear decay over a fifth this is).
    """
    warmup = train.num_warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    decay = train.num_decay_steps if train.schedule == "wsd" else train.steps - warmup
    # Of the decay's steps: 0 at its first one, so that the last step is one above the floor.
    progress = min(1.0, max(0, step - (train.steps - decay)) / max(1, decay))
    return train.final_share + (1 - train.final_share) * _SHAPES[train.schedule](progress)


_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "wsd": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
"""Shares of the way from the peak rate to the final one that are left, by schedule."""


class Stepper:
    """Several optimizers over parameters (C, ...) behind one `step` and one `state`."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: list[ParameterGroup],
        matrices: set[int],
        train: Train,
        loss_scale: LossScale | None,
    ) -> None:
        """Divide the groups among optimizers; `matrices` are the ids of those that Muon or APOLLO takes, if chosen.

        With a loss scale, rows whose gradients are not finite are left as they are.
        """
        self.parameters, self.loss_scale = parameters, loss_scale
        if train.optimizer == "adamw":
            matrices = set()
        adam_groups, matrix_groups = split_groups(groups, lambda p: id(p) not in matrices)
        small_groups, large_groups = adam_groups, list[ParameterGroup]()
        if train.optimizer_state == "8bit":
            small_groups, large_groups = split_groups(adam_groups, lambda p: not is_eight_bit(p[0].numel()))
        betas = (train.adam_beta1, train.adam_beta2)
        self.adam = AdamW(small_groups, betas=betas)
        self.optimizers: list[GroupedOptimizer] = [self.adam]
        if large_groups:
            self.optimizers.append(AdamW8bit(large_groups, betas=betas))
        self.muon: Muon | None = None
        if matrix_groups and train.optimizer == "muon":
            self.muon = Muon(matrix_groups, momentum=train.muon_momentum)
            self.optimizers.append(self.muon)
        elif matrix_groups:
            self.optimizers.append(
                Apollo(
                    matrix_groups, betas=betas, rank=train.apollo_rank, scale=train.apollo_scale,
                    refresh_every=train.apollo_refresh_every, seed=train.seed,
                )
            )  # fmt: skip
        self.state = self.adam.state
        """Moments and step counters of all optimizers, by parameter."""
        # One dictionary for all, so that checkpoints and merges need not know which optimizer has a parameter.
        for optimizer in self.optimizers[1:]:
            optimizer.state = self.state
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.peak_rates = [group["lr"] for group in self.groups]

    @torch.no_grad()
    def allocate_state(self) -> None:
        """Give every parameter that has none its state: moments at zero, as the first step would.

        Called before a forward pass. Moments that come after it would lie in the room that the first pass's logits
        have left; CUDA's caching allocator then has to take that room anew from the driver, up to a fourth of all.
        """
        for optimizer in self.optimizers:
            optimizer.allocate_state()

    def step(self, rate_factor: float) -> None:
        """Take the optimizer step at `rate_factor` times the peak rates, and free the gradients."""
        for group, peak in zip(self.groups, self.peak_rates, strict=True):
            group["lr"] = peak * rate_factor
        if self.loss_scale is None:
            self._step_all()
        else:
            self._step_finite_rows(self.loss_scale)
        for parameter in self.parameters.values():
            parameter.grad = None  # freed, not zeroed: the merge that may follow needs the room

    def _step_all(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def _step_finite_rows(self, loss_scale: LossScale) -> None:
        """Step only rows whose gradients are finite; the others stay as they are."""
        gradients = gradients_of(self.parameters.values())
        finite_C = loss_scale.finite_rows(gradients)
        if loss_scale.lets_all_step(finite_C):
            self._step_all()
        elif not finite_C.any():
            self._count_step()
        else:
            before = {name: tensor.view(len(finite_C), -1)[~finite_C] for name, tensor in self.tensors().items()}
            for gradient in gradients:
                clear_rows(gradient, finite_C)  # also so that moments which begin with this step begin at zero
            self._step_all()
            after = self.tensors()
            for name, rows in before.items():
                after[name].view(len(finite_C), -1)[~finite_C] = rows
        loss_scale.update(finite_C)

    def _count_step(self) -> None:
        """Step without a change, and without room for copies: counters go on, and new moments begin at zero."""
        for group in self.groups:
            group["lr"] = 0.0  # decoupled weight decay is scaled by it, too
        for parameter in self.parameters.values():
            if parameter.grad is not None and (state := self.state.get(parameter)):
                parameter.grad = None
                if "step" in state:
                    state["step"] += 1
            elif parameter.grad is not None:
                parameter.grad.zero_()
        self._step_all()

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a step changes, (C, ...) each: parameters and moments, by their names in checkpoints."""
        moments = {
            f"optimizer.{name}.{key}": moment
            for name, parameter in self.parameters.items()
            for key, moment in self.state.get(parameter, {}).items()
            if moment.ndim > 0  # step counters are no rows
        }
        return {**{f"model.{name}": p.detach() for name, p in self.parameters.items()}, **moments}


def muon_matrices(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> set[int]:
    """Return the ids of the parameters for Muon or APOLLO: factors, and linear layers' weights inside a network.

    Those at its ends are AdamW's. An output layer that shares its weight with an embedding is at an end, too.
    """
    names, embeddings = set(), set()
    trained_whole = getattr(model, "trained_whole", ())
    for name, module in model.named_modules():
        if isinstance(module, ReplicatedLinear) and name not in trained_whole:
            names.add(f"{name}.weight")
        elif isinstance(module, LoraLinear):
            names |= {f"{name}.{key}" for key, _ in module.named_parameters() if key != "bias"}
        elif isinstance(module, ReplicatedEmbedding):
            embeddings.add(id(module.weight))
    # By id: named_parameters lists a shared weight once, under whichever name comes first.
    shared = {n for n, p in model.named_parameters() if id(p) in embeddings}
    return {id(parameters[name]) for name in names - shared if name in parameters}


def decay_groups(parameters: Iterable[nn.Parameter], rate: float, weight_decay: float) -> list[ParameterGroup]:
    """Return one group of matrices, with weight decay, and one of vectors, without; each has an axis of copies more."""
    parameters = list(parameters)
    groups: list[ParameterGroup] = [
        {"params": [p for p in parameters if p.ndim > 2], "lr": rate, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 2], "lr": rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def split_groups(
    groups: list[ParameterGroup], chosen: Callable[[nn.Parameter], bool]
) -> tuple[list[ParameterGroup], list[ParameterGroup]]:
    """Return the optimizer's groups in two: of the chosen parameters, and of the others."""
    parts: list[list[ParameterGroup]] = []
    for is_chosen in (True, False):
        part = [{**g, "params": [p for p in g["params"] if chosen(p) is is_chosen]} for g in groups]  # type: ignore[attr-defined]
        parts.append([group for group in part if group["params"]])
    return parts[0], parts[1]


def clear_rows(tensor: Tensor, healthy_L: Tensor) -> None:
    """Zero the rows of devices that are not healthy in a tensor with a leading axis over local devices or heads."""
    tensor.view(len(healthy_L), -1)[~healthy_L.to(tensor.device)] = 0


def clip_per_device(gradients: list[Tensor], devices: int, clip_norm: float) -> None:
    """Scale each device's gradients, in place, so that their joint norm is at most `clip_norm`.

    Every gradient has a leading axis of `devices`, or of devices * K heads in device order.
    """
    norms = torch.stack([torch.linalg.vector_norm(g.view(devices, -1), dim=1) for g in gradients])
    # The norm of norms is the norm of all gradients of a device; 1e-6 as in torch.nn.utils.clip_grad_norm_.
    factor_L = (clip_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp_(max=1.0)
    for gradient in gradients:
        flat = gradient.view(devices, -1)
        flat.mul_(factor_L.unsqueeze(1))
