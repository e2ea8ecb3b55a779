"""The site of the documents builds without a warning: no link leads nowhere, no page is left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.slow
def test_site_builds(tmp_path: Path) -> None:
    """All pages are built and reached from the first one; nothing is fetched from elsewhere when they are read."""
    options = ["-q", "-W", "--keep-going", "-b", "html"]
    build = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(tmp_path / "site")]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for page in DOCS.rglob("*.md"):
        html = (tmp_path / "site" / page.relative_to(DOCS)).with_suffix(".html").read_text(encoding="utf-8")
        assert '<script src="http' not in html and '<link rel="stylesheet" type="text/css" href="http' not in html
