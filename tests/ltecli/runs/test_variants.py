"""Lists of values become runs: how they are split, in which order, under which names, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ltecli.runs.variants import expand, read_lists, refuse, short_keys, split_list
from simulate.common import toml_io
from simulate.common.errors import InputError
from simulate.config.run import Run, build_run


@pytest.mark.parametrize(
    ("assignment", "values"),
    [
        ("method.rank=8", ["8"]),
        ("method.rank=8,16, 32", ["8", "16", "32"]),
        ("method.steps_taken=[[1, 2], [2, 1]]", ["[[1, 2], [2, 1]]"]),
        ("method.steps_taken=[[1, 2]],[[2, 1]]", ["[[1, 2]]", "[[2, 1]]"]),
        ("data.path='a,b.txt',c.txt", ["'a,b.txt'", "c.txt"]),
        ('data.path="say \\"a,b\\"",c', ['"say \\"a,b\\""', "c"]),
        ('data.path="a\\\\",b', ['"a\\\\"', "b"]),
        ("data.path='a\\',b", ["'a\\'", "b"]),
        ("data.path=it's,that's", ["it's", "that's"]),
        ("data.path=a[1],b", ["a[1]", "b"]),
        ('a.b={x = "}", y = [1, 2]},3', ['{x = "}", y = [1, 2]}', "3"]),
        ("data.path=a=1,b=2", ["a=1", "b=2"]),
        ("data.name=", [""]),
    ],
)
def test_commas_separate_values_except_within_brackets_and_quotes(assignment: str, values: list[str]) -> None:
    key, found = split_list(assignment)
    assert (key, found) == (assignment.partition("=")[0], values)


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["method.rank=8,"], "a value between two commas is empty"),
        (["method.rank=8,16,8"], "8 is given 2 times"),
        (["method.steps_taken=[1, 2"], "] is missing at the end"),
        (["data.path='a,b"], "' is missing at the end"),
        (["method.rank"], "the form is table.key=value"),
        (["method.rank=8", "method.rank=16"], "try both values: --set method.rank=8,16"),
    ],
)
def test_lists_that_are_unclear_are_refused(assignments: list[str], words: str) -> None:
    with pytest.raises(InputError) as error:
        read_lists(assignments)
    assert words in str(error.value)


def build(assignments: Sequence[str]) -> Run:
    """Return a tiny run on one layer with 16 inputs, so that larger ranks are refused."""
    table: toml_io.Table = {
        "model": {"layers": 1, "width": 16, "attention_heads": 2, "context": 8},
        "train": {"steps": 20, "seed": 5},
        "method": {"rank": 2},
    }
    assigned = [toml_io.set_key(table, assignment) for assignment in assignments]
    return build_run(table, "run.toml", assigned=assigned)


def nothing_to_check(run: Run) -> None:
    pass


def test_every_combination_and_seed_is_a_run() -> None:
    lists = read_lists(["method.rank=2,4", "train.steps=10", "method.merge_every=5,10"])
    variants, refused = expand(build, lists, 2, nothing_to_check)
    assert not refused
    assert [variant.name for variant in variants] == [
        f"rank={rank},merge_every={every},seed={seed}" for rank in (2, 4) for every in (5, 10) for seed in (5, 6)
    ]
    runs = [variant.run for variant in variants]
    assert [(run.method.rank, run.method.round_steps, run.train.seed) for run in runs] == [  # type: ignore[attr-defined]
        (rank, every, seed) for rank in (2, 4) for every in (5, 10) for seed in (5, 6)
    ]
    assert {run.train.steps for run in runs} == {10}
    assert variants[0].settings == {"method.rank": "2", "method.merge_every": "5"}


def test_seeds_may_be_a_list_but_not_twice() -> None:
    variants, _ = expand(build, read_lists(["train.seed=3,1"]), 1, nothing_to_check)
    assert [(v.name, v.run.train.seed, v.settings) for v in variants] == [("seed=3", 3, {}), ("seed=1", 1, {})]
    with pytest.raises(InputError, match="keep one"):
        expand(build, read_lists(["train.seed=3,1"]), 2, nothing_to_check)


def test_names_are_folders_and_differ() -> None:
    """Paths lose their slashes, what then is equal gets a number, and what is too long a digest."""
    lists = {"data.path": ["a/b.txt", "a-b.txt", "A-B.txt", "x" * 300, "x" * 301]}
    variants, _ = expand(build, lists, 1, nothing_to_check)
    names = [variant.name for variant in variants]
    assert names[:3] == ["path=a-b.txt,seed=5", "path=a-b.txt,seed=5-2", "path=A-B.txt,seed=5-3"]
    assert len(set(names)) == 5
    assert all(len(name) <= 100 for name in names)


def test_keys_are_called_by_their_last_part_where_that_tells_them_apart() -> None:
    keys = ["method.rank", "method.name", "model.name", "data.path"]
    assert list(short_keys(keys).values()) == ["rank", "method", "model", "path"]
    assert list(short_keys(["a.x", "b.x"]).values()) == ["a.x", "b.x"]


def test_refused_combinations_are_named_with_their_reasons() -> None:
    variants, refused = expand(build, read_lists(["method.rank=4,64", "train.steps=10,20"]), 3, nothing_to_check)
    assert len(variants) == 6
    assert [refusal.name for refusal in refused] == ["rank=64,steps=10", "rank=64,steps=20"]
    with pytest.raises(InputError) as error:
        refuse(refused, has_others=True)
    first, second = error.value.lines
    assert first.startswith("rank=64,steps=10: command line: method: rank = 64") or "64" in first
    assert second.endswith("; --skip-refused leaves them out")


def test_a_mistake_of_all_combinations_is_told_once() -> None:
    variants, refused = expand(build, read_lists(["method.rnk=4,64"]), 1, nothing_to_check)
    assert not variants
    with pytest.raises(InputError, match=r"method.rnk is not a known key") as error:
        refuse(refused, has_others=False)
    assert len(error.value.lines) == 1


def test_many_refusals_are_counted() -> None:
    _, refused = expand(build, {"method.rank": [str(rank) for rank in range(60, 68)]}, 1, nothing_to_check)
    with pytest.raises(InputError) as error:
        refuse(refused, has_others=True)
    assert len(error.value.lines) == 5
    assert "(and 3 more combinations)" in error.value.lines[-1]
