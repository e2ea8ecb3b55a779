"""One rule of imports: no circles, no folder imports one below it, and whole folders are free of torch.

All imports count for the first two, also those in functions and those for types alone: who reads a module has to know
what it imports, whenever that happens. Torch counts where it is imported together with the module, since planning must
start without it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.ltecli.command import write_run

ROOT = Path(__file__).parents[1]
FOLDERS = (
    "common", "layers", "comm", "models", "config", "data", "rules", "costs", "optim", "methods", "timeline",
    "training", "measure", "probe", "doctor", "launch", "planning",
)  # fmt: skip
"""Folders of simulate/; each may import those before it. After them comes ltecli, and before them profiles."""
OURS = ("profiles", "simulate", "ltecli")
NOT_SHIPPED = ("tests", "bench")
"""Packages of this repository that the product may not import."""
TORCH_FREE = (
    "profiles/*.py", "simulate/common/*.py", "simulate/config/*.py", "simulate/rules/*.py", "simulate/costs/*.py",
    "simulate/timeline/*.py", "simulate/planning/*.py", "simulate/doctor/*.py", "simulate/launch/preflight/*.py",
    "simulate/methods/*/options.py", "simulate/methods/*/plan.py", "ltecli/**/*.py",
)  # fmt: skip
CHECK = """
import sys
heavy = [name for name in ('torch', 'cryptography') if name in sys.modules]
sys.exit(f'{heavy[0]} was imported' if heavy else code)
"""
Graph = Mapping[str, Collection[str]]
"""By name of a module: the modules of ours that it imports anywhere."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def read_graph() -> Graph:
    """Return what all modules of the product import."""
    sources = {module_name(path): path for name in OURS for path in (ROOT / name).rglob("*.py")}
    return {name: imported_modules(path.read_text(encoding="utf-8"), sources) for name, path in sources.items()}


def imported_modules(source: str, known: Collection[str]) -> set[str]:
    """Return the modules that a source imports anywhere, and of ours those that its names are modules of."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, "imports are written with their full names"
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {full if full in known else node.module for full in names.values()}
    return {name for name in found if name.partition(".")[0] in (*OURS, *NOT_SHIPPED)}


def circle(graph: Graph) -> list[str]:
    """Return the modules of one circle of imports, the first one once more at the end; nothing where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def height(module: str) -> int:
    """Return how far down in the order a module stands."""
    package, _, rest = module.partition(".")
    if package == "simulate":
        return FOLDERS.index(rest.partition(".")[0]) if rest else -1
    return {"profiles": -1, "ltecli": len(FOLDERS)}.get(package, len(FOLDERS) + 1)


def imports_downwards(graph: Graph) -> Iterator[str]:
    """Yield the imports of folders that stand further down."""
    for module, imported in graph.items():
        yield from (f"{module} imports {name}" for name in sorted(imported) if height(name) > height(module))


def test_every_folder_has_its_place_in_the_order() -> None:
    assert sorted(FOLDERS) == sorted(path.parent.name for path in (ROOT / "simulate").glob("*/__init__.py"))


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = read_graph()
    assert len(graph) > 150
    assert not circle(graph)


def test_no_folder_imports_one_below_it() -> None:
    assert not list(imports_downwards(read_graph()))


IN_A_FUNCTION = "def f():\n    from simulate.planning.planner import Plan\n"
FOR_A_TYPE = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from simulate.planning import planner\n"


@pytest.mark.parametrize("source", [IN_A_FUNCTION, FOR_A_TYPE, "import simulate.planning.planner as p\n"])
def test_a_made_up_import_is_noticed(source: str) -> None:
    """Of a module that imports nothing so far, by one that costs have use for, and by a product that imports tests."""
    graph = dict(read_graph())
    graph["simulate.costs.state"] = {*graph["simulate.costs.state"], *imported_modules(source, graph)}
    assert list(imports_downwards(graph)) == ["simulate.costs.state imports simulate.planning.planner"]
    graph["simulate.costs.state"] = {"simulate.rules.phases"}
    graph["ltecli.app"] = imported_modules("import tests.tiny", graph)
    assert list(imports_downwards(graph)) == ["ltecli.app imports tests.tiny"]
    graph["ltecli.app"] = set()
    graph["profiles"] = imported_modules("from simulate.common import toml_io", graph)
    assert list(imports_downwards(graph)) == ["profiles imports simulate.common.toml_io"]


@pytest.mark.parametrize("source", ["from simulate.costs import memory\n", IN_A_FUNCTION, FOR_A_TYPE])
def test_a_made_up_circle_is_noticed(source: str) -> None:
    """In a chain of three, whose last module imports the first one."""
    graph: dict[str, set[str]] = {
        "simulate.planning.planner": {"simulate.costs.memory"},
        "simulate.costs.memory": {"simulate.costs.state"},
        "simulate.costs.state": set(),
    }
    assert not circle(graph)
    graph["simulate.costs.state"] = imported_modules(source, graph)
    found = circle(graph)
    assert found[0] == found[-1]
    assert "simulate.costs.state" in found


def torch_free_modules() -> list[str]:
    names = [[module_name(path) for path in ROOT.glob(pattern)] for pattern in TORCH_FREE]
    assert all(names), "each pattern has modules"
    return sorted({name for some in names for name in some if not name.endswith("__main__")})


def run_python(code: str, folder: Path, arguments: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own that fails if torch or cryptography is imported when it ends."""
    command = [sys.executable, "-c", f"{code}\n{CHECK}", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


LIGHT = (
    "--help",
    "--version",
    "plan --why --timeline --rounds 3 --timeline-svg picture.svg",
    "plan --method diloco --model gpt2 --json",
    "plan --method diloco --model vit_s16",
    "plan --method lte --model llama_1b",
    "plan --method diloco --model mixer_s16",
    "profile list",
    "profile show local",
    "train --help",
)
REFUSED = ("train nowhere.toml", "train run.toml --out .", "train . --resume", "report .", "watch . --once", "export .")
ONE_AFTER_THE_OTHER = """
import sys
from ltecli.app import main
for line in sys.argv[2:]:
    code = main(line.split())
    if {'torch', 'cryptography'} & set(sys.modules) or code != int(sys.argv[1]):
        print(f'lte {line}', file=sys.stderr)
        break
"""


@pytest.mark.parametrize(("code", "lines"), [(0, LIGHT), (2, REFUSED)], ids=["light commands", "refusals"])
def test_torch_is_not_imported_by(code: int, lines: Sequence[str], tmp_path: Path) -> None:
    write_run(tmp_path / "run.toml")
    done = run_python(ONE_AFTER_THE_OTHER, tmp_path, [str(code), *lines])
    assert done.returncode == code, done.stderr


LOOPBACK = "from simulate.launch.preflight.secret import Secret\nSecret.for_loopback()\n"


def test_whole_folders_import_without_torch(tmp_path: Path) -> None:
    done = run_python(f"import {', '.join(torch_free_modules())}\ncode = 0", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("source", "name"), [("import torch\n", "torch"), ("import another\n", "torch"), (LOOPBACK, "cryptography")]
)
def test_a_heavy_import_is_noticed(source: str, name: str, tmp_path: Path) -> None:
    """Also by way of another module; an empty one of torch's name is imported sooner."""
    (tmp_path / "torch.py").touch()
    (tmp_path / "another.py").write_text("import torch\n")
    (tmp_path / "heavy.py").write_text(source)
    done = run_python("import sys; sys.path.insert(0, '.'); import heavy; code = 0", tmp_path)
    assert done.returncode == 1
    assert f"{name} was imported" in done.stderr


START = """
import sys
from ltecli.app import main
for folder, run in zip('ab', sys.argv[1:], strict=True):
    code = main(['train', run, '--out', folder, '--quiet'])
    tracer = [name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules]
    tracer += ['sympy'] if folder == 'a' and 'sympy' in sys.modules else []  # bitsandbytes imports it for itself
    if tracer or code:
        sys.exit(f'{tracer[0]} was imported' if tracer else code)
"""


def test_runs_import_no_tracer_of_torch(tmp_path: Path) -> None:
    """torch.compile's tracer takes more processor time than all else before the first step of a small run."""
    pytest.importorskip("bitsandbytes")
    packed = {"name": "lte", "rank": 2, "merge_every": 3, "quantize": "nf4"}
    runs = [
        write_run(tmp_path / "diloco.toml", method={"name": "diloco"}),
        write_run(tmp_path / "lte.toml", method=packed, train={"optimizer_state": "8bit"}),
    ]
    command = [sys.executable, "-c", START, *map(str, runs)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_plan_imports_no_numpy(tmp_path: Path) -> None:
    line = ["plan", "--json", "--method", "diloco"]
    code = f"import sys\nfrom ltecli.app import main\ncode = main({line})\nassert 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
