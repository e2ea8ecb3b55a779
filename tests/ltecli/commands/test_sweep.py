"""`lte sweep`: a real sweep of two ranks and two seeds, how it goes on, runs that fail, stops, and refusals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ltecli.app import main
from ltecli.console import Output
from ltecli.runs import many_runs
from ltecli.runs.many_runs import Outcome, Work, plan_work, train_all
from ltecli.runs.sweep_folder import saved_steps
from ltecli.runs.variants import Variant, expand
from simulate.common.errors import InputError
from simulate.config.run import load_given_run, load_run
from tests.harness import wait_until
from tests.ltecli.command import Lte, Refused, events_of, lte_process, tree, write_run
from tests.ltecli.commands.sweeps import train_here

SWEEP = ("--set", "method.rank=2,4", "--seeds", "2")
NAMES = ["rank=2,seed=0", "rank=2,seed=1", "rank=4,seed=0", "rank=4,seed=1"]


@pytest.fixture(scope="session")
def swept_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the tiny run and its finished sweep `done`; tests get copies of it."""
    folder = tmp_path_factory.mktemp("swept")
    run = write_run(folder / "tiny.toml", train={"steps": 4, "evaluate_every": 2, "checkpoint_every": 2})
    with pytest.MonkeyPatch.context() as patch:
        train_here(patch, processes=1)
        assert main(["sweep", str(run), *SWEEP, "--out", str(folder / "done"), "--quiet"]) == 0
    return folder


@pytest.fixture
def swept(swept_once: Path, here: Path) -> Path:
    """The finished sweep, copied here; its run.toml is beside the original."""
    return shutil.copytree(swept_once / "done", here / "done")


def test_a_sweep_trains_every_combination(lte: Lte, swept: Path) -> None:
    assert sorted(path.name for path in swept.iterdir() if path.is_dir()) == NAMES
    runs = [load_run(swept / name / "run.toml") for name in NAMES]
    assert [(run.method.rank, run.train.seed) for run in runs] == [(2, 0), (2, 1), (4, 0), (4, 1)]  # type: ignore[attr-defined]
    document = lte("report", swept, "--json").json()
    assert (document["unfinished"], document["failed"], document["comparison"]) == ([], {}, None)
    losses = {run["run"].rpartition("/")[2]: run["val_loss"] for run in document["runs"]}
    for group in document["groups"]:
        rank = group["settings"]["method.rank"]
        pair = [losses[f"rank={rank},seed={seed}"] for seed in (0, 1)]
        assert group["val_loss"]["mean"] == pytest.approx(sum(pair) / 2)
        assert group["val_loss"]["std"] == pytest.approx(abs(pair[0] - pair[1]) / 2**0.5)
    means = [group["val_loss"]["mean"] for group in document["groups"]]
    assert means == sorted(means)


def test_the_table_is_printed_again(lte: Lte, swept: Path) -> None:
    outcome = lte("report", swept)
    header, *rows = outcome.stdout.splitlines()
    assert header.split()[:4] == ["rank", "seeds", "validation", "loss"]
    assert {tuple(row.split()[:2]) for row in rows[:2]} == {("2", "2"), ("4", "2")}
    assert all("±" in row for row in rows[:2])
    assert outcome.stderr == ""


def test_the_same_command_repeats_no_finished_run(lte: Lte, swept_once: Path, swept: Path) -> None:
    before = {name: (swept / name / "events.jsonl").stat().st_mtime_ns for name in NAMES}
    outcome = lte("sweep", swept_once / "tiny.toml", *SWEEP, "--out", swept)
    assert outcome.code == 0
    assert "4 runs in" in outcome.stderr
    assert "all finished before" in outcome.stderr
    assert {name: (swept / name / "events.jsonl").stat().st_mtime_ns for name in NAMES} == before


def test_a_run_that_was_cut_short_is_resumed_alone(
    lte: Lte, swept_once: Path, swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_here(monkeypatch)
    whole = (swept / NAMES[1] / "events.jsonl").read_text()
    before = {name: (swept / name / "events.jsonl").stat().st_mtime_ns for name in NAMES}
    shutil.rmtree(swept / NAMES[1] / "checkpoints/step-00000004")
    assert lte("sweep", swept_once / "tiny.toml", *SWEEP, "--out", swept, "--quiet").code == 0
    after = {name: (swept / name / "events.jsonl").stat().st_mtime_ns for name in NAMES}
    assert [name for name in NAMES if after[name] != before[name]] == [NAMES[1]]
    assert [event["step"] for event in events_of(swept / NAMES[1], "resume")] == [2]
    assert saved_steps(swept / NAMES[1], load_run(swept / NAMES[1] / "run.toml")) == 4
    losses = [line.partition('"train_loss"')[2].partition(",")[0] for line in whole.splitlines() if '"step"' in line]
    now = (swept / NAMES[1] / "events.jsonl").read_text().splitlines()
    assert set(losses) <= {line.partition('"train_loss"')[2].partition(",")[0] for line in now}


def test_a_sweep_writes_a_page_of_its_runs(lte: Lte, refused: Refused, swept_once: Path, swept: Path) -> None:
    outcome = lte("sweep", swept_once / "tiny.toml", *SWEEP, "--out", "done", "--html", "page.html")
    assert outcome.code == 0
    assert "wrote page.html" in outcome.stderr
    page = Path("page.html").read_text()
    assert all(name in page for name in NAMES)
    assert "lte sweep" in page
    refused("sweep", swept_once / "tiny.toml", *SWEEP, "--out", "done", "--html", "page.html", words=("--force",))
    assert lte("report", swept, "--html", "again.html", "--csv", "all.csv").code == 0
    assert len(Path("all.csv").read_text().splitlines()) == 1 + 4 * 2
    assert all(name in Path("again.html").read_text() for name in NAMES)


def test_an_unfinished_sweep_says_which_runs_are_left(lte: Lte, swept: Path) -> None:
    shutil.rmtree(swept / NAMES[2])
    outcome = lte("report", swept)
    assert f"1 of 4 runs are not finished: {NAMES[2]}; to go on: lte sweep " in outcome.stdout
    assert lte("report", swept, "--json").json()["unfinished"] == [NAMES[2]]


def test_a_dry_run_says_how_many_and_how_long_and_writes_nothing(lte: Lte, here: Path, run_toml: Path) -> None:
    before = tree(here)
    outcome = lte("sweep", run_toml, *SWEEP, "--dry-run", "--parallel", "2")
    assert outcome.stdout.startswith("4 runs in runs/tiny-sweep; 2 at a time, ")
    assert [line.strip() for line in outcome.stdout.splitlines()[1:]] == NAMES
    document = lte("sweep", run_toml, *SWEEP, "--dry-run", "--json").json()
    assert [(run["name"], run["left"]) for run in document["runs"]] == [(name, True) for name in NAMES]
    assert document["runs"][3]["settings"] == {"method.rank": "4"}
    assert 0 < document["seconds_low"] <= document["seconds_high"]
    assert tree(here) == before


def test_refused_combinations_are_named_or_left_out(lte: Lte, refused: Refused, run_toml: Path) -> None:
    message = refused("sweep", run_toml, "--set", "method.rank=2,64", words=("rank=64: ", "--skip-refused"))
    assert "rank=2" not in message
    outcome = lte("sweep", run_toml, "--set", "method.rank=2,64", "--skip-refused", "--dry-run")
    assert outcome.code == 0
    assert outcome.stdout.splitlines()[1:] == ["  rank=2,seed=0"]
    assert "left out: rank=64: " in outcome.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--set", "method.rank=2,2"), ("2 is given 2 times",)),
        (("--set", "method.rnk=2,4"), ("method.rnk is not a known key", "rank")),
        (("--set", "data.path=nowhere.txt"), ("nowhere.txt",)),
        (("--parallel", "100000", "--set", "method.rank=2,4"), ("--parallel 100000", "try --parallel")),
        (("--out", "tiny.toml"), ("--out tiny.toml exists", "no sweep")),
        (("--seeds", "0"), ("--seeds",)),
    ],
)
def test_mistakes_are_refused_before_anything_starts(
    refused: Refused, run_toml: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused("sweep", run_toml, *options, words=words)


def test_another_sweep_is_not_mixed_in_but_more_seeds_are(
    lte: Lte, refused: Refused, swept_once: Path, swept: Path
) -> None:
    run = swept_once / "tiny.toml"
    refused("sweep", run, "--set", "method.rank=2,8", "--out", "done", words=("another sweep", "lte sweep", "--out"))
    outcome = lte("sweep", run, "--set", "method.rank=2,4", "--seeds", "3", "--out", swept, "--dry-run")
    assert outcome.stdout.startswith(f"6 runs in {swept}, 4 finished before; ")


def test_a_sweep_is_reported_alone(refused: Refused, swept: Path) -> None:
    refused("report", "done", f"done/{NAMES[0]}", words=("done is a sweep", "reported alone"))


def made_up_work(folder: Path, parallel: int) -> Work:
    """Return the work of three tiny runs."""
    run = write_run(folder / "tiny.toml")
    variants, _ = expand(lambda a: load_given_run(run, a), {"method.rank": ["2", "4", "8"]}, 1, lambda run: None)
    work = plan_work(folder / "sweep", variants, "cpu", None, lambda run: 1)
    return Work(work.path, work.variants, work.left, work.is_order, parallel, 1)


def train_with(monkeypatch: pytest.MonkeyPatch, work: Work, code: str) -> Outcome:
    """Train with Python code in place of `lte train`; it finds its run's rank as `rank`."""

    def start(work: Work, variant: Variant, device_name: str) -> subprocess.Popen[bytes]:
        folder = work.path / variant.name
        folder.mkdir(parents=True)
        begin = f"import os, signal, sys, time; rank = {variant.settings['method.rank']}; "
        with (folder / many_runs.LOG_FILE).open("wb") as log:
            return subprocess.Popen([sys.executable, "-c", begin + code], stderr=log, start_new_session=True)

    monkeypatch.setattr(many_runs, "_start", start)
    monkeypatch.setattr(many_runs, "_report_done", lambda *args: None)
    return train_all(work, "cpu", Output(quiet=True))


def test_a_run_that_fails_is_named_and_the_others_go_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "rank == 2 and sys.exit('lte: the loss is nan'); rank == 4 and os.kill(os.getpid(), signal.SIGKILL); "
        "open('trained', 'w')"
    )
    outcome = train_with(monkeypatch, made_up_work(here, 1), code)
    reason = f"the loss is nan (exit code 1; {here / 'sweep'}/rank=2,seed=0/train.log)"
    assert outcome.failed == {"rank=2,seed=0": reason, "rank=4,seed=0": "killed by signal 9"}
    assert not outcome.is_interrupted
    assert (here / "trained").exists()
    assert f"lte: rank=2,seed=0 failed: {reason}" in capsys.readouterr().err


def test_a_run_that_cannot_start_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(work: Work, variant: Variant, device_name: str) -> None:
        raise InputError("no room")

    monkeypatch.setattr(many_runs, "_start", start)
    assert set(train_all(made_up_work(here, 2), "cpu", Output(quiet=True)).failed.values()) == {"no room"}


def test_one_stop_lets_all_runs_save_and_starts_no_more(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process gets one signal, and those that wait are not started."""
    code = (
        "signal.signal(signal.SIGINT, lambda *_: (open(f'saved-{rank}', 'w'), sys.exit(130))); "
        "open(f'began-{rank}', 'w'); os.path.exists('began-2') and os.path.exists('began-4') and "
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    )
    outcome = train_with(monkeypatch, made_up_work(here, 2), code)
    assert outcome.is_interrupted
    assert not outcome.failed
    assert sorted(path.name for path in here.glob("*-*")) == ["began-2", "began-4", "saved-2", "saved-4"]


def test_a_run_whose_file_was_changed_is_not_gone_on_with(lte: Lte, swept_once: Path, swept: Path) -> None:
    shutil.rmtree(swept / NAMES[0] / "checkpoints/step-00000004")
    file = swept / NAMES[0] / "run.toml"
    file.write_text(file.read_text().replace("learning_rate = 0.003", "learning_rate = 0.004"))
    outcome = lte("sweep", swept_once / "tiny.toml", *SWEEP, "--out", swept, "--quiet")
    assert outcome.code == 1
    assert f"{NAMES[0]} failed: {file} was changed; restore it" in outcome.stderr


def test_what_is_left_goes_by_what_runs_took(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimated at 10, 20 and 40 s with their start, two at a time; the first one takes twice its estimate."""
    work = made_up_work(here, 2)
    estimates = (10.0, 20.0, 40.0)
    left = {v.name: (0.0, s - many_runs.START_S) for v, s in zip(work.variants, estimates, strict=True)}
    work = Work(work.path, work.variants, left, work.is_order, 2, 1)
    first, second, third = left
    now = iter([0.0, 0.0, 20.0, 20.0])
    monkeypatch.setattr(many_runs.time, "monotonic", lambda: next(now))
    pace = many_runs._Pace(work)
    pace.begin(first)
    pace.begin(second)
    pace.end(first)
    # 40 s of the second run, of which 20 s are over, and 80 s of the third one.
    assert pace.left_s([second], [third]) == pytest.approx((20 + 80) / 2)


def test_memory_limits_how_many_runs_are_trained_at_a_time(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(here / "tiny.toml")
    variants, _ = expand(lambda a: load_given_run(run, a), {"method.rank": ["2", "4", "8"]}, 1, lambda run: None)
    monkeypatch.setattr(many_runs, "usable_memory", lambda: (2000, 1000))
    monkeypatch.setattr(many_runs, "usable_workers", lambda tasks: min(tasks, 8))
    monkeypatch.setattr(many_runs, "usable_cores", lambda: 8)

    def work(kind: str, needed: int, asked: int | None = None) -> tuple[int, int]:
        plan = plan_work(here / "sweep", variants, kind, asked, lambda run: needed)
        return plan.parallel, plan.threads

    assert work("cpu", 100) == (3, 2)
    assert work("cpu", 400) == (2, 4)
    assert work("cpu", 4000) == (1, 8)
    assert work("cuda", 100) == (1, 8)
    assert work("cuda", 100, 2) == (2, 4)
    with pytest.raises(InputError, match=r"--parallel 3: .*try --parallel 2"):
        work("cpu", 400, 3)


def test_time_is_that_of_the_runs_that_are_left(here: Path) -> None:
    work = made_up_work(here, 1)
    low_s, high_s = work.seconds
    starts_s = 3 * many_runs.START_S
    assert low_s == pytest.approx(sum(seconds[0] for seconds in work.left.values()) + starts_s)
    assert high_s >= low_s > starts_s


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_sweep_that_is_stopped_goes_on(here: Path, lte: Lte, number: int) -> None:
    """Killed, it leaves the run in training, for which the same command waits; the results are those of no stop."""
    run = write_run(here / "tiny.toml", train={"steps": 60, "checkpoint_every": 10, "evaluate_every": 60})
    line = ("sweep", run, "--set", "method.rank=2,4", "--parallel", "1", "--device", "cpu", "--out", here / "stopped")
    process = lte_process(*line, cwd=here)
    folder = here / "stopped/rank=2,seed=0"
    wait_until(lambda: (folder / "events.jsonl").exists() and events_of(folder, "step"))
    os.kill(process.pid, number)
    process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert lte(*line, "--quiet").code == 0
    assert lte(*line[:-1], here / "whole", "--quiet").code == 0
    stopped, whole = (lte("report", here / name, "--json").json() for name in ("stopped", "whole"))
    assert [run["val_loss"] for run in stopped["runs"]] == [run["val_loss"] for run in whole["runs"]]
    assert [run["sent_bytes_per_device"] for run in stopped["runs"]] == [
        run["sent_bytes_per_device"] for run in whole["runs"]
    ]
