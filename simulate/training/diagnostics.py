"""Figures that explain how a run learns: how its devices' updates of a round relate, and how noisy its gradients are.

The training loop takes them at merges, where train.diagnostics_every asks for it; training is the same to the bit with
and without. Several processes compute the same figures together, and count the bytes for that apart from the method's
(simulate.costs.diagnostics_bytes plans them). simulate.probe uses the gradients and the spectra's figures.

W is a linear layer's matrix, ΔW_h the change of its effective weight by head h since the last merge (a device of a
dense method counts as one head), ΔW their (weighted) mean: the merge adds it to W, where no outer optimizer, compressed
wire or delayed mix changes it on the way. Layers that merge at staggered steps each count from their own last merge.
Means are over layers.

    cosine                  <ΔW_h, ΔW_g> / (|ΔW_h|·|ΔW_g|), mean over pairs of heads; Frobenius product and norms
    grassmann_rad           (Σ_i θ_i²)^½, mean over pairs, with the principal angles θ_i between the spans of the k
                            leading left singular vectors of ΔW_h and ΔW_g, k = 8 or, where a head has less, its rank
                            (Edelman et al. 1998, arXiv physics/9806030, section 4.3; angles: Björck and Golub 1973)
    grassmann_limit_rad     (π/2)·√k, where all of them are orthogonal
    effective_rank          exp(−Σ_i p_i·ln p_i), p_i = σ_i/Σσ, of ΔW's singular values (Roy and Vetterli 2007)
    stable_rank             |ΔW|_F² / |ΔW|_2² = Σσ²/σ_1²
    first_directions_share  |Uᵀ·ΔW·V|_F² / |ΔW|_F², with the 8 leading left and right singular vectors U, V of the first
                            ΔW that was diagnosed: its own share in the first event, and in later ones the share of
                            the training that still lies in those directions
    drift_mean, drift_max   |θ_n − θ| / |θ − θ_last| over devices n, with θ the mean over devices, of everything that
                            each device trains: effective weights of adapted layers, and replicated parameters
    noise_scale_samples     B_noise = tr Σ / |G|², the batch from which on larger ones bring little (McCandlish et al.
    noise_scale_tokens      2018, arXiv 1812.06162), from two batch sizes as in its appendix A.1, both terms unbiased:
    gradient_square           |G|² ≈ (B·|g_B|² − b·|g_b|²) / (B − b)
    gradient_variance         tr Σ ≈ (|g_b|² − |g_B|²) / (1/b − 1/B)
                            Plain gradients at the merged weights, on the batches of the 4 coming steps: b is one
                            device's batch and |g_b|² the mean over all of these, B all of them together, which has
                            less variance than the average of estimates step by step. Where devices hold different
                            data, that difference counts as noise. An estimate from few samples may have |G|² below 0:
                            then there is no scale

Pairs are all pairs of at most 8 heads, drawn anew for every event. Figures that a method cannot have are missing:
methods that agree at every step have no rounds, a single head has no pairs, a single device no drift.

Legend: K directions, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from simulate.comm.base import ByteCounter, Communicator
from simulate.comm.transfers import bucket
from simulate.common.errors import InputError
from simulate.common.seeding import generator
from simulate.config.run import Run
from simulate.data.batches import Batches
from simulate.layers.dtypes import DTYPES
from simulate.layers.lazy_weight import LazyWeight
from simulate.layers.quantized import mapped_zeros
from simulate.methods.base import Method
from simulate.methods.build_network import empty_model
from simulate.methods.round_updates import LayerUpdates, decompose, square_norm
from simulate.models.losses import RowLosses, row_losses_of
from simulate.models.schema import FactoryModel
from simulate.rules.diagnostics import DIRECTIONS, NOISE_BATCHES, SAMPLED_HEADS

Figures = dict[str, float]
_FIRST = "diagnostics.first"
SQUARED_ELEMENTS, SQUARED_PARTS = 2**12, 64
"""A sum of squares copies this many elements at a time in double precision, or this part of a large tensor."""


class Diagnostics:
    """The figures of one run; keeps the first diagnosed directions, and has the method keep its merged weights."""

    def __init__(self, method: Method) -> None:
        self.method, self.run = method, method.run
        method.keep_merged()
        self.first: dict[str, tuple[Tensor, Tensor]] = {}
        self.traffic = ByteCounter()
        """Bytes that devices exchanged for the figures since `take_sent_bytes`."""

    @torch.no_grad()
    def of_round(self, step: int) -> Figures:
        """Return the figures of the round that ends with `step`; right before its merge. All processes take part."""
        method = self.method
        with method.communicator.uncounted(self.traffic):
            rows = method.rows()  # once for all layers: owners and shares are the round's
            drift, layers = _Drift(method.communicator), _Means()
            for local in method.updates(step):
                if not self._add_layer(local.over(rows), step, drift, layers):
                    return {}  # a run that diverged ends with an error about its loss
            return {**layers.figures(), **drift.figures()}

    def _add_layer(self, updates: LayerUpdates, step: int, drift: _Drift, layers: _Means) -> bool:
        """Add a layer's figures; returns whether its mean update is finite, which is the same in all processes."""
        # A function of its own, so that a layer's tensors are freed before the next layer's are made.
        mean = updates.mean()
        if not mean.isfinite().all():
            return False
        drift.add(updates, mean)
        if updates.is_matrix:
            layers.add(pair_figures(updates, sampled_heads(self.run.train.seed, step, updates.heads)))
            layers.add(self._mean_figures(updates.name, mean))
        return True

    def _mean_figures(self, name: str, mean_OI: Tensor) -> Figures:
        values, left_OK, right_IK = decompose(mean_OI, DIRECTIONS)
        if not len(values):
            return {}
        # Contiguous, as a checkpoint restores them: products of another layout would round differently after a resume.
        left_OK, right_IK = self.first.setdefault(name, (left_OK.contiguous(), right_IK.contiguous()))
        return {
            "effective_rank": effective_rank(values),
            "stable_rank": stable_rank(values),
            "first_directions_share": share_within(mean_OI, left_OK, right_IK),
        }

    def of_gradients(self, batches: Batches, step: int, device: torch.device) -> Figures:
        """Return the gradient noise scale at the merged weights, right after a merge; `step` is the next one.

        Each process takes the gradients of its own devices' batches, one pass's samples at a time.
        """
        gradients, size = GradientSums(self.run, self.method.weights_in_use()), self.run.train.micro_batch
        for coming in range(step, step + NOISE_BATCHES):
            inputs, targets = batches.batch(coming, self.method.communicator.local_devices)
            for pair in zip(inputs.split(size), targets.split(size), strict=True):
                gradients.add(*(tensor.to(device) for tensor in pair))
        with self.method.communicator.uncounted(self.traffic):
            small_square, big_square = gradients.squares(self.method.communicator)
        samples = self.run.train.device_batch * NOISE_BATCHES * self.run.cluster.devices
        return noise_figures(small_square, big_square, size, samples, self.run.model.units_per_sample)

    def take_sent_bytes(self) -> int:
        """Return the payload bytes that all devices sent for the figures since the last call."""
        traffic, self.traffic = self.traffic, ByteCounter()
        return traffic.sent_bytes

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that later events depend on, by name; for the checkpoint."""
        sides = ((name, side, pair[index]) for name, pair in self.first.items() for index, side in enumerate("uv"))
        return {f"{_FIRST}.{side}.{name}": tensor for name, side, tensor in sides}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors of `state_dict`; other names are ignored."""
        prefix = f"{_FIRST}.u."
        for name in (key.removeprefix(prefix) for key in state if key.startswith(prefix)):
            left, right = (state[f"{_FIRST}.{side}.{name}"] for side in "uv")
            where = next(iter(self.method.parameters.values())).device
            self.first[name] = left.to(where), right.to(where)


class _Means:
    """Means of figures by name, each over the layers or pairs that have it."""

    def __init__(self) -> None:
        self._values: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, figures: Figures) -> None:
        for name, value in figures.items():
            self._values[name].append(value)

    def figures(self) -> Figures:
        return {name: math.fsum(values) / len(values) for name, values in self._values.items()}


class _Drift:
    """Squared distances of devices from their mean, and of the mean from the last merge, summed over layers."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._own: defaultdict[int, float] = defaultdict(float)
        """Squared distance of each device whose rows this process has."""
        self._devices: Sequence[int] = ()
        self._mean = 0.0

    def add(self, updates: LayerUpdates, mean: Tensor) -> None:
        self._devices = updates.devices
        for device, distance in updates.distances(mean).items():
            self._own[device] += distance
        self._mean += square_norm(mean)

    def figures(self) -> Figures:
        """Exchange the devices' distances, and return mean and largest drift of all; nothing for a single device."""
        if len(self._devices) < 2 or not self._mean:
            return {}
        # A node of several devices has its row at the first of them; the others add zero.
        own_L1 = [[self._own.get(device, 0.0)] for device in self._communicator.local_devices]
        gathered_N1 = self._communicator.all_gather_scalars(torch.tensor(own_L1, dtype=torch.float64))
        distances_N = gathered_N1.flatten().tolist()
        ratios = [math.sqrt(distances_N[device] / self._mean) for device in self._devices]
        return {"drift_mean": math.fsum(ratios) / len(ratios), "drift_max": max(ratios)}


Take = Callable[[str, Tensor], None]
"""Function of a parameter's name and its gradient, which it may keep."""


class _LossAndBack(nn.Module):
    """Computes a network's mean loss and runs the backward pass inside the forward call.

    functional_call restores the network's own weights when the call ends, but recomputed activations need those that
    the call was given.
    """

    def __init__(self, network: nn.Module, row_losses: RowLosses) -> None:
        super().__init__()
        self.network, self.row_losses = network, row_losses

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = self.row_losses(self.network(inputs), targets).mean()
        loss.backward()
        return loss.detach()


class LossGradient:
    """Gradients of a plain network's mean loss at given weights; lazy weights are materialised one at a time."""

    def __init__(self, run: Run, weights: Mapping[str, Tensor]) -> None:
        network = empty_model(run, next(iter(weights.values())).device)
        if not isinstance(run.model, FactoryModel):
            network.train()  # ours have no dropout, and recompute their blocks in this mode alone
        self._passes = _LossAndBack(network, row_losses_of(run.model))
        # named_parameters lists weights that layers share once: they get one gradient.
        used = {name: weights[name] for name, _ in network.named_parameters()}
        self.leaves = {
            name: weight.leaf() if isinstance(weight, LazyWeight) else weight.detach().requires_grad_()
            for name, weight in used.items()
        }

    def of(self, inputs: Tensor, targets: Tensor, take: Take) -> Tensor:
        """Return a batch's mean loss; `take` gets each parameter's gradient as soon as it is complete.

        Raises InputError for a user's network whose gradients come in parts.
        """
        unused = set(self.leaves)

        def give(name: str, leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None  # so that no more than one gradient is held at a time
            assert gradient is not None
            if name not in unused:
                raise InputError(
                    f"model: gradients of {name} come in parts, as where torch.utils.checkpoint recomputes a layer of "
                    "several uses with use_reentrant=True, and cannot be measured; recompute with use_reentrant=False"
                )
            unused.discard(name)
            take(name, gradient)

        hooks = [leaf.register_post_accumulate_grad_hook(partial(give, name)) for name, leaf in self.leaves.items()]
        try:
            with torch.enable_grad():
                weights = {f"network.{name}": leaf for name, leaf in self.leaves.items()}
                loss: Tensor = functional_call(self._passes, weights, (inputs, targets))
        finally:
            for hook in hooks:
                hook.remove()
        for name in unused:  # the loss does not depend on it
            leaf = self.leaves[name]
            take(name, torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device))
        return loss


class GradientSums:
    """Sum of a plain network's gradients at given weights, and the sum of their squared norms.

    It takes the device memory of one gradient: the sums lie in a memory-mapped file of the host.
    """

    def __init__(self, run: Run, weights: Mapping[str, Tensor]) -> None:
        self._gradient = LossGradient(run, weights)
        leaves = self._gradient.leaves
        sizes = [leaf.numel() for leaf in leaves.values()]
        self.flat = mapped_zeros(sum(sizes), DTYPES[run.train.dtype])
        parts = zip(leaves.items(), self.flat.split(sizes), strict=True)
        self.sums = {name: part.view(leaf.shape) for (name, leaf), part in parts}
        self._device = next(iter(leaves.values())).device
        self._squares: list[Tensor] = []  # on the device: reading each would wait for it
        self.count = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add the gradient of one batch's mean loss."""

        def take(name: str, gradient: Tensor) -> None:
            self._squares.append(_square(gradient))
            self.sums[name].add_(gradient.to(self.flat.device))

        self._gradient.of(inputs, targets, take)
        self.count += 1

    def square_of_sum(self, communicator: Communicator) -> list[Tensor]:
        """Return the squared norm of all processes' summed gradients, in parts to be added up.

        Messages are made on the device, since backends such as NCCL send nothing from the host.
        """
        sums, squares = list(self.sums.values()), list[Tensor]()
        where = self.flat.device if communicator.is_whole else self._device
        for message in bucket([part.nbytes for part in sums]):
            parts = [sums[index].to(where) for index in message]
            communicator.all_reduce(parts)
            squares.extend(map(_square, parts))
            del parts  # before the next ones take their room
        return squares

    def squares(self, communicator: Communicator) -> tuple[float, float]:
        """Return the mean squared norm of all processes' gradients, and the squared norm of their mean."""
        of_sum = self.square_of_sum(communicator)
        own_LX = torch.zeros(len(communicator.local_devices), 2, dtype=torch.float64)
        own_LX[0] = torch.tensor([_total(self._squares), self.count], dtype=torch.float64)
        squares, count = communicator.all_gather_scalars(own_LX).sum(0).tolist()
        return squares / count, _total(of_sum) / count**2


def _square(x: Tensor) -> Tensor:
    """Return the sum of the squares of x in double precision, of which a small part at a time is a copy."""
    parts = x.flatten().split(max(SQUARED_ELEMENTS, x.numel() // SQUARED_PARTS))
    return torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) ** 2 for part in parts]).sum()


def _total(values: Sequence[Tensor]) -> float:
    return math.fsum(torch.stack(list(values)).tolist())


def sampled_heads(seed: int, step: int, heads: int) -> list[int]:
    """Return the sorted heads whose pairs are compared: all, or a draw addressed by the step."""
    if heads <= SAMPLED_HEADS:
        return list(range(heads))
    draw = generator(seed, "diagnosed heads", step)
    return sorted(int(head) for head in draw.choice(heads, size=SAMPLED_HEADS, replace=False))


def pair_figures(updates: LayerUpdates, heads: Sequence[int]) -> Figures:
    """Return the mean cosine and Grassmann distance over all pairs of some heads; nothing where a head is unchanged."""
    if len(heads) < 2:
        return {}
    dots_HH, bases = updates.compare(heads, DIRECTIONS)
    # Spans of equal dimensions alone have a distance.
    dots, common = dots_HH.tolist(), min(basis.shape[1] for basis in bases)
    norms = [math.sqrt(max(0.0, dots[index][index])) for index in range(len(heads))]
    if not all(norms):
        return {}
    pairs = _Means()
    for one, other in combinations(range(len(heads)), 2):
        pairs.add(
            {
                "cosine": dots[one][other] / (norms[one] * norms[other]),
                "grassmann_rad": grassmann_distance(bases[one][:, :common], bases[other][:, :common]),
                "grassmann_limit_rad": math.pi / 2 * math.sqrt(common),
            }
        )
    return pairs.figures()


def grassmann_distance(basis_OK: Tensor, other_OK: Tensor) -> float:
    """Return the root of the sum of squared principal angles between two spans, given by orthonormal columns."""
    # Björck and Golub 1973: cosines from the overlap, sines from what the overlap leaves of the other span.
    overlap_KK = basis_OK.T @ other_OK
    cosines = torch.linalg.svdvals(overlap_KK).clamp(max=1)
    sines = torch.linalg.svdvals(other_OK - basis_OK @ overlap_KK).flip(0).clamp(max=1)
    # Rounding of a cosine near 1, or of a sine near 1, would spoil its angle: take each where it is steep.
    angles = torch.where(cosines**2 < 0.5, cosines.arccos(), sines.arcsin())
    return float(torch.linalg.vector_norm(angles))


def effective_rank(values: Tensor) -> float:
    """Return exp of the entropy of singular values as shares of their sum; all of them positive."""
    shares = values / values.sum()
    return math.exp(-float((shares * shares.log()).sum()))


def stable_rank(values: Tensor) -> float:
    """Return the squared Frobenius norm over the squared largest of the singular values."""
    return float((values**2).sum() / values.max() ** 2)


def share_within(x_OI: Tensor, left_OK: Tensor, right_IK: Tensor) -> float:
    """Return the share of x's squared Frobenius norm between the spans of orthonormal columns left and right."""
    return square_norm(left_OK.T @ x_OI @ right_IK) / square_norm(x_OI)


def noise_figures(small_square: float, big_square: float, small: int, big: int, sample_tokens: int) -> Figures:
    """Return unbiased estimates of |G|² and tr Σ from squared norms of gradients of `small` and of `big` samples.

    With the noise scale, where |G|² is above 0.
    """
    # McCandlish et al. 2018, appendix A.1: |G|² ≈ (B·|g_B|² − b·|g_b|²)/(B − b), tr Σ ≈ (|g_b|² − |g_B|²)/(1/b − 1/B).
    square = (big * big_square - small * small_square) / (big - small)
    variance = (small_square - big_square) / (1 / small - 1 / big)
    if not math.isfinite(square + variance):
        return {}
    figures = {"gradient_square": square, "gradient_variance": variance}
    if square > 0 and variance >= 0:
        scale = variance / square
        figures |= {"noise_scale_samples": scale, "noise_scale_tokens": scale * sample_tokens}
    return figures
