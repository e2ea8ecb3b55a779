"""Multi-head LoRA (Huh et al. 2024, arXiv 2402.16828, section 3), one head after another."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tests.reference.common import adapted_names
from tests.reference.lora import LoraTwin, Pairs


class MhloraTwin(LoraTwin):
    """The network sees W + (s/H)·Σ_h B_h·A_h on all devices."""

    def make_pairs(self) -> list[Pairs]:
        return [Pairs(self.model, self.rank, partial(self._start, head)) for head in range(self.run.heads)]

    def _start(self, head: int, name: str) -> Tensor:
        return self.draw(name, head, 0)

    def effective(self) -> dict[str, Tensor]:
        seen = {name: self.frozen(name) for name in adapted_names(self.model)}
        for head in self.pairs:
            for name in seen:
                seen[name] = seen[name] + self.scale / len(self.pairs) * head.b[name] @ head.a[name]
        return seen
