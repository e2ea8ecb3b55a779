"""Differences between what was recorded and what is now, each as one line that names the place."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parent / "figures"
ABSENT = "absent"


def processor() -> dict[str, str]:
    """Return everything that the last bits of a sum depend on: on the same, losses are compared to the bit."""
    import torch

    wanted = ("model name", "cpu family", "model", "stepping", "flags")
    lines = (line.partition(":") for line in _cpuinfo().split("\n\n")[0].splitlines())
    found = {key.strip(): value.strip() for key, _, value in lines if key.strip() in wanted}
    capability = torch.backends.cpu.get_cpu_capability()
    # Without AVX2, normal numbers of one seed differ in the last bits of fp32, and so do all start weights.
    drawn = torch.randn(64, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
    draws = hashlib.sha256(drawn).hexdigest()[:12]
    return {
        **found,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "capability": capability,
        "draws": draws,
    }


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def differences(recorded: Any, now: Any, tolerance: float = 0.0, where: str = "", floor: float = 0.0) -> Iterator[str]:
    """Yield where a recorded figure is gone or other; what is new is no difference.

    Floats may differ by `tolerance` times the larger one's magnitude, or by `floor`; integers, strings and lengths may
    not.
    """
    if isinstance(recorded, dict) and isinstance(now, dict):
        for key, value in recorded.items():
            yield from differences(value, now.get(key, ABSENT), tolerance, f"{where}.{key}" if where else key, floor)
    elif isinstance(recorded, list) and isinstance(now, list) and len(recorded) == len(now):
        for index, (ours, theirs) in enumerate(zip(recorded, now, strict=True)):
            yield from differences(ours, theirs, tolerance, f"{where}[{index}]", floor)
    elif isinstance(recorded, list) and isinstance(now, list):
        yield f"{where}: {len(recorded)} entries were recorded, now {len(now)}"
    elif not _is_equal(recorded, now, tolerance, floor):
        yield f"{where}: {recorded!r} was recorded, now {now!r}{_by(recorded, now)}"


def _is_equal(recorded: Any, now: Any, tolerance: float, floor: float) -> bool:
    if type(recorded) is float and type(now) is float:
        return recorded == now or math.isclose(recorded, now, rel_tol=tolerance, abs_tol=floor)
    return type(recorded) is type(now) and bool(recorded == now)


def _by(recorded: Any, now: Any) -> str:
    if not (type(recorded) is float and type(now) is float and recorded):
        return ""
    return f" ({now / recorded - 1:+.1e})"


def flat(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested tables by their dotted keys; a list is a leaf."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{where}.{key}" if where else key)
    else:
        yield where, value


def save(part: str, document: Any) -> Path:
    """Write what was recorded of a part; the same document always gives the same bytes."""
    path = FIGURES / f"{part}.json.gz"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    return path


def load(part: str) -> Any:
    """Read what was recorded of a part."""
    return json.loads(gzip.decompress((FIGURES / f"{part}.json.gz").read_bytes()))
