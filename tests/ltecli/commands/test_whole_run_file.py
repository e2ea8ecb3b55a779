"""run.toml is whole: its profile travels with it, its paths are relative to it, and reports import no network."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from simulate.common import toml_io
from simulate.config.profiles import load_profile
from simulate.config.run import load_given_run, load_run
from simulate.models import tracing
from simulate.models.schema import FactoryTextModel
from simulate.models.shapes import shape_of_table, shape_table
from tests.ltecli.command import PROFILE, Lte, Refused, write_prose, write_run

pytestmark = pytest.mark.usefixtures("two_batches")
NETWORK = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self, width: int = 16, context: int = 8, vocab: int = 256):
        super().__init__(nn.Embedding(vocab, width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, vocab))
"""


def write_profile(path: Path, name: str = "mine") -> Path:
    """Write a profile of the user's: a shipped one with another name and a slower link."""
    table = load_profile(PROFILE).model_dump(exclude_none=True) | {"name": name}
    table["link"] |= {"up_bytes_per_s": 1e6}
    path.write_text(toml_io.dump(table), encoding="utf-8")
    return path


@pytest.fixture
def planned(lte: Lte, here: Path) -> Path:
    """A run.toml planned on a profile of the user's, which is gone, in a folder where nothing else lies."""
    write_profile(here / "mine.toml")
    tiny = [f"model.{key}={value}" for key, value in {"layers": 1, "width": 16, "context": 8}.items()]
    keys = [
        *tiny,
        "train.steps=4",
        "train.micro_batch=2",
        "model.attention_heads=2",
        f"data.path={write_prose(here / 'prose.txt')}",
    ]
    assignments = [word for key in keys for word in ("--set", key)]
    outcome = lte("plan", "-p", "mine.toml", "-m", "gpt", "-n", "2", "--rank", "2", *assignments, "-o", "run.toml")
    assert outcome.code == 0, outcome
    (here / "elsewhere").mkdir()
    (here / "mine.toml").unlink()
    return (here / "run.toml").rename(here / "elsewhere" / "copied.toml")


def test_a_planned_run_brings_its_profile(lte: Lte, here: Path, planned: Path) -> None:
    run = load_given_run(planned)
    assert load_profile(run.cluster.profile).link.up_bytes_per_s == 1e6
    assert lte("train", planned, "--out", "runs/one", "--quiet").code == 0
    assert load_profile("runs/one/profile.toml") == load_profile(str(planned))
    assert load_run(Path("runs/one/run.toml")).cluster.profile == "mine"
    # What a run folder holds trains anywhere, as the same run.
    shutil.copy("runs/one/run.toml", here / "again.toml")
    assert lte("train", "again.toml", "--out", "runs/two", "--quiet").code == 0
    assert load_run(Path("runs/two/run.toml")) == load_run(Path("runs/one/run.toml"))
    for name in (planned, here / "again.toml"):
        assert lte("train", name, "--out", "runs/one", "--resume").code == 0
    assert lte("export", "runs/one").code == 0
    assert load_profile("runs/one/export/run.toml").name == "mine"


def test_shipped_profiles_stay_names(lte: Lte, here: Path) -> None:
    assert lte("plan", "-p", PROFILE, "-m", "gpt", "--method", "ddp", "--tokens", "1M", "-o", "run.toml").code == 0
    table = toml_io.parse((here / "run.toml").read_text(), "run.toml")
    assert "profile" not in table and table["cluster"]["profile"] == PROFILE


def test_a_changed_profile_of_a_shipped_name_is_embedded(lte: Lte, here: Path) -> None:
    write_profile(here / "other.toml", PROFILE)
    assert lte("plan", "-p", "other.toml", "-m", "gpt", "--method", "ddp", "--tokens", "1M", "-o", "run.toml").code == 0
    profile = load_profile(load_given_run(here / "run.toml").cluster.profile)
    assert (profile.name, profile.link.up_bytes_per_s) == (PROFILE, 1e6)


def test_a_run_with_another_profile_is_not_resumed(lte: Lte, refused: Refused, planned: Path) -> None:
    assert lte("train", planned, "--out", "runs/one", "--quiet").code == 0
    planned.write_text(planned.read_text().replace("up_bytes_per_s = 1000000.0", "up_bytes_per_s = 3000000.0"))
    refused("train", planned, "--out", "runs/one", "--resume", words=("differs", "cluster.profile"))


def test_two_profiles_in_a_file_are_refused_and_set_replaces_the_embedded_one(refused: Refused, planned: Path) -> None:
    run = load_given_run(planned, [f"cluster.profile={PROFILE}"])
    assert run.cluster.profile == PROFILE
    planned.write_text(planned.read_text().replace('profile = "mine"', f'profile = "{PROFILE}"'))
    refused("train", planned, words=("[profile] is 'mine'", f"--set cluster.profile={PROFILE}"))


def test_a_mistake_in_an_embedded_profile_names_its_line(refused: Refused, planned: Path) -> None:
    lines = planned.read_text().splitlines()
    number = next(index for index, line in enumerate(lines) if line.startswith("latency_s"))
    lines[number] = "latency_s = -1"
    planned.write_text("\n".join(lines))
    refused("train", planned, words=(f"copied.toml:{number + 1}: link.latency_s = -1",))


def test_every_command_takes_relative_paths_from_the_files_folder(
    lte: Lte, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = here / "run"
    folder.mkdir()
    write_profile(folder / "mine.toml")
    cluster = {"profile": "mine.toml", "devices": 2}
    write_run(folder / "run.toml", data={"path": "prose.txt"}, cluster=cluster)
    run = Path("run/run.toml")
    for arguments in (
        ("doctor", run, "--device", "cpu"),
        ("probe", run, "--batches", "2", "--warmup", "1", "--quiet"),
        ("train", run, "--out", "out", "--quiet"),
        ("train", run, "--out", "out", "--resume"),
    ):
        assert lte(*arguments).code == 0, arguments
    # What a run folder holds means the same from any folder.
    (here / "other").mkdir()
    monkeypatch.chdir(here / "other")
    done = Path("../out")
    for arguments in (
        ("report", done),
        ("export", done),
        ("sample", done, "--prompt", "a", "--length", "2"),
        ("eval", done, "--data", "../run/prose.txt"),
        ("train", done, "--resume"),
        ("train", done / "run.toml", "--quiet"),
        (
            "plan",
            "-p",
            "../run/mine.toml",
            "-m",
            "gpt",
            "--method",
            "ddp",
            "--tokens",
            "1M",
            "--data",
            "../run/prose.txt",
        ),
        ("profile", "check", "../run/mine.toml"),
    ):
        assert lte(*arguments).code == 0, arguments


def test_a_report_imports_no_network(lte: Lte, refused: Refused, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(here)
    (here / "own_net.py").write_text(NETWORK)
    model = {"name": "own_net:Net", "context": 8, "width": 16}
    write_run(here / "tiny.toml", model=model, data={"path": "prose.txt"})
    assert lte("train", "tiny.toml", "--out", "done", "--quiet").code == 0
    before = lte("report", "done", "--json").json()
    (here / "own_net.py").unlink()
    shutil.rmtree(here / "__pycache__", ignore_errors=True)
    del sys.modules["own_net"]
    for traced in (tracing.traced_shape, tracing._findings):  # which would serve the report, too
        traced.cache_clear()
    assert lte("report", "done", "--json").json() == before
    # Training goes by the network itself.
    refused("train", "tiny.toml", "--out", "new", "--quiet", words=("own_net",))


def test_a_shape_is_what_was_stored() -> None:
    model = FactoryTextModel.model_validate({"name": "tests.networks:Encoder", "context": 8})
    shape = model.shape()
    assert shape_table(shape_of_table(json.loads(json.dumps(shape_table(shape))))) == shape_table(shape)


def test_a_plan_makes_the_folder_of_its_run(lte: Lte, here: Path) -> None:
    assert (
        lte("plan", "-p", PROFILE, "-m", "gpt", "--method", "ddp", "--tokens", "1M", "-o", "new/deep/run.toml").code
        == 0
    )
    assert load_given_run(here / "new/deep/run.toml").cluster.profile == PROFILE


def test_a_key_set_beside_a_file_without_its_table(lte: Lte, refused: Refused, here: Path) -> None:
    (here / "run.toml").write_text("[train]\nsteps = 4\n")
    run = load_given_run(here / "run.toml", ["data.tokenizer=bpe:300", "model.vocab=300"])
    assert (run.data.name, run.data.tokenizer) == ("stdlib", "bpe:300")
    refused("train", "run.toml", "--set", "data.rows=5", words=("command line: data: rows = 5",))


def test_what_other_machines_need_is_told(lte: Lte, here: Path, planned: Path) -> None:
    launch = ("--launch", "--nodes", "2", "--interface", "lo")
    assert f"Copy {planned} and its data to every machine" in lte("train", planned, *launch).stdout
    write_profile(here / "mine.toml")
    run = write_run(here / "tiny.toml", cluster={"profile": "mine.toml"})
    text = lte("train", run, *launch).stdout
    assert f"Copy {run}, its profile {here / 'mine.toml'} and its data to every machine" in text
