"""Every line of README and docs that calls `lte` has options that exist, and ends well where a test can run it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main

from ltecli.app import app
from tests.ltecli.command import Lte, copy_run, write_run
from tests.ltecli.docs.lines import PAGES, Line, block_lines, span_lines
from tests.selection import others_slow

COMMANDS: Any = typer.main.get_command(app)
LINES = [line for page in PAGES for line in block_lines(page)]
RUN = [line for line in LINES if line.not_run is None]
LIGHT = ("plan", "profile list", "profile show", "profile check", "init")
"""Commands that take a moment and no torch; the others are run with the slow tests."""

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, context, width, vocab):
        super().__init__()
        self.token = nn.Embedding(vocab, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens):
        return self.head(torch.relu(self.mix(self.token(tokens))))

def loss(outputs, targets):
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())

class Classifier(nn.Module):
    def __init__(self, image, classes):
        super().__init__()
        self.head = nn.Linear(3 * image * image, classes)

    def forward(self, pixels):
        return self.head(pixels.flatten(1))
"""


def _ids(line: Line) -> str:
    return f"{line.page}:{line.number}"


def _is_light(line: Line) -> bool:
    calls = [" ".join(call) for call in line.calls]
    heavy = ("--verify", "--model mynet", "--model hf:", "local")
    return all(call.startswith(LIGHT) and not any(word in call for word in heavy) for call in calls)


LIGHT_LINES = [line for line in RUN if _is_light(line)]


def _first_with_their_options() -> list[Line]:
    """Return the light lines that have an option, or a command without options, that no line before them has."""
    seen: set[tuple[str, ...]] = set()
    first = []
    for line in LIGHT_LINES:
        words = {(call[0], word) for call in line.calls for word in call[1:] if word.startswith("-")}
        words |= {tuple(call[:2]) for call in line.calls if call[0] == "profile"}
        if words - seen:
            first.append(line)
        seen |= words
    return first


def test_lines_are_found() -> None:
    """The README's first plan and the marks of lines that no test runs are seen."""
    assert any(line.text.startswith("lte plan --profile gtx1080ti_x8") for line in RUN)
    assert any(line.not_run for line in LINES)
    assert len({line.page for line in RUN}) >= 8


def test_mark_counts_for_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block under a mark is not run, the next one is; comments, prompts and what a shell takes are no arguments."""
    monkeypatch.setattr("tests.ltecli.docs.lines.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: an hour -->\n```\nlte train a.toml\n\nlte report b\n```\nText.\n\n"
        "    $ lte plan -n 4 > x.toml   # four\n\ntext\n\n    lte profile list && lte doctor\n"
    )
    found = list(block_lines(page))
    assert [line.not_run for line in found] == ["an hour", "an hour", None, None]
    assert found[2].calls == [["plan", "-n", "4"]]
    assert found[3].calls == [["profile", "list"], ["doctor"]]
    assert [line.number for line in found] == [3, 5, 9, 13]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page: Path) -> None:
    """Every command and every option that a page names exists."""
    for line in [*block_lines(page), *span_lines(page)]:
        for call in line.calls:
            command = COMMANDS
            words = [word for word in call if word not in ("...", "…")]
            while words and hasattr(command, "commands") and not words[0].startswith("-"):
                name = words.pop(0)
                assert name in command.commands, f"{_ids(line)}: lte {' '.join(call)}: no command {name}"
                command = command.commands[name]
            known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
            known |= {"--help", "-h"}
            for word in words:
                if word.startswith("-") and len(word) > 1:
                    option = word.partition("=")[0].rstrip(",.")
                    assert option in known, f"{_ids(line)}: lte {' '.join(call)}: no option {option}"


@pytest.fixture(scope="module")
def written_once(tmp_path_factory: pytest.TempPathFactory, trained_once: Path) -> Path:
    """The folder of a user who did what the pages say before; its run folders say that their data lies in it."""
    folder = tmp_path_factory.mktemp("user")
    write_user_folder(folder, trained_once)
    return folder


@pytest.fixture
def user_folder(here: Path, written_once: Path) -> Path:
    """A copy of that folder: every line finds the files that it names."""
    shutil.copytree(written_once, here, dirs_exist_ok=True)
    return here


def write_user_folder(here: Path, trained_once: Path) -> None:
    """Write profiles, a run.toml, texts, a network, a configuration and trained runs, all of them tiny."""
    run = write_run(here / "run.toml", cluster={"profile": "rtx3060_x4_home", "devices": 2})
    for name in ("NAME", "OTHER", "demo"):
        (here / "runs").mkdir(exist_ok=True)
        copied = copy_run(trained_once / "done", here)
        shutil.move(copied, here / "runs" / name)
    (here / "texts").mkdir()
    prose = (here / "prose.txt").read_text(encoding="utf-8")
    for path in (here / "texts" / "a.txt", here / "other.txt"):
        path.write_text(prose * 4, encoding="utf-8")  # enough for eight devices' windows of GPT-2
    profile = (Path(__file__).parents[3] / "profiles" / "rtx3060_x4_home.toml").read_text(encoding="utf-8")
    for name in ("home.toml", "mine.toml"):
        (here / name).write_text(profile, encoding="utf-8")
    (here / "mynet.py").write_text(NETWORK)
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 256}
    (here / "config.json").write_text(json.dumps(config))
    assert run.is_file()


def _remove_targets(line: Line) -> None:
    """Remove what a line writes, which the folder has for the lines after it."""
    words = line.words
    targets = [value for option, value in pairwise(words) if option in ("-o", "--out", ">", "--html", "--csv")]
    if "init" in words:
        targets += ["home.toml", "run.toml"]
    for target in map(Path, targets):
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)


@pytest.mark.parametrize("line", others_slow(LIGHT_LINES, _first_with_their_options()), ids=_ids)
@pytest.mark.usefixtures("two_batches")
def test_light_line_runs(line: Line, user_folder: Path, lte: Lte) -> None:
    """A line that plans or looks at profiles ends well."""
    words = line.words
    _remove_targets(line)
    for call in line.calls:
        outcome = lte(*call)
        assert outcome.code == 0, f"{line.text}\n{outcome.stderr}"
        if ">" in words:
            Path(words[words.index(">") + 1]).write_text(outcome.stdout, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in RUN if not _is_light(line)], ids=_ids)
def test_line_runs(line: Line, user_folder: Path) -> None:
    """A line that trains, measures or reports ends well, as a shell runs it."""
    binaries = user_folder / ".bin"
    binaries.mkdir()
    (binaries / "lte").write_text(f'#!/bin/sh\nexec {sys.executable} -m ltecli "$@"\n')
    (binaries / "lte").chmod(0o755)
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    root = str(Path(__file__).parents[3])
    _remove_targets(line)
    done = subprocess.run(
        ["bash", "-c", line.text],
        env={**os.environ, "PATH": path, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{line.text}\n{done.stdout}\n{done.stderr}"
