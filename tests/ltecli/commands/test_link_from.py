"""A launched run's links in the place of a profile's: in plans, and in measured profiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simulate.common import toml_io
from simulate.config.profiles import load_profile
from simulate.measure import machine
from tests.ltecli.command import Lte, Refused

LINKS = [
    {
        "sender": k, "receiver": (k + 1) % 3, "latency_s": latency_s, "bytes_per_s": 9e6,
        "loaded_bytes_per_s": rate, "sent_bytes": 1000,
    }
    for k, (rate, latency_s) in enumerate([(8e6, 1e-3), (2e6, 3e-3), (4e6, 50e-3)])
]  # fmt: skip
PLAN = ("plan", "--model", "gpt", "--profile", "rtx3060_x4_home", "--rank", "8", "--json")


@pytest.fixture
def launched(trained: Path) -> Path:
    """The run folder of a run that was launched on three nodes, as far as its events tell."""
    write_events(trained, {"kind": "links", "step": 0, "links": LINKS})
    return trained


def write_events(folder: Path, *added: dict[str, Any]) -> None:
    """Make a simulated run's events those of a launched one."""
    path = folder / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    events[0] |= {"processes": 3, "device": "cpu", "backend": "gloo"}
    events[1:1] = [{"version": events[0]["version"], **event} for event in added]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


def test_a_plan_goes_by_the_link_that_was_measured(lte: Lte, launched: Path, here: Path) -> None:
    profile = load_profile("rtx3060_x4_home").model_dump(exclude_none=True)
    profile["link"] |= {"up_bytes_per_s": 2e6, "down_bytes_per_s": 2e6, "latency_s": 50e-3, "source": "measured"}
    (here / "by_hand.toml").write_text(toml_io.dump(profile))
    planned = lte(*PLAN, "--link-from", launched).json()
    by_hand = lte(*PLAN[:4], "by_hand.toml", *PLAN[5:]).json()
    assert planned["candidates"] == by_hand["candidates"]
    assert planned["candidates"] != lte(*PLAN).json()["candidates"]
    (note,) = [note for note in planned["notes"] if str(launched) in note]
    assert "2 MB/s on its slowest edge, 50 ms on its farthest" in note


def test_the_newest_launch_counts(lte: Lte, launched: Path) -> None:
    again = [{**edge, "loaded_bytes_per_s": 1e6} for edge in LINKS]
    with (launched / "events.jsonl").open("a") as file:
        file.write(json.dumps({"version": 1, "kind": "links", "step": 3, "links": again}) + "\n")
    (note,) = [note for note in lte(*PLAN, "--link-from", launched).json()["notes"] if str(launched) in note]
    assert "1 MB/s" in note


def test_a_measured_profile_takes_the_link_too(lte: Lte, launched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laptop = load_profile("laptop_cpu")
    monkeypatch.setattr(machine, "measure_profile", lambda wanted, link, log: laptop.model_copy(update={"link": link}))
    link = lte("profile", "measure", "--json", "--link-from", launched).json()["link"]
    assert (link["up_bytes_per_s"], link["down_bytes_per_s"], link["latency_s"]) == (2e6, 2e6, 50e-3)
    assert link["source"] == "measured"
    assert "node 1 to node 2" in link["sources"]["up_bytes_per_s"]


def test_a_run_that_measured_no_link_is_refused(refused: Refused, trained: Path, here: Path) -> None:
    refused(*PLAN, "--link-from", "done", words=("done", "simulated in one process", "--nodes"))
    refused("profile", "measure", "--link-from", "done", words=("simulated in one process",))
    write_events(trained)
    refused(*PLAN, "--link-from", "done", words=("launched on one machine", "--nodes"))
    refused(*PLAN, "--link-from", "nowhere", words=("nowhere is no run folder",))


def test_two_sources_of_a_link_are_refused(refused: Refused, launched: Path) -> None:
    both = ("--link", "127.0.0.1:1", "--link-from", launched.name)
    refused("profile", "measure", *both, words=("--link and --link-from", "keep one"))


@pytest.mark.parametrize(
    "damaged",
    [
        {"links": 3},
        {"links": []},
        {"links": [{}]},
        {},
        {"links": [{**LINKS[0], "latency_s": -1}]},
        {"links": [{**LINKS[0], "latency_s": 1e9}]},
        {"links": [{**LINKS[0], "loaded_bytes_per_s": 1e30}]},
    ],
)
def test_damaged_links_are_refused(refused: Refused, trained: Path, damaged: dict[str, Any]) -> None:
    write_events(trained, {"kind": "links", "step": 0, **damaged})
    refused(*PLAN, "--link-from", "done", words=("events.jsonl", "damaged"))
