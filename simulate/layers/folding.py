"""The rule by which adapters' products are folded into copies of the weight, instead of being applied row by row.

A folded product B·A is computed once and added to a head's own copy of W; unfolded, every row passes through A and B.
Many rows make folding cheaper, at the price of memory for the copies. The layer (simulate.layers.lora) and the forecast
of its seconds and bytes (simulate.costs) must decide alike, so the rule stands here once. Torch-free.

Letters: M rows of one head, I inputs and O outputs of the layer, Y width of the rows that enter a product (I forward, O
on the way back), X width of those that leave it, R rank.
"""

from __future__ import annotations

from typing import NamedTuple


class Folds(NamedTuple):
    """Which of a head's products are folded into its copy of the weight."""

    old: bool
    """The subtracted product of the last merge."""
    new: bool
    """The product that is trained."""

    @property
    def any(self) -> bool:
        """Whether heads need copies of the weight at all."""
        return self.old or self.new


def folded_products(rows: float, entering: int, leaving: int, subtracts: bool) -> Folds:
    """Return what is folded where M rows of width `entering` leave a layer with width `leaving`.

    The old product is folded where that takes half the operations or fewer: O·I·R against M·(I + O)·R. That also bounds
    the memory of the copies: a quarter of the activations that come in and go out.
    """
    old = subtracts and 2 * entering * leaving < rows * (entering + leaving)
    # The new one costs Y·X·R folded and M·X·R from its small rows, which exist anyway. Folding it alone must halve
    # that, since heads without copies of their own share one product with W.
    new = entering < rows if old else 2 * entering <= rows
    return Folds(old, new)
