"""`lte doctor`, and what `lte train` does with what it finds, before anything starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ltecli.commands import doctor
from simulate.common.errors import InputError
from simulate.doctor.machine import Folder, Machine
from simulate.launch.preflight.consistency import compare
from simulate.launch.preflight.node_info import Facts
from simulate.launch.preflight.settings import Settings
from tests.gpus import CURRENT, LEGACY, DeviceModule, no_gpu, stand_in
from tests.harness import ROOT, environment, run
from tests.ltecli.command import Lte, Refused, assert_one_line, write_run
from tests.simulate.doctor.test_checks import CARD, CUDA12, CUDA13, GTX, HEALTHY, OLD_GTX, RTX
from tests.simulate.launch.preflight.test_consistency import node

HALF_FULL = {"folders": (Folder("TMPDIR", Path("/tmp"), True, 1_000_000),)}
WITHOUT_DISTRIBUTED = """
import tests.without_distributed
import json, sys
from ltecli.app import main
for command in json.loads(sys.argv[1]):
    print("ended", command[0], main(command), flush=True)
"""


def here_is(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    monkeypatch.setattr(doctor, "examine", lambda folders, port=None: machine)


def test_all_well(lte: Lte, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here_is(monkeypatch, HEALTHY)
    outcome = lte("doctor", "--launch")
    assert outcome.code == 0
    assert outcome.stdout.endswith("\nall well\n")
    assert "2.13.0+cpu" in outcome.stdout and outcome.stderr == ""
    document = lte("doctor", "--json").json()
    assert document["ok"] is True and document["findings"] == [] and document["version"] == 1
    assert document["machine"]["torch"]["backends"] == ["gloo"]


def test_a_user_without_a_home_gets_a_warning(lte: Lte, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here_is(monkeypatch, HEALTHY)

    def nowhere() -> Path:
        raise InputError("LTE_CACHE: this user has no home folder; export LTE_CACHE=FOLDER")

    monkeypatch.setattr(doctor, "cache_folder", nowhere)
    outcome = lte("doctor")
    assert outcome.code == 0 and "warning: LTE_CACHE: this user has no home" in outcome.stdout
    assert "all well" not in outcome.stdout


def test_this_very_machine(lte: Lte, here: Path) -> None:
    """Whatever is found here, the answer is whole, and its exit code follows from the findings."""
    outcome = lte("doctor", "--json", "--device", "cpu")
    document = outcome.json()
    assert outcome.code == (0 if document["ok"] else 2)
    assert [folder["option"] for folder in document["machine"]["folders"]] == ["--out", "TMPDIR", "LTE_CACHE"]
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("changes", "options", "code", "last"),
    [
        (HALF_FULL, (), 0, "nothing stops a run"),
        ({"torch": CUDA13, "gpus": (GTX,), "nvidia": CARD}, (), 2, "keeps runs off the GPU: GPU 0"),
        ({"torch": CUDA13, "gpus": (GTX,), "nvidia": CARD}, ("--device", "cpu"), 0, "all well"),
        ({"system": "Windows"}, (), 0, "nothing stops a run"),
        ({"system": "Windows"}, ("--launch",), 2, "stops --launch: --launch is not made for Windows"),
        ({"torch": CUDA12, "gpus": (OLD_GTX,)}, ("tiny.toml",), 2, "stops runs: GPU 0"),  # whose autocast is bf16
    ],
)
def test_the_exit_code_tells_what_stops_a_run(
    lte: Lte,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    options: Sequence[str],
    code: int,
    last: str,
) -> None:
    write_run(here / "tiny.toml", train={"autocast": "bf16"})
    here_is(monkeypatch, replace(HEALTHY, **changes))  # type: ignore[arg-type]
    outcome = lte("doctor", *options)
    assert (outcome.code, outcome.stderr) == (code, "")
    assert outcome.stdout.splitlines()[-1].startswith(last)
    document = lte("doctor", "--json", *options).json()
    assert document["ok"] is (code == 0)


def test_a_warning_comes_before_the_run(lte: Lte, run_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    here_is(monkeypatch, replace(HEALTHY, **HALF_FULL))  # type: ignore[arg-type]
    assert_one_line(lte("train", run_toml, "--out", "a", "--quiet"), 0, ("/tmp, the place of temporary", "make room"))
    here_is(monkeypatch, HEALTHY)
    assert lte("train", run_toml, "--out", "b", "--quiet").stderr == ""


def test_auto_says_why_it_trains_on_the_cpu(lte: Lte, run_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)  # nothing computes on the GPU that the doctor sees
    here_is(monkeypatch, replace(HEALTHY, torch=CUDA13, gpus=(GTX,), nvidia=CARD))
    outcome = lte("train", run_toml, "--out", "a", "--quiet")
    assert_one_line(outcome, 0, ("GPU 0", "cu126", "it trains on the CPU"))


def test_a_gpu_without_kernels_is_refused_where_it_is_asked_for(
    refused: Refused, run_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, DeviceModule(compiled=CURRENT))
    refused("train", run_toml, "--out", "a", "--device", "cuda", words=("GPU 0", "sm_61", "only for sm_75", "cu126"))


def test_one_unfit_gpu_of_several_stops_a_launch_on_all(
    refused: Refused, run_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain train launches there, too, since it uses all GPUs."""
    stand_in(monkeypatch, DeviceModule(gpus=2, compiled=LEGACY))
    here_is(monkeypatch, replace(HEALTHY, torch=CUDA13, gpus=(RTX, GTX), nvidia=CARD))
    refused("train", run_toml, "--out", "a", words=("GPU 1", "export CUDA_VISIBLE_DEVICES=0"))


def test_windows_refuses_a_launch(refused: Refused, run_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Windows")
    refused("train", run_toml, "--out", "a", "--launch", "--device", "cpu", words=("--launch", "Windows", "WSL2"))


def test_without_torch_distributed_runs_are_simulated_and_launches_refused(here: Path) -> None:
    run_toml = str(write_run(here / "tiny.toml"))
    commands = [
        ["doctor", "--device", "cpu"],
        ["doctor", "--device", "cpu", "--launch"],
        ["train", run_toml, "--out", "a", "--quiet"],
        ["report", "a"],
        ["train", run_toml, "--out", "b", "--launch"],
    ]
    path = environment(PYTHONPATH=str(ROOT))
    outcome = run([sys.executable, "-c", WITHOUT_DISTRIBUTED, json.dumps(commands)], cwd=here, env=path)
    ended = [line for line in outcome.stdout.splitlines() if line.startswith("ended ")]
    assert ended == ["ended doctor 0", "ended doctor 2", "ended train 0", "ended report 0", "ended train 2"], outcome
    assert outcome.stderr.startswith("lte: torch ") and outcome.stderr.count("\n") == 1
    assert "was built without torch.distributed" in outcome.stderr
    assert not (here / "b").exists()


def test_a_gpu_machine_without_nccl(lte: Lte, run_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU trains all devices in one process; only the launch is refused."""
    stand_in(monkeypatch, DeviceModule(compiled=LEGACY))
    gloo = replace(CUDA12, backends=("gloo",))
    here_is(monkeypatch, replace(HEALTHY, torch=gloo, gpus=(OLD_GTX,), nvidia=CARD))
    assert_one_line(lte("train", run_toml, "--out", "a", "--launch"), 2, ("no NCCL",))
    assert lte("doctor").code == 0


def test_nodes_tell_each_other_what_they_found() -> None:
    first, second = node(0), node(1, warnings=["/tmp has 1 MB free: make room\x1b[31m"])
    warning = compare([first, second]).warnings
    assert warning == [f"{second.title}: /tmp has 1 MB free: make room?[31m"]
    assert not compare([first, node(1)]).warnings


def test_a_node_brings_its_warnings_to_the_preflight(lte: Lte, run_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are printed there, with the node's name, and not twice."""
    brought = []

    def preflight(settings: Settings, facts: Facts, **options: object) -> None:
        brought.extend(facts.warnings)
        raise InputError("far enough")

    here_is(monkeypatch, replace(HEALTHY, **HALF_FULL))  # type: ignore[arg-type]
    monkeypatch.setattr("ltecli.commands.launch.open_preflight", preflight)
    options = ("--launch", "--device", "cpu", "--quiet", "--nodes", 2, "--node", 1, "--join", "127.0.0.1:1")
    assert_one_line(lte("train", run_toml, "--out", "a", *options), 2, ("far enough",))
    assert len(brought) == 1 and "make room" in brought[0]
