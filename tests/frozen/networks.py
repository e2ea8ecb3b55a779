"""Networks of a user's own that recorded runs train. Run folders name them by this place, so it must not move."""

from __future__ import annotations

from torch import Tensor, nn


class Perceptron(nn.Module):
    """Images in, logits out; a frozen matrix whose sides are multiples of 64, since NF4 has blocks of 64."""

    def __init__(self, image: int, classes: int) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(image * image, 64), nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.one(images.flatten(1)).relu())


class Convolutional(nn.Module):
    """Images in, logits out, over convolutions and a norm."""

    def __init__(self, image: int, colours: int, classes: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(colours, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.two = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.one(images)).relu()
        return self.head(self.two(x).relu().mean((2, 3)))


class ConvolutionalAndLinear(Convolutional):
    """The same with a linear layer inside, for what adapts linear layers alone."""

    def __init__(self, image: int, colours: int, classes: int) -> None:
        super().__init__(image, colours, classes)
        self.inner = nn.Linear(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.one(images)).relu()
        return self.head(self.two(self.inner(x.mT).mT).relu().mean((2, 3)))
