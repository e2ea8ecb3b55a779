"""The embedded images: 1,797 handwritten digits of 8 × 8 grey pixels that come with scikit-learn; torch-free.

They are the test set of Alpaydin and Kaynak's Optical Recognition of Handwritten Digits (1998).
"""

from __future__ import annotations

import numpy as np

from simulate.common.errors import InputError
from simulate.data.images import ImageSource, array_source

DIGITS = "digits"
"""Their name in run.toml."""
LARGEST = 16
"""The largest published pixel; the smallest is 0."""


def digits_source() -> ImageSource:
    """Return the digits, a tenth of each held out; raises InputError where scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            "data.name = 'digits' comes with scikit-learn, which is not installed; pip install 'lte[vision]'"
        ) from None
    digits = load_digits()
    pixels = np.round(digits.images * (255 / LARGEST)).astype(np.uint8)[:, None]
    return array_source(DIGITS, DIGITS, pixels, digits.target, [str(number) for number in range(10)])
