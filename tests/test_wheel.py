"""A wheel of the tree, installed elsewhere, plans, trains and reports: who installs it has no clone beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.harness import MARK, ROOT, Outcome, run
from tests.ltecli.command import PROFILE, write_run

pytestmark = pytest.mark.slow
PACKAGES = ("simulate", "ltecli", "profiles")
WHERE = f"import {', '.join(PACKAGES)}; print({', '.join(f'{name}.__file__' for name in PACKAGES)}, sep='\\n')"


def outside() -> dict[str, str]:
    """Return an environment in which nothing leads to the tree."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON") and key != MARK}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def succeed(*argv: object, cwd: Path) -> Outcome:
    done = run(argv, 300, cwd=cwd, env=outside())
    assert done.code == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the wheel; what the wheel needs is that of this interpreter."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):  # building writes into the tree that is built
        if (ROOT / name).is_file() and not name.startswith(("tests/", "bench/")):
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "tree" / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    succeed(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder / "dist", folder / "tree", cwd=folder)
    shutil.rmtree(folder / "tree")
    (wheel,) = (folder / "dist").glob("*.whl")
    venv.create(folder / "venv", system_site_packages=False, with_pip=False)
    python = folder / "venv" / "bin" / "python"
    succeed(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    # After the installation: pip would take the lte there for one to replace. Its own packages come first.
    (own,) = (folder / "venv" / "lib").glob("python*/site-packages")
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (own / "needed.pth").write_text("\n".join(sorted(paths)) + "\n", encoding="utf-8")
    return python.parent


def test_what_runs_is_the_wheel(installed: Path, tmp_path: Path) -> None:
    files = succeed(installed / "python", "-c", WHERE, cwd=tmp_path).stdout.splitlines()
    assert len(files) == len(PACKAGES)
    assert all(Path(file).is_relative_to(installed.parent) for file in files), files


def test_every_profile_is_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    listed = succeed(installed / "lte", "profile", "list", cwd=tmp_path).stdout
    names = [path.stem for path in (ROOT / "profiles").glob("*.toml")]
    assert names
    assert not [name for name in names if name not in listed]


def test_the_wheel_plans_trains_and_reports(installed: Path, tmp_path: Path) -> None:
    lte = installed / "lte"
    planned = succeed(lte, "plan", "--profile", PROFILE, "--model", "gpt2", "--json", cwd=tmp_path).json()
    assert planned["chosen"]["wall_s"] > 0
    write_run(tmp_path / "tiny.toml")
    trained = succeed(lte, "train", "tiny.toml", "--out", "done", "--json", "--device", "cpu", cwd=tmp_path).json()
    reported = succeed(lte, "report", "done", "--json", cwd=tmp_path).json()
    assert reported["val_loss"] == trained["val_loss"] > 0
    succeed(lte, "report", "done", "--html", "page.html", cwd=tmp_path)
    assert "plotly.js" in (tmp_path / "page.html").read_text(encoding="utf-8")[:100_000]
    assert list(installed.parent.glob("lib/python*/site-packages/ltecli/charts/assets/plotly-LICENSE.txt"))
    sent = reported["sent_bytes_per_device"]
    assert sent["counted"] == pytest.approx(sent["planned"], rel=1e-12) and sent["counted"] > 0
