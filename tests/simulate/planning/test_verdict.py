"""The verdict of a plan: five answers and the most important caveats, in one screen of 80 columns."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ltecli.commands import plan as plan_command
from ltecli.plan_request import PlanArgs, plan_request
from profiles import names
from simulate.planning.candidate import candidate_of
from simulate.planning.planner import Plan, evaluate
from simulate.planning.search_space import train_for
from simulate.planning.time_ranges import equivalent_range
from simulate.planning.verdict import Verdict, verdict_of
from tests.ltecli.command import Lte
from tests.selection import others_slow
from tests.simulate.data.pictures import files_of, write_folder

SCREEN_LINES, SCREEN_COLUMNS = 16, 80
QUESTIONS = ["Can it?", "How long?", "Worth it?", "Bottleneck", "Settings"]


# Others of these tests ask for the plans of these, too; `make test` has each profile with one of the models.
WITH_GPT2 = ("gtx1080ti_x8", "rtx3060_x4_home", "v100_x8")
MODELS = ("gpt2", "vit_b16")
IN_TURN = [(profile, "gpt2" if profile in WITH_GPT2 else MODELS[index % 2]) for index, profile in enumerate(names())]
SMALL = {"rank": 8}
"""Pins of plans whose candidates do not matter."""


@pytest.fixture(scope="module", autouse=True)
def one_plan_a_request() -> Iterator[None]:
    """Plan each request once; the command is given the plans that tests have, which nobody changes."""
    plans: dict[str, Plan] = {}

    def planned(request: PlanArgs, to_train: bool = True) -> Plan:
        key = f"{request} {to_train}"
        if key not in plans:
            plans[key] = plan_request(request, to_train)
        return plans[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_command, "plan_request", planned)
        yield


def verdict(**request: Any) -> tuple[Plan, Verdict]:
    plan = plan_command.plan_request(PlanArgs(**request), to_train=False)
    return plan, verdict_of(plan)


def answer(verdict: Verdict, question: str) -> tuple[str, str]:
    return next((a.answer, a.because) for a in verdict.answers if a.question == question)


@pytest.mark.parametrize(("profile", "model"), others_slow(itertools.product(names(), MODELS), IN_TURN))
def test_a_plan_is_one_screen(lte: Lte, profile: str, model: str) -> None:
    printed = lte("plan", "--profile", profile, "--model", model)
    lines = printed.stdout.splitlines()
    assert len(lines) + 1 <= SCREEN_LINES  # and the line that names what to do next
    assert max(map(len, lines)) <= SCREEN_COLUMNS
    assert next(line.split("  ")[1].strip() for line in lines if line.startswith("  ") and line[2] != " ") == "Can it?"


def test_all_figures_are_there_with_all(lte: Lte) -> None:
    command = ("plan", "--profile", "rtx3060_x4_home", "--model", "gpt2")
    shown = lte(*command, "--all").stdout
    assert "chosen: " in shown and "note: " in shown and "other methods" in shown
    assert lte(*command, "--top", "1").stdout.count("\n2 ") == 0
    assert len(lte(*command, "--top", "2", "--json").json()["candidates"]) == 2


def test_the_best_candidates_are_different_ideas_in_one_unit_a_column(lte: Lte) -> None:
    shown = lte("plan", "--profile", "rtx3060_x4_home", "--model", "gpt2", "--all").stdout
    rows = [line for line in shown.splitlines() if re.match(r"\d+\*? ", line)]
    ideas = [
        re.sub(r"(nf4|int8) | x \d+ heads|gather, |reduce, |server, ", "", re.split(r"  +", row)[1]) for row in rows
    ]
    assert len(rows) == len(set(ideas)) == 8 and rows[0].startswith("1*")
    assert "17 more" in rows[0]  # 3 formats x 3 transports x 2 counts of heads, but for itself
    for table in (rows, shown[shown.index("other methods") :].splitlines()[2:12]):
        units = [re.findall(r" ([A-Za-z]+)(?=  |$)", row.split("batch ")[1]) for row in table]
        assert {tuple(names[-7:]) for names in units} == {tuple(units[0][-7:])}


def test_a_choice_whose_range_overlaps_denses_is_probably_worth_it() -> None:
    plan, found = verdict(profile="rtx3060_x4_home", model="gpt2")
    assert [a.question for a in found.answers] == [*QUESTIONS[:4], "Merges", QUESTIONS[4]]
    assert plan.chosen is not None and plan.dense is not None
    assert answer(found, "Worth it?")[0] == "probably"
    ours, theirs = equivalent_range(plan.chosen), equivalent_range(plan.dense)  # type: ignore[arg-type]
    assert ours[1] >= theirs[0] and plan.chosen.equivalent_wall_s < plan.dense.equivalent_wall_s  # type: ignore[union-attr]
    assert "1,383 passes" in found.title
    assert found.warnings[0].startswith("Text is read 1,383 times; beyond 4")
    assert "256 of 50,257 tokens" in found.warnings[1]


def test_where_ranges_lie_apart_it_is_worth_it() -> None:
    _, found = verdict(profile="rtx3060_x4_home", model="vit_s16")
    assert answer(found, "Worth it?")[0] == "yes" and "x as fast" in answer(found, "Worth it?")[1]
    assert answer(found, "Bottleneck")[0] == "compute" and "int8 messages, Muon" in answer(found, "Settings")[0]


def test_where_dense_wins_it_says_so_and_why() -> None:
    plan, found = verdict(profile="v100_x8", model="gpt2")
    assert plan.chosen is not None and plan.chosen.run.method.name == "ddp"
    assert answer(found, "Worth it?")[0] == "no: use dense"
    assert "lte takes" in answer(found, "Worth it?")[1]


def test_where_nothing_fits_it_says_what_is_nearest(lte: Lte) -> None:
    _, found = verdict(profile="raspberry_x8", model="llama_7b", pins=SMALL)
    assert [a.question for a in found.answers] == ["Can it?"]
    assert answer(found, "Can it?")[0] == "no" and "nearest is" in answer(found, "Can it?")[1]
    assert lte("plan", "--profile", "raspberry_x8", "--model", "llama_7b", "--rank", "8").code == 3


def test_passes_over_a_text_of_ones_own_are_counted(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("a" * 1_000_000, encoding="utf-8")
    _, found = verdict(profile="laptop_cpu", data=str(text), tokens=1_800_000, pins=SMALL)
    assert found.title.endswith("2 passes over the text")
    assert not any("is read" in warning for warning in found.warnings)
    _, found = verdict(profile="laptop_cpu", data=str(text), tokens=4_500_000, pins=SMALL)
    assert found.warnings[0].startswith("Text is read 5 times")


def test_passes_over_images_are_counted(tmp_path: Path) -> None:
    write_folder(tmp_path / "pictures", files_of({"a": 20, "b": 20}))
    _, found = verdict(
        profile="rtx3060_x4_home", model="vit", data=str(tmp_path / "pictures"), samples=3600, pins=SMALL
    )
    assert "3.6k samples, 100 passes over the images" in found.title  # a tenth of each class is held out
    assert not any("teaches little" in warning for warning in found.warnings)


def test_a_plan_without_a_model_trains_as_long_as_one_of_the_default_model() -> None:
    default, named = verdict(profile="laptop_cpu", pins=SMALL), verdict(profile="laptop_cpu", model="gpt", pins=SMALL)
    assert default[0].tokens == named[0].tokens


def test_dense_training_is_compared_at_its_best_with_rare_exchanges() -> None:
    plan, _ = verdict(profile="gtx1080ti_x8", model="gpt2")
    best = candidate_of(plan.dense)
    assert best.run.train.accumulate > 1
    once = best.run.model_copy(update={"train": train_for(best.run, best.run.train.micro_batch, 1, False, plan.tokens)})
    assert candidate_of(evaluate(once, plan.profile, plan.tokens)).equivalent_wall_s > best.equivalent_wall_s
    # A batch that was given stays.
    given = verdict(profile="gtx1080ti_x8", model="gpt2", assignments=("train.micro_batch=4",))[0]
    assert {candidate_of(result).run.train.accumulate for result in (*given.candidates, *given.rejected)} == {1}


def test_a_link_that_waits_for_delays_is_not_said_to_want_bandwidth() -> None:
    _, found = verdict(profile="t4_x4", model="gpt2", devices=5000)
    assert answer(found, "Bottleneck")[0] == "the link"
    assert "waits for delays, not for bandwidth" in answer(found, "Bottleneck")[1]
