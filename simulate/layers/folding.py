"""Rule of when a head's low-rank product is cheaper folded into its weight than computed row by row; torch-free.

simulate.layers.lora computes by this rule, and whoever forecasts its operations or memory must apply the same one.
Counts are operations up to a common factor of the rank and of 2.
"""

from __future__ import annotations


def folds_old_product(rows: int, outputs: int, inputs: int) -> bool:
    """Whether a head's old product takes at most half the operations in its weight, O·I, of those in M rows, M·(I + O).

    The rule also bounds the memory of folded weights, by a quarter of the activations that come in and go out.
    """
    return 2 * outputs * inputs < rows * (outputs + inputs)


def folds_new_product(rows: int, width: int, folds_old: bool) -> bool:
    """Whether a head's new product costs less in its weight, Y·X, than from its small rows, M·X; `width` is Y.

    If the old product is not folded, all heads could share W in one product, so the saving must be half.
    """
    return width < rows if folds_old else 2 * width <= rows
