"""Keys of [method] for SparseLoCo; torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from simulate.comm.transfers import Sparsity, Wire
from simulate.config.method_options import FragmentOptions, quorum_key
from simulate.config.tables import Cluster


class SparselocoOptions(FragmentOptions):
    """SparseLoCo (arXiv 2508.15706): local AdamW, and the largest entries of what each device's rounds have changed.

    The paper merges every 15 to 250 steps.
    """

    name: Literal["sparseloco"] = "sparseloco"
    density: float = Field(default=0.03125, gt=0, le=1)
    """Share of the entries that travel, of every 4,096; the paper has 0.0078 to 0.03125."""
    error_decay: float = Field(default=0.95, gt=0, le=1)
    """Factor, at each merge, of what has not travelled yet; it stands in place of outer momentum."""
    outer_learning_rate: float = Field(default=1.0, gt=0)
    wire: Wire = "int2"
    """Format in which the entries travel."""

    @property
    def compresses(self) -> bool:
        return True

    @property
    def sparsity(self) -> Sparsity:
        """The entries that travel."""
        return Sparsity(self.density, self.error_decay)

    def check_quorum(self, cluster: Cluster) -> None:
        raise ValueError(
            f"cluster.{quorum_key(cluster)} lets merges go on without devices, and method.name = 'sparseloco' keeps "
            "what did not travel for the next merge of the same devices; leave it away, or try --set "
            "method.name=diloco"
        )
