"""lte init: a profile and a run.toml from a few answers; wrong ones write nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from ltecli.commands import init
from ltecli.commands.init import parse_device, parse_link
from simulate.config.profiles import load_profile
from simulate.config.run import load_given_run, load_run
from tests.ltecli.command import Lte, Refused, write_prose

pytestmark = pytest.mark.usefixtures("two_batches")
ANSWERS = ("--gpu", "4 x gtx 1080 ti", "--link", "50/10 DSL", "--model", "gpt", "--tokens", "1M")


@pytest.mark.parametrize(
    ("text", "count", "kind"),
    [
        ("8 x GTX 1080 Ti", 8, "NVIDIA GeForce GTX 1080 Ti 11 GB"),
        ("rtx3090", 1, "NVIDIA GeForce RTX 3090 24 GB"),
        ("2x Jetson Orin", 2, "NVIDIA Jetson Orin Nano 8 GB"),
    ],
)
def test_known_devices_by_their_usual_names(text: str, count: int, kind: str) -> None:
    device = parse_device(text)
    assert (device.count, device.kind) == (count, kind)


@pytest.mark.parametrize(
    ("text", "down", "up", "latency_s"),
    [
        ("50/10 DSL", 50e6 / 8 * 0.94, 10e6 / 8 * 0.94, 20e-3),
        ("1 GbE", 117.5e6, 117.5e6, 0.2e-3),
        ("100 Mbit/s", 11.75e6, 11.75e6, 20e-3),
        ("wifi", 4e6, 4e6, 3e-3),
        ("wifi 5", 54e6, 54e6, 3e-3),
        ("1G fibre", 117.5e6, 117.5e6, 10e-3),
        ("1000/50 cable", 117.5e6, 50e6 / 8 * 0.94, 15e-3),
    ],
)
def test_links_as_they_are_sold(text: str, down: float, up: float, latency_s: float) -> None:
    link = parse_link(text)
    figures = link.down_bytes_per_s, link.up_bytes_per_s, link.latency_s
    assert figures == pytest.approx((down, up, latency_s))


def test_friends_each_have_a_line_of_their_own(lte: Lte, here: Path) -> None:
    """As many links as kinds of devices are one for each, which a place's devices share."""
    friends = ("--gpu", "2 x gtx 1080 ti", "--link", "50/10 DSL", "--gpu", "t4", "--link", "1G fibre")
    assert lte("init", *friends, "--model", "gpt", "--tokens", "1M").code == 0
    lines = load_profile("home.toml").link.lines
    assert [line.place_up_bytes_per_s for line in lines] == pytest.approx([1.175e6, 1.175e6, 117.5e6])
    assert [line.place for line in lines] == [0, 0, 1]
    checked = lte("profile", "check", "home.toml")
    assert checked.code == 0 and "place0" in checked.stdout and "1.18 MB/s (9.4 Mbit/s)" in checked.stdout


def test_answers_become_a_profile_and_a_run(lte: Lte, here: Path) -> None:
    outcome = lte("init", *ANSWERS, "--link", "1 GbE")
    assert outcome.code == 0 and "slowest link: up 1.18 MB/s (9.4 Mbit/s)" in outcome.stdout
    profile, run = load_profile("home.toml"), load_run(here / "run.toml")
    assert profile.count == run.cluster.devices == 4
    assert profile.link.up_bytes_per_s == pytest.approx(1.175e6)
    assert lte("profile", "check", "home.toml").code == 0
    assert lte("plan", "--profile", "home.toml", "--model", "gpt").code == 0


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (("--gpu", "4 x gtx 1080 tj", "--link", "1 GbE"), ("--gpu '4 x gtx 1080 tj'", "known: ")),
        (("--gpu", "0 x t4", "--link", "1 GbE"), ("--gpu '0 x t4'", "at least one")),
        (("--gpu", "gtx 1080", "--link", "1 GbE"), ("--gpu 'gtx 1080'", "is not known")),
        (("--gpu", "t4", "--link", "1 GbE", "--name", "../evil"), ("--name '../evil'",)),
        (("--gpu", "t4", "--link", "fast"), ("--link 'fast'", "50/10 DSL")),
        (("--gpu", "t4", "--link", "0/0"), ("faster than 0",)),
        (("--gpu", "t4"), ("--link is missing", "for example lte init")),
        ((), ("--gpu and --link are missing",)),
        (("--gpu", "t4", "--link", "1 GbE", "--model", "gtp2"), ("did you mean 'gpt2'?",)),
    ],
)
def test_wrong_answers_write_nothing(
    refused: Refused, here: Path, answers: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused("init", *answers, words=words)
    assert list(here.iterdir()) == []


def test_a_run_of_another_folder_finds_its_profile(lte: Lte, here: Path) -> None:
    (here / "there").mkdir()
    assert lte("init", *ANSWERS, "--out", "there").code == 0
    assert lte("train", "there/run.toml", "--tiny", "--set", "train.steps=2", "-q", "--out", "done").code == 0


def test_a_forced_init_with_a_wrong_answer_keeps_what_was_there(lte: Lte, here: Path) -> None:
    (here / "home.toml").write_text("mine", encoding="utf-8")
    assert lte("init", "--gpu", "t4", "--link", "1 GbE", "--model", "gtp2", "--force").code == 2
    assert (here / "home.toml").read_text(encoding="utf-8") == "mine"


def test_in_a_terminal_it_asks_until_it_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["8 x gtx 9999", "8 x gtx 1080 ti", "50/10 DSL", "gpt2", ""])
    monkeypatch.setattr(typer, "prompt", lambda *_, **__: next(answers))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    asked = init._asked(init.InitArgs())
    assert (list(asked.gpus), list(asked.links), asked.model, asked.data) == (
        ["8 x gtx 1080 ti"], ["50/10 DSL"], "gpt2", None,
    )  # fmt: skip


def test_paths_mean_the_current_folder_wherever_the_files_go(lte: Lte, here: Path) -> None:
    write_prose(here / "prose.txt")
    outcome = lte("init", *ANSWERS, "--data", "prose.txt", "--out", "new/home")
    assert outcome.code == 0, outcome
    assert "the profile's link is 50/10 DSL x 0.94, what TCP leaves for data" in outcome.stdout
    assert load_given_run(here / "new/home/run.toml").data.path == str(here / "prose.txt")


def test_a_refusal_leaves_no_folder(refused: Refused) -> None:
    refused("init", *ANSWERS, "--data", "nowhere.txt", "--out", "new", words=("nowhere.txt", "does not exist"))
