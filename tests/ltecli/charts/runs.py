"""Run folders for pages, made from one that was trained: other events, other settings, names that attack."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ATTACKS = ("<img src=x onerror=hacked=1>", "x</script><script>hacked=1</script>", "a&amp;%{x}<b>b")
"""Names of run folders that a careless page would run as code, or change."""


def copied(folder: Path, name: str, change: Callable[[dict[str, Any]], dict[str, Any] | None] = dict) -> Path:
    """Copy a run folder under another name, with each event changed, or left out for None."""
    target = Path(name)
    shutil.copytree(folder, target)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    kept = [new for event in events if (new := change(event)) is not None]
    (target / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    return target


def with_evaluations(folder: Path, name: str, count: int) -> Path:
    """Copy a run folder with so many steps and evaluations, and curves that fall and swing."""
    target = Path(name)
    shutil.copytree(folder, target)
    start, memory = (target / "events.jsonl").read_text().splitlines()[:2]
    lines = [start, memory]
    for step in range(1, count + 1):
        both = {"version": 1, "step": step, "tokens": 32 * step, "sent_bytes": 200 * step, "simulated_s": 0.5 * step}
        loss = 5 / (1 + step / count) + 0.1 * (step % 3)
        figures = {"train_loss": loss, "device_losses": [loss, loss], "samples": 4 * step, "simulated_exchange_s": 0.1}
        lines.append(json.dumps({**both, "kind": "step", "wall_s": 0.1 * step, "simulated_pause_s": 0.2, **figures}))
        lines.append(json.dumps({**both, "kind": "evaluate", "val_loss": loss + 0.1, "wall_s": 0.1 * step}))
    (target / "events.jsonl").write_text("\n".join(lines) + "\n")
    (target / "run.toml").write_text((target / "run.toml").read_text().replace("steps = 8", f"steps = {count}"))
    return target


class Elements(HTMLParser):
    """The elements of a document, with their attributes and the text in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._open[-1] if self._open else "", []).append(data)


def figures_of(page: Path) -> dict[str, Any]:
    """Return the figures in a page, as its script reads them."""
    text = page.read_text(encoding="utf-8")
    data = text.split('<script type="application/json" id="figures">')[1].split("</script>")[0]
    return dict(json.loads(data))
