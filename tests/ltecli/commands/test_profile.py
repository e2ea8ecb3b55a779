"""`lte profile`: listing, showing, and what is wrong in a profile of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

import profiles
from simulate.config.profiles import load_profile
from tests.gpus import no_gpu
from tests.ltecli.command import Lte, Refused

PROFILE = """
[[device]]
kind = "card"
memory_bytes = 8_000_000_000
reserved_bytes = 500_000_000
host_memory_bytes = 0
memory_bytes_per_s = 100e9
flop_per_s = { fp32 = 1e12 }
efficiency = 0.4
source = "guess"

[link]
topology = "star"
up_bytes_per_s = 1e6
down_bytes_per_s = 2e6
latency_s = 0.01
source = "guess"
"""
DEVICE, LINK = PROFILE.split("[link]")


def test_list_names_every_profile(lte: Lte) -> None:
    listed = [profile["name"] for profile in lte("profile", "list", "--json").json()["profiles"]]
    assert listed == [*profiles.names(), "local"]
    text = lte("profile", "list")
    assert all(name in text.stdout for name in listed)
    assert text.stderr == ""


@pytest.mark.parametrize("name", ["mixed_gtx1080ti_rtx2060_rtx3090", "rtx3060_x4_home"])
def test_a_shown_profile_can_be_saved_and_read_back(lte: Lte, here: Path, name: str) -> None:
    (here / f"{name}.toml").write_text(lte("profile", "show", name).stdout)
    assert load_profile(f"{name}.toml") == load_profile(name)


def test_show_prints_json_for_scripts(lte: Lte) -> None:
    document = lte("profile", "show", "h200", "--json").json()
    assert document == load_profile("h200").model_dump(exclude_none=True)


def test_a_profile_of_ones_own_is_named_after_its_file(lte: Lte, here: Path) -> None:
    (here / "größe.toml").write_text(PROFILE)
    assert lte("profile", "show", "größe.toml", "--json").json()["name"] == "größe"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gtx1080ti", ("did you mean 'gtx1080ti_x8'?", "local")),
        ("", ("profile = ''", "known:")),
        ("nowhere.toml", ("nowhere.toml", "no such file")),
        (".", ("neither a shipped profile nor a path",)),
        ("./", ("is a folder",)),
    ],
)
def test_an_unknown_profile_is_refused(refused: Refused, name: str, words: tuple[str, ...]) -> None:
    refused("profile", "show", name, words=words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = ]", ("p.toml", "not valid TOML", "line 1")),
        (f"{PROFILE}\n= 3", ("p.toml", "not valid TOML", "line 19")),
        (f"[link]{LINK}", ("p.toml: device is missing",)),
        (f"device = []\n[link]{LINK}", ("device", "at least 1 item")),
        (DEVICE, ("p.toml: link is missing",)),
        (PROFILE.replace("1e6", "-1e6"), ("p.toml:14: link.up_bytes_per_s = -1000000.0", "greater than 0")),
        (PROFILE.replace("2e6", "nan"), ("p.toml:15: link.down_bytes_per_s", "finite")),
        (PROFILE.replace("0.01", '"fast"'), ("p.toml:16: link.latency_s: 'fast'", "number")),
        (PROFILE.replace("8_000_000_000", "500_000_000"), ("p.toml:2", "reserved_bytes = 500000000 leaves nothing")),
        (PROFILE.replace("8_000_000_000", "0"), ("p.toml:4: device[0].memory_bytes = 0", "greater than 0")),
        (PROFILE.replace("8_000_000_000", "9" * 30), ("device[0].memory_bytes", "64 bits")),
        (PROFILE.replace('"star"', '"sart"'), ("link.topology = 'sart'", "did you mean 'star'?")),
        (PROFILE.replace("efficiency", "eficiency"), ("device[0].eficiency", "did you mean 'efficiency'?")),
        (PROFILE.replace("0.4", "1.4"), ("device[0].efficiency = 1.4", "less than or equal to 1")),
    ],
)
def test_a_mistake_in_a_profile_is_located(refused: Refused, here: Path, text: str, words: tuple[str, ...]) -> None:
    (here / "p.toml").write_text(text)
    refused("profile", "show", "p.toml", words=words)
    refused("plan", "--profile", "p.toml", words=words)


KERNELS = """kernels.products = [[10, 2e11], [100, 4e11]]
kernels.attention = [[10, 1e11]]
kernels.elementwise = [[1000, 1e10]]
kernels.optimizer = [[1000, 1e10]]
kernels.step_s = 1e-4
kernels.layer_s = 1e-5
kernels.adapter_s = 1e-5
source = "guess"

[link]"""

STEP_S = "kernels.step_s = 1e-4"
"""A line that others are added behind."""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[[10, 2e11], [100, 4e11]]", "[[100, 2e11], [10, 4e11]]", ("kernels.products", "must grow", "sort them")),
        ("[[10, 2e11], [100, 4e11]]", "[]", ("kernels.products", "at least one")),
        ("[[1000, 1e10]]", "[[1000, 0]]", ("kernels.elementwise", "positive")),
        ("[[1000, 1e10]]", "[[1000]]", ("kernels.elementwise", "pairs")),
        ("4e11", "4e12", ("kernels.products reaches 4e+12", "above the peak flop_per_s.fp32 = 1e+12")),
        ("step_s = 1e-4", "step_s = -1", ("kernels.step_s", "greater than or equal to 0")),
        ("layer_s = 1e-5", "layr_s = 1e-5", ("layr_s", "did you mean 'layer_s'?")),
        (STEP_S, "kernels.full_attention = [[1, 4e12]]", ("kernels.full_attention reaches 4e+12", "above the peak")),
        (STEP_S, "kernels.elementwise_of.vit = []", ("kernels.elementwise_of", "points of vit", "at least one")),
        (
            STEP_S,
            "kernels.elementwise_of.vti = [[1, 1]]",
            ("elementwise_of.vti = 'vti' is not known; did you mean 'vit'?",),
        ),
        (STEP_S, "disk_write_bytes_per_s = 1e-300", ("disk_write_bytes_per_s = 1e-300", "greater than or equal to 1")),
        (STEP_S, "disk_write_bytes_per_s = 1e18", ("disk_write_bytes_per_s = 1e+18", "less than or equal to")),
        (STEP_S, "disk_flush_s = 1e308", ("disk_flush_s = 1e+308", "less than or equal to 3600")),
    ],
)
def test_a_mistake_in_measured_rates_is_told(
    refused: Refused, here: Path, old: str, new: str, words: tuple[str, ...]
) -> None:
    text = PROFILE.replace('source = "guess"\n\n[link]', KERNELS)
    (here / "p.toml").write_text(text)
    assert load_profile("p.toml").device[0].kernels is not None
    added = f"{old}\n{new}" if old == STEP_S else new
    (here / "p.toml").write_text(text.replace(old, added, 1))
    refused("profile", "show", "p.toml", words=("p.toml", *words))


def test_measure_prints_a_profile_for_scripts(lte: Lte, monkeypatch: pytest.MonkeyPatch) -> None:
    from simulate.measure import machine

    measured = load_profile("laptop_cpu")
    monkeypatch.setattr(machine, "measure_profile", lambda wanted, link, log: measured)
    assert lte("profile", "measure", "--json").json() == measured.model_dump(exclude_none=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--link", "127.0.0.1:9"), ("--link 127.0.0.1:9", "cannot be reached")),
        (("-o", "mine.txt"), ("--out mine.txt", ".toml")),
        (("-o", "old.toml/mine.toml"), ("old.toml is no folder",)),
        (("-o", "old.toml"), ("exists", "--force")),
    ],
)
def test_measure_refuses_before_it_measures(
    refused: Refused, here: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (here / "old.toml").write_text("kept")
    refused("profile", "measure", *arguments, words=words)
    assert (here / "old.toml").read_text() == "kept"


def test_a_gpu_that_is_not_there_is_not_measured(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    refused("profile", "measure", "--device", "cuda", "-q", words=("--device cuda", "sees no cuda device"))


def test_a_profile_that_is_not_text_is_refused(refused: Refused, here: Path) -> None:
    (here / "p.toml").write_bytes(b"caf\xe9")
    refused("profile", "show", "p.toml", words=("p.toml", "not UTF-8"))
