"""`lte plan --why`, `--timeline`, `--objective`, `--within`, `--efficiency`, ranges of times, figures of profiles."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from simulate.common.units import range_text
from simulate.config.profiles import load_profile
from simulate.costs.samples import SHIPPED
from tests.ltecli.command import PROFILE, Lte, Refused, assert_one_line

ROOT = Path(__file__).parents[3]
HOME = ("plan", "--profile", PROFILE)
SMALL = (*HOME, "--tokens", "20000000", "--set", "train.micro_batch=4", "--set", "train.activation_checkpointing=false")
TIMES = ("compute_s", "exchange_s", "step_s", "round_s", "wall_s", "equivalent_wall_s", "assumed_samples_factor")


def profile_text(**device: object) -> str:
    """Return the home profile's text with keys added to its device."""
    text = (ROOT / f"profiles/{PROFILE}.toml").read_text(encoding="utf-8")
    return text.replace("efficiency =", "\n".join(f"{k} = {v}" for k, v in device.items()) + "\nefficiency =", 1)


@pytest.fixture
def priced(here: Path) -> str:
    """A profile with prices, jitter and churn."""
    text = profile_text(price_per_hour=0.5, step_jitter=0.3, leave_per_hour=0.02, join_s=60)
    (here / "mine.toml").write_text(text + "\n[server]\nprice_per_hour = 1.0\n", encoding="utf-8")
    return "mine.toml"


def test_why_names_the_limit_the_changes_and_every_kind_of_neighbour(lte: Lte) -> None:
    pins = ("--heads-per-device", "4", "--set", "train.activation_checkpointing=true")
    plan = lte(*HOME, "--model", "gpt2", "--method", "lte", *pins, "--why", "--json").json()
    why = plan["why"]
    assert why["limit"] in ("memory", "link", "compute")
    assert [change["what"] for change in why["changes"]] == [
        "1 GB more on each device", "ten times the bandwidth", "twice the devices",
    ]  # fmt: skip
    assert all(change["gain"] > 0.99 for change in why["changes"][:2])
    keys = {neighbour["key"] for neighbour in why["neighbours"]}
    assert keys >= {"rank", "merge_every", "merge_transport", "quantize", "micro_batch", "method"}
    assert all(neighbour["reason"] for neighbour in why["neighbours"])
    assert plan["timeline"] is None


def test_a_change_is_what_planning_for_that_hardware_says(lte: Lte, here: Path) -> None:
    gain = lte(*SMALL, "--method", "lte", "--why", "--json").json()["why"]["changes"][2]["gain"]
    before, after = (
        lte(*SMALL, "--method", "lte", "--devices", str(n), "--json").json()["chosen"]["equivalent_wall_s"]
        for n in (4, 8)
    )
    assert gain == pytest.approx(before / after)


def test_why_is_shown_in_words(lte: Lte) -> None:
    said = lte(*SMALL, "--why").stdout
    assert "limits the choice" in said
    assert "ten times the bandwidth" in said
    assert "more time: " in said and "more bytes" in said
    assert not re.search(r"\d\.\d\dx (the )?(time|memory|bytes)", said)


def test_a_value_that_is_no_number_is_one_neighbour(lte: Lte) -> None:
    """Candidates that differ from each other only in accumulated passes are rows of one name."""
    neighbours = lte("plan", "--profile", "gtx1080ti_x8", "--method", "ddp", "--why", "--json").json()["why"][
        "neighbours"
    ]
    named = [(neighbour["key"], neighbour["value"]) for neighbour in neighbours]
    assert ("activation_checkpointing", "True") in named
    assert len(named) == len(set(named))


def test_the_timeline_of_equal_devices_is_the_plan(lte: Lte) -> None:
    plan = lte(*SMALL, "--timeline", "--rounds", "7", "--json").json()
    timeline = plan["timeline"]
    assert timeline["rounds"] == 7
    assert timeline["wall_s"] == pytest.approx(timeline["planned_wall_s"], rel=1e-9)
    assert sum(timeline["device_s"].values()) == pytest.approx(timeline["wall_s"], rel=1e-9)
    assert {"devices", "equivalent_wall_s", "gain"} == timeline["doublings"][0].keys()
    assert [row["speedup"] for row in timeline["upgrades"]] == sorted(
        (row["speedup"] for row in timeline["upgrades"]), reverse=True
    )
    assert timeline["churn"]["elastic_factor"] > 1
    assert plan["why"] is None


def test_equal_requests_give_equal_timelines_and_jitter_takes_longer(lte: Lte, priced: str) -> None:
    command = (*SMALL[:1], "--profile", priced, *SMALL[3:], "--timeline", "--rounds", "20", "--json")
    command = (*command, "--set", "cluster.quorum=4")  # all wait for the slowest
    first = lte(*command)
    assert first.stdout == lte(*command).stdout
    assert first.json()["timeline"]["wall_s"] > first.json()["timeline"]["planned_wall_s"]


def test_thousands_of_devices_are_simulated(lte: Lte) -> None:
    pins = ("--method", "lte", "--rank", "8", *SMALL[3:])
    said = lte("plan", "--profile", "raspberry_x8", *pins, "--devices", "3000", "--timeline", "--rounds", "10").stdout
    assert "of 3,000 devices" in said
    assert "churn: 2% of 3,000" in said


def test_churn_costs_a_launched_run_what_its_quorum_says(lte: Lte, priced: str) -> None:
    command = (*SMALL[:1], "--profile", priced, *SMALL[3:], "--timeline", "--rounds", "20", "--set")
    assert "a launched run, which repeats the round, takes" in lte(*command, "cluster.quorum=4").stdout
    assert "a launched run, which has a quorum, goes on" in lte(*command, "cluster.quorum=3").stdout


def test_the_drawing_is_a_picture_of_the_spans(lte: Lte, here: Path) -> None:
    timeline = lte(*SMALL, "--timeline-svg", "t.svg", "--json").json()["timeline"]
    picture = ElementTree.parse(here / "t.svg").getroot()
    blocks = [rect for rect in picture.iter("{http://www.w3.org/2000/svg}rect") if len(rect)]
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(blocks) == len(timeline["spans"]) > 4
    # No label of the axis is cut at the right: a character of its 12 pixels is about 6 wide.
    behind = {"middle": 0.5, "end": 0.0, None: 1.0}
    labels = [(text, text.text or "") for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    ends = [float(text.attrib["x"]) + 6 * len(said) * behind[text.get("text-anchor")] for text, said in labels]
    assert max(ends) <= float(picture.attrib["width"])


def test_the_terminal_draws_a_bar_for_each_device(lte: Lte) -> None:
    said = lte(*SMALL, "--method", "lte", "--timeline", "--rounds", "3").stdout
    rows = [line for line in said.splitlines() if "█" in line and "compute" not in line]
    assert len(rows) == 4
    assert {len(row.split(maxsplit=1)[1]) for row in rows} == {60}


def test_a_guess_has_a_range_and_a_measurement_none(lte: Lte, here: Path) -> None:
    guessed = lte(*SMALL, "--json").json()["chosen"]
    for key in TIMES:
        assert guessed[f"{key}_low"] < guessed[key] < guessed[f"{key}_high"]
    assert guessed["compute_s_high"] == pytest.approx(1.25 * guessed["compute_s"])
    assert guessed["exchange_s_high"] == pytest.approx(1.5 * guessed["exchange_s"])
    text = profile_text().replace('source = "datasheet"', 'source = "measured"').replace('"guess"', '"measured"')
    (here / "measured.toml").write_text(text, encoding="utf-8")
    plan = lte("plan", "--profile", "measured.toml", *SMALL[3:], "--json").json()
    for key in TIMES[:5]:
        low, point, high = (plan["chosen"][f"{key}{end}"] for end in ("_low", "", "_high"))
        assert low == pytest.approx(point, rel=1e-12) == high
    assert not any("ranges of times" in note for note in plan["notes"])


def test_a_range_is_said_in_one_unit() -> None:
    assert range_text(3.1 * 3600, 5.4 * 3600) == "3.1-5.4 h"
    assert range_text(30.0, 90.0) == "30-90 s"
    assert range_text(5.0, 5.0) == "5 s"


@pytest.mark.parametrize(
    ("objective", "key"),
    [("time", "equivalent_wall_s"), ("cost", "equivalent_wall_s"), ("memory", "memory_bytes"), ("bytes", "sent")],
)
def test_an_objective_is_minimised(lte: Lte, priced: str, objective: str, key: str) -> None:
    plan = lte("plan", "--profile", priced, *SMALL[3:], "--objective", objective, "--json").json()

    def value(candidate: Any) -> float:
        if key == "sent":
            return candidate["sent_bytes"] * candidate["equivalent_wall_s"] / candidate["wall_s"]
        return candidate[key]["total"] if key == "memory_bytes" else candidate[key]

    without_extra = [c for c in plan["candidates"] if not c["quantize"].startswith("nf4")]
    assert value(plan["chosen"]) == pytest.approx(min(map(value, without_extra)))
    assert plan["objective"] == objective
    assert plan["price_per_hour"] == 4 * 0.5 + 1.0


def test_what_takes_too_long_is_refused_with_the_nearest_miss(lte: Lte) -> None:
    best = lte(*SMALL, "--json").json()["chosen"]["equivalent_wall_s"]
    assert lte(*SMALL, "--within", f"{best * 1.5:.0f}s").code == 0
    outcome = lte(*SMALL, "--within", "1s", "--json")
    assert_one_line(outcome, 3, ("within", "nearest miss", "--within"))
    assert outcome.json()["chosen"] is None


def test_another_samples_model_changes_the_choice(lte: Lte, here: Path) -> None:
    text = (ROOT / "simulate/costs" / SHIPPED).read_text(encoding="utf-8")
    hopeless = text.replace(
        "[muon.lte]\nvalue = 0.679\nlow = 0.561\nhigh = 0.98", "[muon.lte]\nvalue = 1e6\nlow = 1e6\nhigh = 1e6"
    )
    assert hopeless != text
    (here / "mine.toml").write_text(hopeless, encoding="utf-8")
    assert lte(*SMALL, "--json").json()["chosen"]["method"] == "lte"
    assert lte(*SMALL, "--efficiency", "mine.toml", "--json").json()["chosen"]["method"] == "ddp"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--objective fame", ("--objective fame", "known: bytes, cost, memory, time")),
        ("--objective cost", ("--objective cost", "price_per_hour", PROFILE)),
        ("--within 8", ("--within 8", "8h")),
        ("--within -3h", ("--within", "above 0")),
        ("--rounds 0", ("--rounds 0", "from 1")),
        ("--timeline-svg /dev/null/where.svg", ("/dev/null is no folder",)),
        ("--efficiency nowhere.toml", ("nowhere.toml", "no such file")),
    ],
)
def test_a_mistake_is_named(refused: Refused, arguments: str, words: tuple[str, ...]) -> None:
    refused(*SMALL, *arguments.split(), words=words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("up_bytes_per_s = 4.7e6", "up_bytes_per_s = -1.0", ("link.up_bytes_per_s = -1.0", "greater than 0")),
        ("up_bytes_per_s = 4.7e6", "up_bytes_per_s = 1e18", ("link.up_bytes_per_s", "1000000000000000")),
        ("memory_bytes = 12_616_466_432", f"memory_bytes = {10**18}", ("memory_bytes", "1000000000000000")),
        ("efficiency = 0.4", "efficiency = 1.5", ("efficiency = 1.5", "less than or equal to 1")),
        ("efficiency = 0.4", "efficiency = 0.4\nstep_jitter = -0.1", ("step_jitter = -0.1", "greater than or equal")),
        ("efficiency = 0.4", "efficiency = 0.4\nleave_per_hour = 1.1", ("leave_per_hour = 1.1", "less than or equal")),
        ("efficiency = 0.4", "efficiency = 0.4\njoin_s = -1.0", ("join_s = -1.0",)),
        ("efficiency = 0.4", "efficiency = 0.4\nprice_per_hour = -1.0", ("price_per_hour = -1.0",)),
        ("latency_s = 20e-3", "latency_s = 20e-3\nshared_bytes_per_s = 0.0", ("shared_bytes_per_s = 0.0",)),
        ("latency_s = 20e-3", "latency_s = 20e-3\nhop_delays = 0.5", ("hop_delays = 0.5",)),
        ("[link]\n", "[server]\nup_bytes_per_s = 1e6\n\n[link]\n", ("server.up_bytes_per_s", "keep one")),
    ],
)
def test_an_impossible_figure_of_a_profile_is_refused(
    refused: Refused, here: Path, old: str, new: str, words: tuple[str, ...]
) -> None:
    text = profile_text()
    assert old in text
    (here / "bad.toml").write_text(text.replace(old, new), encoding="utf-8")
    refused("plan", "--profile", "bad.toml", words=words)


def test_the_servers_table_is_the_links_server(here: Path) -> None:
    text = profile_text()
    rates = "server_up_bytes_per_s = 117.5e6\nserver_down_bytes_per_s = 117.5e6\n"
    moved = text.replace(rates, "") + "\n[server]\nup_bytes_per_s = 117.5e6\ndown_bytes_per_s = 117.5e6\n"
    assert moved.count("server_up_bytes_per_s =") == 1  # the link's source
    (here / "moved.toml").write_text(moved, encoding="utf-8")
    assert load_profile("moved.toml").link == load_profile(PROFILE).link
