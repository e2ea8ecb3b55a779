"""Import this before torch, and torch has no torch.distributed, as if it was built with USE_DISTRIBUTED=0."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder

PARTS = ("_c10d_init", "_rpc_init", "_dist_autograd_init", "_faulty_agent_init")
"""What such a build leaves out of torch._C, by which torch.distributed and its parts see that they are not there."""


class _Remover(MetaPathFinder):
    """Removes the parts at the first import of torch.distributed, which finds torch._C loaded, and itself not yet."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: object = None) -> None:
        if fullname == "torch.distributed":
            for part in PARTS:
                delattr(sys.modules["torch._C"], part)


assert "torch" not in sys.modules
sys.meta_path.insert(0, _Remover())
