"""The rules by which adapters' products are folded into copies of the weight, instead of being applied row by row.

A folded product B·A is computed once and added to a head's own copy of W; unfolded, every row passes through A and B.
Many rows make folding cheaper, at the price of memory for the copies. The layers (simulate.layers.lora and columns) and
the forecast of their seconds and bytes (simulate.costs) must decide alike, so the rules stand here once. Torch-free.

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


WRITTEN_WEIGHT_OPERATIONS = 20
"""Multiply-adds of a thin product that take as long as one weight does in a head's own copy: it is copied, and read for
that head alone. Measured on a core of an AMD EPYC (Zen 5): 0.45 ns a weight over 0.021 ns (forward) to 0.030 ns (back);
docs/performance.md."""


def writes_columns(rows: float, rank: int, inputs: int) -> bool:
    """Return whether heads whose A picks columns write B into their own copies of W, in both directions.

    Row by row, M rows take M·O·R multiply-adds more than W's own product: of x's columns and B forward, of g and B on
    the way back. A copy costs O·I weights, and its columns, a small part of that.
    """
    return WRITTEN_WEIGHT_OPERATIONS * inputs <= rows * rank
