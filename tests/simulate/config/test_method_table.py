"""Methods found by name, and what is said of names that lead nowhere: ours, and package.module:Name from outside."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulate.common import toml_io
from simulate.common.errors import InputError
from simulate.config.method_options import MethodOptions, RoundOptions
from simulate.config.method_table import METHOD_NAMES, PARTS, default_options, method_options, method_part
from simulate.config.run import Run, build_run, load_given_run, load_run
from simulate.rules.method_plan import plan_of

MODULE = "brought_by_the_user"
SOURCE = """
from simulate.config.method_options import RoundOptions
from simulate.methods.diloco.plan import DilocoPlan
from simulate.methods.diloco.train import Diloco

class Keys(RoundOptions):
    damping: float = 0.5

class Whole:
    options, plan, train = Keys, DilocoPlan, Diloco

class WithoutTrain:
    options, plan = Keys, DilocoPlan

class WithoutAny:
    pass

class NoClass(Whole):
    options = 5

class OtherClass(Whole):
    options = int
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a module of methods in it."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    (tmp_path / "broken_of_the_user.py").write_text("raise RuntimeError('halfway')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # which importing from the current folder adds to
    yield tmp_path
    sys.modules.pop(MODULE, None)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_method_of_ours_has_all_parts_under_its_own_name(name: str) -> None:
    classes = [method_part(name, part) for part in PARTS]
    assert all(isinstance(each, type) for each in classes)
    assert len({each.__module__.rpartition(".")[0] for each in classes}) == 1, "they lie in one folder"
    assert default_options(name).name == name


def test_a_method_from_outside_is_a_run_like_any_other(outside: Path) -> None:
    run = build_run({"method": {"name": f"{MODULE}:Whole", "merge_every": 4, "damping": 0.25}})
    assert isinstance(run.method, RoundOptions)
    assert run.model_dump()["method"]["damping"] == 0.25
    assert type(plan_of(run.method)) is method_part("diloco", "plan")
    (outside / "run.toml").write_text(toml_io.dump(run.model_dump()))
    assert load_run(outside / "run.toml") == run
    assert Run(method={"name": f"{MODULE}:Whole", "damping": 0.25}).method.name == run.method.name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lted", ("'lted' is not a method", "did you mean 'lte'", "package.module:Name")),
        ("no_such_module:Whole", ("No module named 'no_such_module'", "the form is package.module:Name")),
        (":Whole", ("Empty module name",)),
        (f"{MODULE}:", ("has no ''", "known: ")),
        (f"{MODULE}:Whale", ("has no 'Whale'", "did you mean 'Whole'")),
        (f"{MODULE}:WithoutTrain", ("has no train", "options, plan, train")),
        (f"{MODULE}:WithoutAny", ("has no options and no plan and no train",)),
        (f"{MODULE}:NoClass", ("options = 5", "no subclass of MethodOptions")),
        (f"{MODULE}:OtherClass", ("options = <class 'int'>", "no subclass of MethodOptions")),
        ("broken_of_the_user:Whole", ("RuntimeError: halfway", "mend it first")),
    ],
)
def test_a_name_that_leads_nowhere_says_what_is_missing(outside: Path, name: str, words: tuple[str, ...]) -> None:
    for ask in (method_options, lambda name: build_run({"method": {"name": name}})):
        with pytest.raises(InputError) as refusal:
            ask(name)
        assert f"method.name = {name!r}" in str(refusal.value)
        assert all(word in str(refusal.value) for word in words), refusal.value
    with pytest.raises(ValueError, match=r"method\.name = "):
        Run(method={"name": name})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [5, [1], {"a": 1}, True])
def test_a_name_that_is_no_text_is_refused(name: object) -> None:
    with pytest.raises(InputError, match=r"method\.name = .* is not text; give it one of lte, ddp"):
        build_run({"method": {"name": name}})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"damp": 0.5}, "method.damp is not a known key; did you mean 'damping'"),
        ({"damping": "much"}, "method.damping = 'much'"),
        ({"merge_every": 0}, "method.merge_every = 0"),
    ],
)
def test_keys_and_values_of_a_method_from_outside_are_checked(
    outside: Path, given: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError) as refusal:
        build_run({"method": {"name": f"{MODULE}:Whole", **given}})
    assert words in str(refusal.value)


def test_an_unknown_method_is_shown_where_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[method]\nmerge_every = 4\nname = "lted"\n')
    with pytest.raises(InputError, match=r"run\.toml: method\.name = 'lted'"):
        load_run(path)
    with pytest.raises(InputError, match=r"command line: method\.name = 'ltee'"):
        load_given_run(path, ["method.name=ltee"])


def test_the_options_of_every_method_are_those_of_its_name() -> None:
    for name in METHOD_NAMES:
        options = method_options(name)
        assert issubclass(options, MethodOptions)
        assert options.model_fields["name"].default == name
