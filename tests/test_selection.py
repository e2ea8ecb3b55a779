"""What `make test` selects covers all that there is to cover, and what it leaves out is tested by `make test-all`."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.selection import PROPERTIES, others_slow, selected, settings_of, variants
from tests.tiny import VARIANTS


@pytest.mark.parametrize("property_", PROPERTIES)
def test_a_property_sees_every_setting_on_twenty_variants_at_least(property_: str) -> None:
    names = selected(property_)
    assert 20 <= len(names) < len(VARIANTS)
    assert set().union(*map(settings_of, names)) == set().union(*map(settings_of, VARIANTS))


def test_every_variant_is_tested_by_one_property_at_least() -> None:
    counts = Counter(name for property_ in PROPERTIES for name in selected(property_))
    assert set(counts) == set(VARIANTS)


def test_what_is_not_selected_is_slow_and_nothing_is_left_out() -> None:
    given = variants("memory")
    slow = [parameter.values[0] for parameter in given if not isinstance(parameter, str)]
    assert [value if isinstance(value, str) else value.values[0] for value in given] == list(VARIANTS)
    assert sorted([*slow, *selected("memory")]) == sorted(VARIANTS)
    assert all(parameter.marks[0].name == "slow" for parameter in given if not isinstance(parameter, str))


def test_a_quick_value_that_is_none_of_all_is_noticed() -> None:
    with pytest.raises(AssertionError):
        others_slow(["a", "b"], ["c"])
