"""The results of `make gpu`: one JSON that every call adds to, and a Markdown table of it.

A row is done where the same code measured it on the same machine and device at the same size: a rerun takes up what is
missing. The JSON keeps rows of other machines and of earlier code, too; a table shows one machine's.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.rows import AIMS, PARTS, Row
from simulate.common.units import bytes_text, seconds_text

Table = dict[str, Any]
VERSION = 1
DONE, FAILED = "done", "failed"
MEASURED_CODE = ("simulate", "ltecli", "bench")
"""Folders whose Python and TOML decide what a row measures."""
TABLED_LISTS = "losses"
"""A list of figures, which the JSON keeps and the table leaves out."""


@dataclass(frozen=True)
class Stamp:
    """Facts beside the row that its result depends on."""

    code: str
    commit: str | None
    """None where the checkout has no history, or no git is there."""
    machine: str
    device: str
    size: str

    @property
    def identity(self) -> Table:
        """The keys by which results are found again."""
        return {"code": self.code, "machine": self.machine, "device": self.device, "size": self.size}

    @property
    def folder(self) -> str:
        """Name of the folder for what rows keep for others."""
        return "-".join(self.identity.values())


def digest(content: bytes) -> str:
    """Return a short name of some content."""
    return hashlib.sha256(content).hexdigest()[:12]


def code_digest(root: Path) -> str:
    """Return a short name of the code that is measured, changes that are not committed included."""
    paths = [path for name in MEASURED_CODE for kind in ("py", "toml") for path in (root / name).rglob(f"*.{kind}")]
    return digest(b"".join(str(path.relative_to(root)).encode() + path.read_bytes() for path in sorted(paths)))


def commit_of(root: Path) -> str | None:
    """Return the commit that is checked out."""
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


class Results:
    """The JSON file of all rows."""

    def __init__(self, path: Path, stamp: Stamp, facts: Table) -> None:
        self.path, self.stamp = path, stamp
        self.content: Table = {"version": VERSION, "machines": {}, "rows": []}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
        self.content["machines"][stamp.machine] = facts

    def find(self, row: Row) -> Table | None:
        """Return the row's result under this stamp, None where there is none."""
        wanted = {"part": row.part, "row": row.name, **self.stamp.identity}
        return next((r for r in self.content["rows"] if all(r[key] == value for key, value in wanted.items())), None)

    def is_done(self, row: Row) -> bool:
        """Whether the row was measured; one that failed is tried again."""
        found = self.find(row)
        return found is not None and found["status"] == DONE

    def forget(self, row: Row) -> None:
        """Remove the row's result under this stamp."""
        found = self.find(row)
        self.content["rows"] = [other for other in self.content["rows"] if other is not found]

    def add(self, row: Row, seconds: float, figures: Table | None = None, error: str | None = None) -> None:
        """Keep a row's figures, or the first line of its failure, and write the file."""
        self.forget(row)
        self.content["rows"].append(
            {
                "part": row.part, "row": row.name, **self.stamp.identity, "commit": self.stamp.commit,
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "status": DONE if error is None else FAILED, "seconds": round(seconds, 2),
                **({"figures": figures} if error is None else {"error": error}),
            }
        )  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Replaced in one move: a stop while it is written loses nothing.
        written = self.path.with_suffix(".part")
        written.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        written.replace(self.path)


def figure_text(key: str, value: Any) -> str:
    """Return a figure as a table shows it; the end of its key is its unit."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float | int):
        if key.endswith("_bytes"):
            return bytes_text(value)
        if key.endswith("_per_s"):
            return f"{value:,.0f}"
        if key.endswith("_s"):
            return seconds_text(value)
        if key.endswith("error"):
            return f"{value:+.2%}"
        return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
    return str(value).replace("|", "\\|")


def markdown(results: Results, rows: dict[str, list[Row]], left_out: dict[Row, str]) -> str:
    """Return the tables of all parts: figures, aims, failures, and what is left out or still to run."""
    stamp, facts = results.stamp, results.content["machines"][results.stamp.machine]
    machine = ", ".join(f"{key} {value}" for key, value in facts.items() if value not in (None, ""))
    code = f"commit {stamp.commit}" if stamp.commit else "no commit known"
    lines = [f"Device {stamp.device}, size {stamp.size}; {code}, code {stamp.code}. {machine}.", ""]
    for part, about in PARTS.items():
        lines += [f"## {part}. {about}", ""]
        if part in AIMS:
            lines += [f"Aim: {AIMS[part]}.", ""]
        found = {row.name: result for row in rows[part] if (result := results.find(row)) is not None}
        lines += _table({name: result for name, result in found.items() if result["status"] == DONE})
        lines += _summary(part, [result["figures"] for result in found.values() if result["status"] == DONE])
        failed = [f"- {name}: {result['error']}" for name, result in found.items() if result["status"] == FAILED]
        absent = [f"- {row.name}: {left_out[row]}" for row in rows[part] if row in left_out]
        waiting = [row.name for row in rows[part] if row.name not in found and row not in left_out]
        for title, items in (("Failed", failed), ("Left out", absent)):
            lines += [f"{title}:", "", *items, ""] if items else []
        if waiting:
            lines += [f"Not run yet: {len(waiting)} of {len(rows[part])} rows, from {waiting[0]!r} on.", ""]
    return "\n".join(lines)


def _table(done: dict[str, Table]) -> list[str]:
    columns: dict[str, None] = {}  # a dict keeps the order
    for result in done.values():
        columns |= dict.fromkeys(key for key in result["figures"] if key != TABLED_LISTS)
    if not done:
        return []
    head = ["row", *(column.replace("_", " ") for column in columns), "took"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, result in done.items():
        cells = [figure_text(key, result["figures"].get(key)) for key in columns]
        lines.append(f"| {' | '.join([name, *cells, seconds_text(result['seconds'])])} |")
    return [*lines, ""]


def _summary(part: str, figures: Sequence[Table]) -> list[str]:
    """Return a line for a part whose aim is about a mean, or counts rows within their bounds."""
    errors = [abs(row["error"]) for row in figures if "error" in row]
    if part == "d" and errors:
        return [f"Mean error {statistics.mean(errors):.1%}, worst {max(errors):.1%}, of {len(errors)} steps.", ""]
    judged = [row["within"] for row in figures if row.get("within") is not None]
    return [f"{sum(judged)} of {len(judged)} rows within the aim.", ""] if judged else []
