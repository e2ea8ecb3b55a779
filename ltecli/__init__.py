"""Plan, train and report LoRA-the-Explorer pre-training from Python: `import ltecli as lte`, then `lte.plan(...)`.

The names are those of ltecli.api, found when they are first used, so that the import itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltecli.api import (
        InputError,
        NothingFeasibleError,
        Plan,
        Report,
        Run,
        RunFailedError,
        open,
        plan,
        train,
    )

__all__ = ["InputError", "NothingFeasibleError", "Plan", "Report", "Run", "RunFailedError", "open", "plan", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("ltecli.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
