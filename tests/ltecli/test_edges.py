"""Mistakes at the edges, one test a kind: streams that fail, files that a crash left, input that passed in silence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from ltecli.commands.measure import _show as show_measured
from ltecli.console import Output, plain_table
from ltecli.runs.lock import is_locked, lock_folder
from simulate.common.errors import near_match
from simulate.common.units import bytes_text, change_text, range_text
from simulate.common.user_code import module_form
from simulate.config.hardware import Kernels, Measurement
from simulate.config.profiles import load_profile
from simulate.config.run import load_run
from tests.harness import run, wait_until
from tests.ltecli.command import PROFILE, Lte, Refused, assert_one_line, lte_process, write_prose, write_run
from tests.selection import others_slow

HOME = ("plan", "--profile", PROFILE)
SMALL = (*HOME, "--tokens", "100000", "--set", "train.micro_batch=4", "--set", "train.activation_checkpointing=false")


@pytest.mark.parametrize("command", ["--help", "profile list --json"])
def test_a_stdout_that_cannot_be_written_is_one_line(command: str, tmp_path: Path) -> None:
    done = run(["bash", "-c", f"{sys.executable} -m ltecli {command} >/dev/full"], cwd=tmp_path)
    assert_one_line(done, 1, ["stdout cannot be written"])


def test_a_reader_that_leaves_early_gets_the_file_all_the_same(tmp_path: Path) -> None:
    # `true` leaves before the first byte, so that the first line that is printed fails.
    script = f"{sys.executable} -m ltecli plan -p {PROFILE} --method ddp -o run.toml | true; exit ${{PIPESTATUS[0]}}"
    done = run(["bash", "-c", script], cwd=tmp_path)
    assert done.code == 0, done
    assert (tmp_path / "run.toml").is_file()


@pytest.mark.slow  # as long as forty others, and of what another release says
def test_libraries_say_nothing_on_stderr() -> None:
    code = "from simulate.layers.quantized import import_bitsandbytes as load; load()"
    pytest.importorskip("bitsandbytes")
    assert run([sys.executable, "-W", "default", "-c", code]).stderr == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows ends processes without a signal")
@pytest.mark.parametrize("launch", others_slow([(), ("--launch",)], [()]))
def test_a_run_told_to_end_before_its_first_step_leaves_nothing(
    here: Path, run_toml: Path, launch: tuple[str, ...]
) -> None:
    child = lte_process("train", run_toml, "--out", "a", *launch, cwd=here)
    wait_until(lambda: (here / "a" / "run.toml").exists() and (not launch or (here / "a" / "logs").exists()))
    for _ in range(2 if launch else 1):
        child.send_signal(signal.SIGTERM)
    started_s = time.monotonic()
    outcome = child.outcome()
    assert outcome.code == 130
    assert "interrupted; nothing was started; give the same line again" in outcome.stderr.splitlines()[-1]
    assert time.monotonic() - started_s < 30
    assert not (here / "a").exists()


def test_an_empty_run_names_what_is_missing(refused: Refused, here: Path) -> None:
    (here / "empty.toml").write_text("# nothing\n[train]\n", encoding="utf-8")
    refused("train", "empty.toml", words=("[model], [data]", "are missing", "lte plan -o empty.toml"))


def test_paths_of_a_run_are_relative_to_its_file(lte: Lte, here: Path) -> None:
    folder = here / "there"
    folder.mkdir()
    write_run(folder / "t.toml", data={"path": "prose.txt"})
    assert lte("train", "there/t.toml", "--out", "a", "--quiet").code == 0
    assert load_run(here / "a" / "run.toml").data.path == str(folder / "prose.txt")
    assert "there/prose.txt" in lte("probe", "there/t.toml", "--batches", "2", "--warmup", "2").stdout
    # The other way round: a run.toml that is written elsewhere finds what was named here.
    assert lte(*SMALL, "--data", "there/prose.txt", "--set", "model.context=8", "-o", "there/p.toml").code == 0
    assert load_run(folder / "p.toml").data.path == str(here / "there" / "prose.txt")


def test_a_path_that_is_set_replaces_the_named_data(lte: Lte, here: Path) -> None:
    write_run(here / "t.toml", data={"name": "stdlib"}, train={"steps": 2})
    path = write_prose(here / "mine.txt")
    assert lte("train", "t.toml", "--set", "data.path=mine.txt", "--out", "a", "--quiet").code == 0
    assert load_run(here / "a" / "run.toml").data.path == str(path)


@pytest.mark.parametrize(
    ("key", "ours"), [("train.lr", "learning_rate"), ("train.batch_size", "micro_batch"), ("method.T", "merge_every")]
)
def test_names_of_other_tools_find_ours(refused: Refused, run_toml: Path, key: str, ours: str) -> None:
    refused("train", run_toml, "--set", f"{key}=1", words=(f"did you mean '{ours}'?",))


def test_a_key_without_a_table_finds_ours(refused: Refused, run_toml: Path) -> None:
    refused("train", run_toml, "--set", "epochs=3", words=("table.key=value", "epochs is steps here"))
    assert near_match("epochs", ["pochs"]).startswith("did you mean 'pochs'")  # where there are no steps


def test_all_missing_keys_are_told_at_once_with_examples(lte: Lte, here: Path) -> None:
    (here / "p.toml").write_text('[[device]]\nkind = "x"\n[link]\ntopology = "star"\n', encoding="utf-8")
    outcome = lte("plan", "--profile", "p.toml")
    assert outcome.code == 2
    lines = outcome.stderr.splitlines()
    assert all(line.startswith("lte: p.toml:") and "is missing; add it, for example" in line for line in lines)
    assert len(lines) == 7 + 4  # keys of a device and of a link that have no default, without those given
    assert "flop_per_s = { fp32 = " in outcome.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rank 8 --rank 16", ("--rank is given 2 times",)),
        ("--rounds 3", ("--rounds 3", "--timeline")),
        ("--timeline-svg t.png", ("t.png", "t.svg")),
        ("--model net.py", ("path to a file", "'net:Net'")),
        ("--model net:Net --set data.name=digits", ("would get tokens", "model.classes=10")),
    ],
)
def test_input_that_passed_in_silence_is_refused(
    refused: Refused, here: Path, words: str, said: tuple[str, ...]
) -> None:
    (here / "net.py").write_text("class Net: pass\n", encoding="utf-8")
    refused(*HOME, *words.split(), words=said)


def test_the_form_of_a_module_is_that_of_its_path() -> None:
    assert module_form("folder/net.py:Mine") == "folder.net:Mine"
    assert module_form("folder.net:Mine") is None


def test_a_stretched_profile_is_told_and_a_drawing_says_what_it_leaves_out(lte: Lte, here: Path) -> None:
    command = ("plan", "--profile", "raspberry_x8", "--devices", "40", "--method", "lte", "--tokens", "20000000")
    outcome = lte(*command, "--timeline-svg", "t.svg")
    assert "! Profile raspberry_x8 has 8 devices: the plan stretches it to 40" in outcome.stdout
    assert "drawn are 6 of 40 devices" in outcome.stdout
    picture = ElementTree.parse(here / "t.svg").getroot()
    texts = [text.text or "" for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert any("drawn are 6 of 40 devices" in text for text in texts)
    kind = max(texts[6:12], key=len)  # behind the title and the key, the labels
    bars = [float(rect.get("x", 0)) for rect in picture.iter("{http://www.w3.org/2000/svg}rect") if len(rect)]
    assert min(bars) >= 10 + 6 * len(kind)


def test_a_last_line_that_a_crash_left_is_skipped_with_a_word(lte: Lte, trained: Path) -> None:
    sound = lte("report", trained, "--json")
    with (trained / "events.jsonl").open("ab") as file:
        file.write(b'{"kind": "st\x00\xff\n')
    damaged = lte("report", trained, "--json")
    assert damaged.json() == sound.json()
    assert "the last line is no whole event" in damaged.stderr


def test_a_run_that_starts_is_not_told_that_it_took_no_step(lte: Lte, trained: Path) -> None:
    (trained / "events.jsonl").unlink()
    assert_one_line(lte("report", trained), 2, ["never took a step", f"lte train {trained} --resume"])
    with lock_folder(trained):
        assert_one_line(lte("report", trained), 2, ["its training starts"])
    assert not is_locked(trained)


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(1.12, "12% more"), (0.6, "40% less"), (0.25, "4 times less"), (3, "3 times more"), (1, "the same")],
)
def test_changes_are_plain_words(ratio: float, text: str) -> None:
    assert change_text(ratio, "less") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [((1283 * 86400, 8721 * 86400), "1,283-8,721 days"), ((86_300_000,), "999 days"), ((86_390_000,), "1,000 days")],
)
def test_no_figure_has_an_exponent(seconds: tuple[float, ...], text: str) -> None:
    assert range_text(seconds[0], seconds[-1]) == text
    assert bytes_text(999_700) == "1,000 kB" and bytes_text(12_345e12) == "12,345 TB"


@pytest.mark.parametrize("columns", [80, 120])
def test_figures_stay_whole_in_a_narrow_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    table = plain_table("memory", "predicted", "measured", "difference", "by")
    table.add_row("gpt of 2 layers, " * 8, "123 MB", "120 MB", "+2.49%", "tracked tensors")
    Output().table(table)
    text = capsys.readouterr().out
    for figure in ("predicted", "123 MB", "120 MB", "+2.49%", "tracked tensors"):
        assert figure in text


@pytest.mark.parametrize("threads", [1, 2])
def test_a_noisy_measurement_advises_what_was_not_done(threads: int, capsys: pytest.CaptureFixture[str]) -> None:
    measured = Measurement.model_construct(
        threads=threads, clock="wall", disk_write_bytes_per_s=1e9, median_s={"product": 1.0}, p90_s={"product": 9.0}
    )
    points = [[1.0, 1e9]]
    kernels = Kernels.model_construct(
        products=points,
        attention=points,
        full_attention=points,
        elementwise=points,
        optimizer=points,
        step_s=0,
        layer_s=0,
        adapter_s=0,
    )
    profile = load_profile(PROFILE)
    device = profile.device[0].model_copy(update={"kernels": kernels})
    show_measured(profile.model_copy(update={"device": [device], "measurement": measured}), Output())
    said = capsys.readouterr().err
    assert "measure it idle" in said
    assert ("--threads 1" in said) == (threads > 1)


def test_why_knows_whether_the_extra_is_there(lte: Lte, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--model", "gpt2", "--method", "lte", "--set", "method.wire=full", "--why", "--json")
    said = []
    for installed in (True, False):
        monkeypatch.setattr("simulate.planning.explain.is_library_installed", lambda known=installed: known)
        said.append(lte(*HOME, "--merge-every", "100", "--set", "train.micro_batch=32", *asked).stdout)
    assert "installed here" in said[0] and "missing here" not in said[0]
    assert "missing here" in said[1] and "installed here" not in said[1]


def test_an_interrupt_inside_generated_code_ends_with_the_exit_code(here: Path) -> None:
    """`python -m` would end with SIGINT, though the interrupt was caught (dataclasses generate code, too)."""
    caught = "try:\n    exec('raise KeyboardInterrupt')\nexcept KeyboardInterrupt:\n    pass\n"
    Path("plain.py").write_text(f"import sys\n{caught}sys.exit(130)\n")
    Path("ours.py").write_text(f"from ltecli import app\n{caught}app.main = lambda: 130\napp.script()\n")
    root = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    codes = [
        subprocess.run([sys.executable, "-m", name], timeout=60, env=root).returncode for name in ("plain", "ours")
    ]
    assert codes[0] in (130, -signal.SIGINT)  # as this Python has it
    assert codes[1] == 130


def test_a_list_of_the_command_line_is_not_blamed_on_the_file(refused: Refused, run_toml: Path) -> None:
    message = refused("train", run_toml, "--set", 'train.loggers=["foo"]', words=("train.loggers[0] = 'foo'",))
    assert message.startswith("lte: command line: ")
