"""Networks that a user could bring, for `--model tests.networks:NAME`; some are wrong on purpose."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """Tokens in, logits out, of torch's own transformer layers; positions are indexed without a batch dimension."""

    def __init__(self, context: int = 16, vocab: int = 256, width: int = 16, heads: int = 2, depth: int = 1) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.token(tokens) + self.position(torch.arange(length, device=tokens.device))
        mask = torch.full((length, length), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        return self.head(self.encoder(x, mask=mask, is_causal=True))


class Convolutional(nn.Module):
    """Images in, logits out."""

    def __init__(self, image: int, colours: int, classes: int, width: int = 4) -> None:
        super().__init__()
        self.one = nn.Conv2d(colours, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.two = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.one(images)).relu()
        return self.head(self.two(x).relu().mean((2, 3)))


class Wide(nn.Module):
    """Images in, logits out, with most weights in a hidden layer on all pixels."""

    def __init__(self, image: int, colours: int, classes: int) -> None:
        super().__init__()
        first, hidden = nn.Conv2d(colours, 8, 3, padding=1), nn.Linear(8 * image**2, 64)
        self.layers = nn.Sequential(first, nn.ReLU(), nn.Flatten(), hidden, nn.ReLU(), nn.Linear(64, classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


class Mixing(nn.Module):
    """Samples see each other's mean."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3 * 64, 8), nn.Linear(8, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.inner(images.flatten(1))
        return self.head(x - x.mean(0))


class Bare(nn.Module):
    """Owns a parameter itself."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.gain, self.head = nn.Parameter(torch.ones(1)), nn.Linear(3 * 64, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1)) * self.gain


def normalised_by_batch(classes: int) -> nn.Module:
    """Return a network that keeps running statistics."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, classes))


def forgetful(classes: int) -> nn.Module:
    """Return a network that draws at random."""
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(3 * 64, classes))


def broken() -> nn.Module:
    """Raise."""
    raise RuntimeError("no weights today")


def no_network() -> int:
    """Return something else."""
    return 3


def without_layers(classes: int) -> nn.Module:
    """Return a network that adapters cannot serve: its only linear layer gives the outputs."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, classes))


not_callable = 3


def small_talk(context: int = 16) -> nn.Module:
    """Return a network that knows 256 tokens, whatever it is asked for."""
    return Encoder(16)


class WithLoss(nn.Module):
    """Gives a loss of its own beside the logits."""

    def __init__(self, context: int, vocab: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Embedding(vocab, 8), nn.Linear(8, vocab))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.network(tokens)
        return logits, logits.square().mean()


with_loss = WithLoss


def ends(context: int, vocab: int) -> nn.Module:
    """End the program, as a script does that misses something."""
    raise SystemExit("no GPU")


def laid_out(context: int, vocab: int) -> nn.Module:
    """Return a network with tensors that do not lie in memory row by row."""
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.randn(8, 8).t())
    layer.register_buffer("table", torch.ones(1).expand(4))
    return nn.Sequential(nn.Embedding(vocab, 8), layer, nn.Linear(8, 8), nn.Linear(8, vocab))
