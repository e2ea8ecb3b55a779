"""What a shell offers at Tab: asked as the scripts of bash, zsh and fish ask, two of them in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import profiles
from ltecli import completion
from ltecli.app import main
from ltecli.completion import VARIABLE
from simulate.config.method_table import METHOD_NAMES
from simulate.models.families.table import MODEL_NAMES
from tests.ltecli.command import write_run

LTE = (sys.executable, "-m", "ltecli")


Asked = Callable[[str, str], str]


@pytest.fixture
def asked(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Asked:
    """Return what `lte` prints for a shell's line whose last word is being typed."""

    def ask(shell: str, line: str) -> str:
        given = {VARIABLE: f"complete_{shell}"}
        if shell == "bash":  # which takes "=" as a word of its own
            words = [word for word in line.replace("=", " = ").split(" ") if word] + [""] * line.endswith(" ")
            given |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
        else:
            given |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(completion, "_key_of_bash", [])  # each press starts Python anew
        with pytest.raises(SystemExit):
            main([])
        return capsys.readouterr().out

    return ask


CASES = {
    "lte tra": ["train"],
    "lte plan -p gtx": [name for name in profiles.names() if name.startswith("gtx")],
    "lte profile show lo": ["local"],
    "lte plan --model gpt2": [name for name in MODEL_NAMES if name.startswith("gpt2")],
    "lte plan --method d": [name for name in METHOD_NAMES if name.startswith("d")],
    "lte train tiny.toml --set method.re": ["method.reset=", "method.rewarm_steps="],
    "lte plan --method ddp --set method.": ["method.name=", "method.wire="],
    "lte train --set method.rank": ["method.rank=", "method.rank=4"],
    "lte report ": ["runs/demo"],
    "lte export runs/d": ["runs/demo"],
    "lte train t": ["tiny.toml"],
}


@pytest.mark.parametrize("line", CASES)
def test_the_words_of_a_line(here: Path, asked: Asked, line: str) -> None:
    write_run(here / "tiny.toml")
    (here / "runs/demo").mkdir(parents=True)
    write_run(here / "runs/demo/run.toml")
    assert asked("bash", line).splitlines() == CASES[line]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("train.activation_checkpointing=", ["true", "false"]),
        ("train.schedule=c", ["cosine", "constant"]),
        ("method.name=di", ["diloco"]),
        ("method.name=ddp --set method.", ["method.name=", "method.wire="]),
        ("train.loggers=w", ["wandb"]),
    ],
)
def test_values_of_keys(asked: Asked, keys: str, words: list[str]) -> None:
    line = f"lte train run.toml --set {keys}"
    start = f"{keys.partition('=')[0]}=" if "--set" not in keys else ""
    assert asked("fish", line).splitlines() == [start + word for word in words]
    # bash replaces what stands behind "=" only.
    found = asked("bash", line).splitlines()
    assert found[: len(words)] == words


def test_zsh_gets_them_in_its_own_form(asked: Asked) -> None:
    assert '"train.schedule=wsd"' in asked("zsh", "lte train --set train.schedule=w")


def test_no_press_imports_torch(here: Path) -> None:
    code = (
        "import sys; from ltecli.app import main\ntry: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    environment = {**os.environ, VARIABLE: "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    environment["_TYPER_COMPLETE_ARGS"] = "lte train --set method."
    environment.setdefault("PYTHONPATH", str(Path(profiles.__file__).parents[1]))
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "method.rank=" in run.stdout and run.stdout.splitlines()[-1] == "False"


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bashs_own_function_gets_the_words(here: Path) -> None:
    lte = here / "lte"
    lte.write_text(f'#!/bin/sh\nexec {" ".join(LTE)} "$@"\n')
    lte.chmod(0o755)
    environment = {**os.environ, "PATH": f"{here}:{os.environ['PATH']}"}
    environment.setdefault("PYTHONPATH", str(Path(profiles.__file__).parents[1]))
    script = (
        f'eval "$({VARIABLE}=source_bash lte)"\n'
        'COMP_WORDS=(lte train --set train.schedule "=" w); COMP_CWORD=5\n'
        '_lte_completion lte; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    run = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout == "wsd\n", run
