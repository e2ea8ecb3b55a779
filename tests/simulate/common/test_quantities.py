"""Figures with units: as people write them, by hand; what cannot be read is refused with an example."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from simulate.common.quantities import BYTES, COUNTS, OPERATIONS, RATES, SECONDS, read_count, read_quantity


@pytest.mark.parametrize(
    ("text", "units", "value"),
    [
        ("4 GB", BYTES, 4_000_000_000),
        ("4GiB", BYTES, 4 * 2**30),
        ("11_811_160_064", BYTES, 11_811_160_064),
        ("50 Mbit/s", RATES, 6_250_000),
        ("50 Mbps", RATES, 6_250_000),
        ("12.5 MB/s", RATES, 12_500_000),
        ("117.5e6", RATES, 117_500_000),
        ("20 ms", SECONDS, 0.02),
        ("200us", SECONDS, 200e-6),
        ("11.34 TFLOP/s", OPERATIONS, 11.34e12),
        ("2.5B", COUNTS, 2_500_000_000),
        ("400k", COUNTS, 400_000),
    ],
)
def test_a_figure_with_its_unit(text: str, units: Mapping[str, float], value: float) -> None:
    assert read_quantity(text, units, "") == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "units"),
    [("4 Gb", BYTES), ("50 Mb/s", RATES), ("fast", RATES), ("20 m", SECONDS), ("", BYTES), ("4 4 GB", BYTES)],
)
def test_what_may_mean_two_things_is_refused(text: str, units: Mapping[str, float]) -> None:
    with pytest.raises(ValueError, match="write it like 'EXAMPLE'"):
        read_quantity(text, units, "EXAMPLE")


def test_numbers_stay_as_they_are() -> None:
    assert read_quantity(4e9, BYTES, "") == 4e9
    assert read_quantity(None, BYTES, "") is None


def test_counts_are_whole() -> None:
    assert read_count("2.5k") == 2500
    with pytest.raises(ValueError, match="not a whole number"):
        read_count("2.5")
