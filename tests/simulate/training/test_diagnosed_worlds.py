"""Diagnostics in several processes: the figures of one process, and the training without diagnostics."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from simulate.common.events import Event
from simulate.costs.diagnostics_bytes import diagnostics_exchange
from tests.diagnosed import (
    EVERY,
    PLAIN,
    SICK,
    STEPS,
    WITH_SICK,
    checkpoints_of,
    diagnosed,
    diagnosed_run,
    launched_events,
    simulated_events,
)
from tests.processes import DEVICES

pytestmark = pytest.mark.slow
IN_PAIRS = ["lte, frozen a", "lte", "lte, late", "fedavg", "diloco, streaming", "daso", "ddp", "local-sgd, paced"]
SICK_ONES = [f"{WITH_SICK}lte, frozen a", f"{WITH_SICK}diloco"]
UNTOUCHED = ["diloco, streaming", "lte, late"]
ALONE = ["lte, frozen a, redrawn", "daso", "local-sgd"]
UNEQUAL = [
    "local-sgd",
    *(name for name in IN_PAIRS if name != "daso"),
    "lte, vector norms",
    "diloco, late",
    "lte, paced, redrawn",
]
GRADIENTS = {"gradient_square", "gradient_variance", "noise_scale_samples", "noise_scale_tokens"}
ABOUT = {"kind", "step", "own_sent_bytes"}


def assert_same(ours: list[Event], theirs: list[Event], tolerance: float = 1e-9) -> None:
    """Compare all diagnostics of one session with another's."""
    assert [event["step"] for event in diagnosed(ours)] == [event["step"] for event in diagnosed(theirs)]
    for event, expected in zip(diagnosed(ours), diagnosed(theirs), strict=True):
        assert event.keys() == expected.keys()
        for key in event.keys() - {"kind"}:
            assert event[key] == pytest.approx(expected[key], rel=tolerance, abs=1e-12), key


@pytest.fixture(scope="module")
def in_pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Event]]]:
    """Sessions in two processes of two devices each, and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("pairs")
    simulated_events(checkpoints_of(folder, "lte, pruned"), "lte, pruned")
    (begun, ended) = sorted(checkpoints_of(folder, "lte, pruned").glob("step-*"))
    shutil.rmtree(ended)
    assert begun.name == "step-00000008"
    names = [*IN_PAIRS, *SICK_ONES, *(PLAIN + name for name in UNTOUCHED), "lte, pruned"]
    return folder, launched_events(folder, names, 2)


@pytest.mark.parametrize("name", [*IN_PAIRS, *SICK_ONES])
def test_two_processes_tell_what_one_tells(
    name: str, in_pairs: tuple[Path, dict[str, list[Event]]], tmp_path: Path
) -> None:
    launched, simulated = in_pairs[1][name], simulated_events(tmp_path, name)
    assert len(list(diagnosed(launched))) >= STEPS // 4
    assert_same(launched, simulated)


def test_a_figure_that_is_off_is_noticed(in_pairs: tuple[Path, dict[str, list[Event]]], tmp_path: Path) -> None:
    launched = in_pairs[1]["lte"]
    for key in next(diagnosed(launched)).keys() - {"kind"}:
        worse = [{k: v * (1 + 1e-8) if k == key else v for k, v in event.items()} for event in diagnosed(launched)]
        with pytest.raises(AssertionError):
            assert_same(worse, launched)


def test_four_processes_tell_what_one_tells(tmp_path: Path) -> None:
    for name, launched in launched_events(tmp_path / "launched", ALONE, DEVICES).items():
        assert_same(launched, simulated_events(tmp_path / name, name))


def test_unequal_shares_tell_what_one_process_tells(tmp_path: Path) -> None:
    for name, launched in launched_events(tmp_path / "launched", UNEQUAL, 3).items():
        assert_same(launched, simulated_events(tmp_path / name, name))


@pytest.mark.parametrize("name", UNTOUCHED)
def test_a_launched_run_trains_and_sends_the_same_to_the_bit(
    name: str, in_pairs: tuple[Path, dict[str, list[Event]]]
) -> None:
    for kind, keys in (
        ("step", ("device_losses", "sent_bytes", "received_bytes", "samples")),
        ("evaluate", ("val_loss", "sent_bytes")),
    ):
        ours, theirs = (
            [[event[key] for key in keys] for event in in_pairs[1][prefix + name] if event["kind"] == kind]
            for prefix in ("", PLAIN)
        )
        assert ours == theirs
    assert not list(diagnosed(in_pairs[1][PLAIN + name]))


@pytest.mark.parametrize("name", SICK_ONES)
def test_a_device_without_finite_weights_costs_a_round_its_figures(
    name: str, in_pairs: tuple[Path, dict[str, list[Event]]]
) -> None:
    events = in_pairs[1][name]
    (left_out,) = (event for event in events if event["kind"] == "left-out")
    assert (left_out["step"], left_out["devices"]) == (8, [SICK])
    figures = {event["step"]: event.keys() - GRADIENTS - ABOUT for event in diagnosed(events)}
    assert figures[4] and not figures[8] and figures[12] == figures[4]


def test_methods_that_meet_rarely_are_diagnosed_when_it_is_time(in_pairs: tuple[Path, dict[str, list[Event]]]) -> None:
    assert [event["step"] for event in diagnosed(in_pairs[1]["ddp"])] == list(range(EVERY, STEPS + 1, EVERY))


@pytest.mark.parametrize("name", ["lte", "diloco, streaming"])
def test_a_launched_run_goes_on_in_one_process(
    name: str, in_pairs: tuple[Path, dict[str, list[Event]]], tmp_path: Path
) -> None:
    shutil.copytree(checkpoints_of(in_pairs[0], name), tmp_path / "saved")
    newest = max((tmp_path / "saved").glob("step-*"))
    shutil.rmtree(newest)
    rest = simulated_events(tmp_path / "saved", name)
    launched = [event for event in in_pairs[1][name] if event["step"] > rest[0]["step"] - 1]
    assert 8 <= rest[0]["step"] < STEPS and list(diagnosed(rest))
    assert_same(rest, launched)


def test_a_simulated_run_goes_on_in_two_processes(
    in_pairs: tuple[Path, dict[str, list[Event]]], tmp_path: Path
) -> None:
    launched = in_pairs[1]["lte, pruned"]
    assert next(iter(launched))["step"] == 9
    whole = [event for event in simulated_events(tmp_path, "lte, pruned") if event["step"] > 8]
    assert_same(launched, whole)


@pytest.mark.parametrize("name", ["lte", "lte, frozen a", "diloco, streaming", "daso", "fedavg", "ddp"])
def test_what_travels_was_planned(name: str, in_pairs: tuple[Path, dict[str, list[Event]]]) -> None:
    run = diagnosed_run(name)
    first, *later = [event["own_sent_bytes"] for event in diagnosed(in_pairs[1][name])]
    assert {diagnostics_exchange(run, run.model.shape()).sent_bytes} == set(later)
    assert diagnostics_exchange(run, run.model.shape(), merged_before=False).sent_bytes == first
