"""Which module imports which, and that the light half of the program never pays for torch."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.harness import Outcome, run
from tests.ltecli.command import write_run

ROOT = Path(__file__).parents[1]
TORCH_FREE = (
    "profiles",
    "simulate.common.errors",
    "simulate.common.toml_io",
    "simulate.config.run",
    "simulate.config.hardware",
    "simulate.training.simulated_clock",
    "simulate.common.events",
    "simulate.training.checkpoints",
    "simulate.launch.preflight.preflight",
    "simulate.costs.activations",
    "simulate.costs.diagnostics_bytes",
    "simulate.costs.flops",
    "simulate.costs.kernel_time",
    "simulate.costs.memory",
    "simulate.costs.samples",
    "simulate.costs.step_time",
    "simulate.comm.transfers",
    "simulate.timeline.engine",
    "simulate.models.families",
    "simulate.models.schema",
    "simulate.models.shapes",
    "simulate.models.sizes",
    "simulate.data.load",
    "simulate.methods.registry",
    "simulate.probe.schema",
    "simulate.probe.recommend",
    "ltecli.app",
    "ltecli.runs.run_folder",
    "simulate.planning.planner",
    "simulate.planning.probe_ranks",
    "ltecli.commands.export",
    "ltecli.commands.measure",
    "ltecli.commands.plan",
    "ltecli.commands.probe",
    "ltecli.commands.profile",
    "ltecli.commands.report",
    "ltecli.commands.train",
)
ALLOWED = {"ltecli": {"ltecli", "simulate", "profiles"}, "simulate": {"simulate", "profiles"}, "profiles": {"profiles"}}
CHECK = "import sys; sys.exit('torch was imported' if 'torch' in sys.modules else code)"


def run_python(code: str, folder: Path, arguments: Sequence[str] = ()) -> Outcome:
    """Run code in an interpreter of its own that fails if torch is imported when it ends."""
    return run([sys.executable, "-c", f"{code}\n{CHECK}", *arguments], cwd=folder)


LIGHT = (
    "--help",
    "--version",
    "plan",
    "plan --model gpt2 --json",
    "plan --why --timeline --rounds 3 --timeline-svg picture.svg",
    "plan --model vit_s16",
    "plan --model llama_1b",
    "plan --model mixer_s16",
    "profile list",
    "profile show local",
    "train --help",
)
REFUSED = ("train nowhere.toml", "train run.toml --out .", "train . --resume", "report .", "export .")
RUN_ALL = """
import json, sys
from ltecli.app import main
found = {}
for arguments in sys.argv[2:]:
    found[arguments] = main(arguments.split()), "torch" in sys.modules
    sys.modules.pop("torch", None)
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, bool]]:
    """The exit code of each command, and whether it imported torch; all run in one interpreter, which starts once."""
    folder = tmp_path_factory.mktemp("light")
    write_run(folder / "run.toml")
    done = run([sys.executable, "-c", RUN_ALL, folder / "ended.json", *LIGHT, *REFUSED], cwd=folder)
    assert done.code == 0, done.stderr
    return dict(json.loads((folder / "ended.json").read_text()))


@pytest.mark.parametrize("arguments", LIGHT)
def test_light_commands_never_import_torch(arguments: str, ended: dict[str, tuple[int, bool]]) -> None:
    code, with_torch = ended[arguments]
    assert (code, with_torch) == (0, False)


@pytest.mark.parametrize("arguments", REFUSED)
def test_a_refusal_does_not_wait_for_torch(arguments: str, ended: dict[str, tuple[int, bool]]) -> None:
    code, with_torch = ended[arguments]
    assert (code, with_torch) == (2, False)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "code"), [*((light, 0) for light in LIGHT), *((other, 2) for other in REFUSED)])
def test_a_command_alone_never_imports_torch(arguments: str, code: int, tmp_path: Path) -> None:
    """In one interpreter, a module that imports torch is noticed at the first command alone that needs it."""
    write_run(tmp_path / "run.toml")
    program = "import sys; from ltecli.app import main; code = main(sys.argv[1:])"
    done = run_python(program, tmp_path, arguments.split())
    assert done.code == code, done.stderr


def test_the_light_half_imports_without_torch(tmp_path: Path) -> None:
    done = run_python(f"import {', '.join(TORCH_FREE)}\ncode = 0", tmp_path)
    assert done.code == 0, done.stderr


def test_an_import_of_torch_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text("import torch\n")
    done = run_python("import sys; sys.path.insert(0, '.'); import heavy; code = 0", tmp_path)
    assert done.code == 1
    assert "torch was imported" in done.stderr


def imported_packages(source: str) -> set[str]:
    """Return the top-level names that a module imports anywhere, in function bodies too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def wrong_directions(package: str, source: str) -> set[str]:
    """Return packages of ours that a module of `package` may not import but does."""
    ours = set(ALLOWED) | {"tests", "bench"}
    return imported_packages(source) & (ours - ALLOWED[package])


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_go_one_way(package: str) -> None:
    modules = list((ROOT / package).rglob("*.py"))
    assert modules
    wrong = {str(module): wrong_directions(package, module.read_text(encoding="utf-8")) for module in modules}
    assert not {module: names for module, names in wrong.items() if names}


def test_an_import_the_wrong_way_is_noticed() -> None:
    assert wrong_directions("simulate", "def f():\n    from ltecli.console import Output\n") == {"ltecli"}
    assert wrong_directions("profiles", "import simulate.common.toml_io") == {"simulate"}
    assert wrong_directions("ltecli", "import tests.tiny") == {"tests"}
