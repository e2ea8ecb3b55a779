"""Small networks as users write them, composed of parts: `--model tests.zoo:Net --set model.parts=linear,frozen`.

Each part maps activations (S, T, D) to activations. `TRAINED` train in plain PyTorch and here to the same numbers;
`REFUSED` are turned away in a line that has the given words.
"""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 8
AT_THE_ROOT = "parameter of the network's own"


class Net(nn.Module):
    """Tokens in, logits out, with the named parts in between."""

    def __init__(self, context: int = 6, vocab: int = 256, parts: str = "linear") -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, WIDTH), nn.Embedding(context, WIDTH)
        self.parts = nn.ModuleList(PARTS[name]() for name in parts.split(","))
        self.inner = nn.Linear(WIDTH, WIDTH)  # a plan needs one layer that adapters can serve
        self.head = nn.Linear(WIDTH, vocab)
        self.shift = nn.Parameter(torch.full((WIDTH,), 0.1)) if AT_THE_ROOT in parts.split(",") else None

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(places.expand_as(tokens))
        x = x if self.shift is None else x + self.shift
        for part in self.parts:
            x = x + part(x)
        return self.head(x + torch.tanh(self.inner(x)))


class Scaled(nn.Linear):
    """A linear layer whose forward says more than a linear layer's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class Grown(nn.Linear):
    """A linear layer that only its constructor tells apart."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)


class Shifted(nn.Embedding):
    """Positions that count from another place."""

    def forward(self, index: Tensor) -> Tensor:
        return super().forward((index + 1) % self.num_embeddings)


class Apply(nn.Module):
    """Layers and a function of them."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


class Positions(nn.Module):
    """An embedding of a kind of its own, by place."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Shifted(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]))


class Places(nn.Module):
    """Trained positions of a kind of its own, which all samples share."""

    def __init__(self, leading: bool) -> None:
        super().__init__()
        self.table, self.leading = nn.Parameter(torch.randn(16, WIDTH)), leading

    def forward(self, length: int) -> Tensor:
        table = self.table[:length]
        return table.unsqueeze(0) if self.leading else table


class Table(nn.Module):
    """A constant table of positions."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        places, rates = torch.arange(16.0)[:, None], torch.exp(-torch.arange(WIDTH) / WIDTH)
        self.register_buffer("table", torch.sin(places * rates), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table[: x.shape[1]]


class RunningScale(nn.Module):
    """A scale that training keeps up to date."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.scale.mul_(0.9).add_(0.1 * x.std())
        return x / self.scale


class DropPath(nn.Module):
    """Leaves whole samples out."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.probability
        return x * kept / (1 - self.probability)


class Counting(nn.Module):
    """Warms up over its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        return x * min(1.0, self.passes / 100)


class Experts(nn.Module):
    """Each sample goes to the expert that its first number chooses; a step may leave some of them without any."""

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        chosen, y = (x[:, 0, 0].detach() * 10).long() % len(self.experts), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                y = y.index_add(0, rows, expert(x[rows]))
        return y


class OwnExperts(Experts):
    """The same with a parameter of its own, so that each device's samples pass through the whole of it."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Gain(nn.Module):
    """Parameters of its own, of no, one and two dimensions, and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.vector = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.ones(WIDTH))
        self.matrix = nn.Parameter(torch.eye(WIDTH) * 0.1)
        self.order = nn.Parameter(torch.randperm(WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x[..., self.order] * self.scale * self.vector) @ self.matrix


class Pair(NamedTuple):
    """Two results."""

    first: Tensor
    second: Tensor


class TwoResults(nn.Linear):
    """Returns a named tuple."""

    def forward(self, x: Tensor) -> Pair:  # type: ignore[override]
        return Pair(super().forward(x), x)


class Masked(nn.Module):
    """A layer of a kind of its own with an argument that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = Mix()

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, torch.ones(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device).tril())


class Mix(nn.Module):
    """Weighs earlier tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.gain * (mask @ x)


class First(nn.Module):
    """The first result of a recurrent layer or of attention."""

    def __init__(self, layer: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(*[x] * self.times)[0]
        return result


class Block(nn.Module):
    """A block as many write it: a gain of its own, layers that are called, one whose weight is read, one shared."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.gain, self.checkpointed = nn.Parameter(torch.full((WIDTH,), 0.5)), checkpointed
        self.into, self.out = linear(), nn.Sequential(nn.Tanh(), linear(bias=False))
        self.read, self.norm = linear(), nn.LayerNorm(WIDTH)
        self.conv = nn.Conv2d(WIDTH, WIDTH, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) * self.gain
        x = checkpoint(self.into, x, use_reentrant=False) if self.checkpointed else self.into(x)
        x = F.linear(self.out(x), self.read.weight, self.read.bias) + self.into(x)
        convolved: Tensor = self.conv(x.mT.unsqueeze(3)).squeeze(3).mT
        return convolved


class Pool(nn.Module):
    """Keeps its caller's layers, and has another function than forward."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.layer = nn.Parameter(torch.tensor(0.5)), linear()

    def map(self, x: Tensor) -> Tensor:
        mapped: Tensor = self.layer(x) * self.gain
        return mapped


def shared_by_blocks() -> nn.Module:
    """Return a plain layer that also is part of a block with parameters of its own."""
    block = Block()
    return nn.Sequential(block, nn.Tanh(), block.into)


def linear(bias: bool = True) -> nn.Linear:
    """Return a square layer."""
    return nn.Linear(WIDTH, WIDTH, bias=bias)


def hooked() -> nn.Module:
    """Return a layer with a hook on its result."""
    layer = linear()
    layer.register_forward_hook(lambda module, arguments, output: output * 0.5)
    return layer


def hooked_before() -> nn.Module:
    """Return a layer with a hook on its input."""
    layer = nn.LayerNorm(WIDTH)
    layer.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 0.5,))
    return layer


def patched() -> nn.Module:
    """Return a layer whose forward was replaced on the object."""
    layer = linear()
    layer.forward = lambda x: F.linear(x, layer.weight) * 0.5  # type: ignore[method-assign]
    return layer


def frozen(layer: nn.Module, *names: str) -> nn.Module:
    """Return a layer with all or the named parameters frozen."""
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(bool(names) and name not in names)
    return layer


def tied() -> nn.Module:
    """Return two layers with one weight."""
    one, other = linear(), linear()
    other.weight = one.weight
    return Apply(lambda x, one, other: torch.tanh(one(x)) + other(x), one, other)


def doubled() -> nn.Module:
    """Return a layer under two names."""
    layer = linear()
    return nn.Sequential(layer, nn.Tanh(), layer)


def drawn_by(generator: Callable[[], np.ndarray]) -> nn.Module:
    """Return a layer with start weights from another generator than torch's."""
    layer = linear()
    layer.weight.data = torch.from_numpy(generator()).float()
    return layer


def with_gradient_hook() -> nn.Module:
    """Return a layer that masks its gradient."""
    layer = linear()
    layer.weight.register_hook(lambda gradient: gradient * 0)
    return layer


def own_generator() -> nn.Module:
    """Return noise from a generator that no seed reaches."""
    generator = torch.Generator().manual_seed(0)
    return Apply(lambda x: x + torch.randn(x.shape, generator=generator).to(x))


def as_cast(dtype: torch.dtype) -> nn.Module:
    """Return a layer in another format."""
    layer = linear().to(dtype)
    return Apply(lambda x, layer: layer(x.to(dtype)).real.to(x), layer)


class Rotation(nn.Module):
    """Turns pairs of numbers by their place, with factors that are complex."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(16.0), torch.logspace(0, -3, WIDTH // 2))
        self.register_buffer("factors", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.factors[: x.shape[1]]).flatten(2).to(x)


class Scales(nn.Module):
    """Reads its parameters from a list and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([torch.full((WIDTH,), 0.5)])
        self.shifts = nn.ParameterDict({"all": torch.zeros(WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scales[0] + self.shifts["all"]


class IndexedPlaces(nn.Module):
    """Positions whose embedding has a buffer of their numbers, and sizes that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, WIDTH)
        self.table.register_buffer("numbers", torch.arange(16).expand(1, -1))
        self.scale = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        places = self.table(self.table.numbers[:1, : x.shape[1]]) / self.table.embedding_dim**0.5
        return x + self.scale(places.expand_as(x)) / self.scale.out_features


class Remembering(nn.Module):
    """Keeps a mean of its weight beside its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.mean = linear(), None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight.detach().mean()
        self.mean = weight if self.mean is None else 0.9 * self.mean + 0.1 * weight
        return self.layer(x) * (1 + self.mean)


class Renamed(nn.LayerNorm):
    """Has something beside its tensors in its state_dict."""

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state


class Freezing(nn.Module):
    """Freezes a layer whenever training begins."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def train(self, mode: bool = True) -> Freezing:
        super().train(mode)
        self.layer.weight.requires_grad_(False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class KeptElsewhere(nn.Module):
    """Uses a weight from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        self.weights = [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[0])


def transposed() -> nn.Module:
    """Return a layer whose weight lies in memory by columns."""
    layer = linear()
    layer.weight = nn.Parameter(torch.randn(WIDTH, WIDTH).mul(0.3).t())
    return layer


def same_memory() -> nn.Module:
    """Return two layers with two parameters over the same numbers."""
    one, other = linear(), linear()
    other.weight = nn.Parameter(one.weight.data)
    return nn.Sequential(one, other)


def without_outputs() -> nn.Module:
    """Return a layer of no outputs, as a size that is computed may leave."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that there is nothing to draw
        return nn.Linear(WIDTH, 0)


def norm_twice() -> nn.Module:
    """Return a norm under two names."""
    norm = nn.LayerNorm(WIDTH)
    return nn.Sequential(norm, linear(), norm)


def clipped(x: Tensor, layer: nn.Linear) -> Tensor:
    """Return a layer's result after its weight was clipped, past what torch watches."""
    layer.weight.data.clamp_(-0.1, 0.1)
    return layer(x)


def with_buffer(buffer: Tensor) -> nn.Module:
    """Return a norm that a buffer was hung on."""
    norm = nn.LayerNorm(WIDTH)
    norm.register_buffer("kept", buffer)
    return norm


def routed(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    """Return the results of two experts, each of which gets a list of several samples' tokens."""
    rows = x.reshape(-1, WIDTH)
    chosen = rows[:, 0] > 0
    result = torch.zeros_like(rows)
    for expert, mask in ((first, chosen), (second, ~chosen)):
        result = result.index_add(0, mask.nonzero().squeeze(1), expert(rows[mask]))
    return result.view_as(x)


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "subclass": lambda: Scaled(WIDTH, WIDTH),
    "constructor": Grown,
    "positions": Positions,
    "places": lambda: Apply(lambda x, places: x * places(x.shape[1]), Places(leading=False)),
    "places of one row": lambda: Apply(lambda x, places: x * places(x.shape[1]), Places(leading=True)),
    "hooked": hooked,
    "hooked before": hooked_before,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(linear()),
    "weight norm without bias": lambda: nn.utils.parametrizations.weight_norm(linear(bias=False)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(linear(), orthogonal_map="cayley"),
    "table": lambda: Table(persistent=True),
    "table of its own": lambda: Table(persistent=False),
    "drop path of 0": lambda: DropPath(0.0),
    "dropout of 0": lambda: Apply(lambda x: F.dropout(x, 0.0)),
    "frozen": lambda: frozen(linear()),
    "frozen weight": lambda: frozen(linear(), "weight"),
    "frozen bias": lambda: frozen(linear(), "bias"),
    "frozen norm": lambda: frozen(nn.LayerNorm(WIDTH)),
    "frozen shift": lambda: frozen(nn.LayerNorm(WIDTH), "bias"),
    "frozen attention": lambda: First(frozen(nn.MultiheadAttention(WIDTH, 2, batch_first=True), "in_proj_weight"), 3),
    "unused": lambda: Apply(lambda x, layer: x, linear()),
    "detached": lambda: Apply(lambda x, layer: x + layer(x).detach() * 0.1, linear()),
    "experts": OwnExperts,
    "twice": lambda: Apply(lambda x, layer: layer(torch.tanh(layer(x))), linear()),
    "doubled": doubled,
    "tied": tied,
    "in place": lambda: nn.Sequential(linear(), nn.ReLU(inplace=True)),
    "in place after norms": lambda: nn.Sequential(
        nn.LayerNorm(WIDTH), nn.LeakyReLU(inplace=True), nn.RMSNorm(WIDTH), nn.LeakyReLU(inplace=True)
    ),
    "convolution": lambda: Apply(
        lambda x, conv: torch.relu_(conv(x.mT.unsqueeze(3))).squeeze(3).mT,
        nn.Conv2d(WIDTH, WIDTH, (3, 1), padding=(1, 0)),
    ),
    "one-dimensional convolution": lambda: Apply(lambda x, conv: conv(x.mT).mT, nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
    "gru": lambda: First(nn.GRU(WIDTH, WIDTH, batch_first=True)),
    "attention": lambda: First(nn.MultiheadAttention(WIDTH, 2, batch_first=True), 3),
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=0.0, batch_first=True),
    "bilinear": lambda: Apply(lambda x, layer: layer(x, x) * 0.1, nn.Bilinear(WIDTH, WIDTH, WIDTH)),
    "own parameters": Gain,
    "named tuple": lambda: Apply(lambda x, layer: layer(x).first + layer(x).second, TwoResults(WIDTH, WIDTH)),
    "masked": Masked,
    "block": Block,
    "shared by blocks": shared_by_blocks,
    "weights read": lambda: Apply(lambda x, layer: F.linear(x, layer.weight), linear()),
    "other functions": lambda: Apply(lambda x, pool: pool.map(x), Pool()),
    "gathered experts": Experts,
    "routed": lambda: Apply(routed, linear(), linear()),
    AT_THE_ROOT: lambda: Apply(torch.tanh),
    "norm without affine": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "norm without bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "numpy's draws": lambda: drawn_by(lambda: np.random.normal(0, 0.3, (WIDTH, WIDTH))),
    "complex factors": Rotation,
    "parameters in lists": Scales,
    "buffer on a layer": IndexedPlaces,
    "halves": lambda: with_buffer(torch.ones(3, dtype=torch.float16)),
    "by columns": transposed,
    "norm twice": norm_twice,
    "python's draws": lambda: drawn_by(lambda: np.array([[random.gauss(0, 0.3)] * WIDTH for _ in range(WIDTH)])),
}  # fmt: skip
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "patched": (patched, "computes something else"),
    "checkpointed": (lambda: Block(checkpointed=True), "backward pass"),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(linear()), "writes to the buffer"),
    "old weight norm": (lambda: nn.utils.weight_norm(linear()), "torch.nn.utils.parametrizations has norms"),
    "lazy": (lambda: nn.LazyLinear(WIDTH), "has no weights before its first samples"),
    "scripted": (lambda: torch.jit.script(linear()), "is scripted, compiled or wrapped"),
    "compiled": (lambda: torch.compile(linear()), "is scripted, compiled or wrapped"),
    "dropout": (lambda: nn.Dropout(0.1), "drops activations with probability 0.1"),
    "functional dropout": (lambda: Apply(lambda x: F.dropout(x, 0.001)), "passes of training"),
    "drop path": (lambda: DropPath(0.01), "passes of training"),
    "bernoulli": (lambda: Apply(lambda x: x * torch.empty_like(x).bernoulli_(0.999)), "passes of training"),
    "noise": (lambda: Apply(lambda x: x + torch.randn_like(x) * 1e-3), "passes of training"),
    "python's noise": (lambda: Apply(lambda x: x * random.uniform(0.9, 1.1)), "passes of training"),
    "numpy's noise": (lambda: Apply(lambda x: x * float(np.random.uniform(0.9, 1.1))), "passes of training"),
    "noise of its own": (own_generator, "passes of training"),
    "counting": (Counting, "passes of training"),
    "running scale": (RunningScale, "training writes to the buffer"),
    "batch norm": (lambda: Apply(lambda x, norm: norm(x.mT).mT, nn.BatchNorm1d(WIDTH)), "use LayerNorm"),
    "gradient hook": (with_gradient_hook, "has a hook on its gradient"),
    "bfloat16": (lambda: as_cast(torch.bfloat16), "is bfloat16; build the network in float32"),
    "float64": (lambda: as_cast(torch.float64), "is float64; build the network in float32"),
    "complex": (lambda: as_cast(torch.complex64), "is complex64; build the network in float32"),
    "unseeded": (
        lambda: drawn_by(lambda: np.random.default_rng().normal(0, 0.3, (WIDTH, WIDTH))),
        "other start weights whenever",
    ),
    "limited norms": (
        lambda: Apply(lambda x, table: table(x[..., 0].gt(0).long()), nn.Embedding(2, WIDTH, max_norm=0.5)),
        "passes write to the parameter",
    ),
    "clipped": (lambda: Apply(clipped, linear()), "passes write to the parameter"),
    "remembering": (Remembering, "leaves something behind"),
    "extra state": (lambda: Renamed(WIDTH), "neither a parameter nor a buffer"),
    "freezing": (Freezing, "you can only change"),
    "kept elsewhere": (KeptElsewhere, "be kept under their own names"),
    "same memory": (same_memory, "lie in the same memory"),
    "without values": (lambda: nn.Linear(WIDTH, WIDTH, device="meta"), "is on the device meta"),
    "inference": (torch.inference_mode()(linear), "was made in torch.inference_mode"),
    "not a number": (lambda: drawn_by(lambda: np.full((WIDTH, WIDTH), np.nan)), "are not numbers (NaN)"),
    "wide numbers": (lambda: with_buffer(torch.ones(3, dtype=torch.complex128)), "which no checkpoint can hold"),
    "dropout of 1": (lambda: nn.Dropout(1), "drops activations with probability 1"),
    "exit": (lambda: sys.exit("no GPU"), "raised SystemExit: no GPU"),
    "no outputs": (
        lambda: Apply(lambda x, layer: torch.cat([x, layer(x)], -1), without_outputs()), "has no elements",
    ),
    "mixing": (lambda: Apply(lambda x: x - x.mean(0)), "must keep samples apart"),
}  # fmt: skip
REFUSED_IN_LAUNCHES: dict[str, Callable[[], nn.Module]] = {
    "drawn by rank": lambda: drawn_by(lambda: np.full((WIDTH, WIDTH), 0.1 * (1 + int(os.environ.get("RANK", "0"))))),
}
PARTS = {**TRAINED, **REFUSED_IN_LAUNCHES, **{name: make for name, (make, _) in REFUSED.items()}}
