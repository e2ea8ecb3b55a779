"""The methods' own keys, as the [method] table of run.toml has them; torch-free.

Letters: N devices, K heads of a device, T steps of a round, r rank, s = alpha / r.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from simulate.config.method_options import MethodOptions
from simulate.methods.adamix.options import AdamixOptions
from simulate.methods.daso.options import DasoOptions
from simulate.methods.ddp.options import DdpOptions
from simulate.methods.diloco.options import DilocoOptions
from simulate.methods.local_sgd.options import LocalSgdOptions
from simulate.methods.lora.options import LoraOptions
from simulate.methods.lte.options import LteOptions
from simulate.methods.mhlora.options import MhloraOptions
from simulate.methods.powersgd.options import PowerSgdOptions
from simulate.methods.relora.options import ReloraOptions
from simulate.methods.sapipe.options import SapipeOptions
from simulate.methods.signsgd.options import SignsgdOptions
from simulate.methods.topk.options import TopkOptions

METHODS: dict[str, type[MethodOptions]] = {
    "lte": LteOptions,
    "ddp": DdpOptions,
    "lora": LoraOptions,
    "relora": ReloraOptions,
    "mhlora": MhloraOptions,
    "local-sgd": LocalSgdOptions,
    "diloco": DilocoOptions,
    "daso": DasoOptions,
    "sapipe": SapipeOptions,
    "adamix": AdamixOptions,
    "powersgd": PowerSgdOptions,
    "topk": TopkOptions,
    "signsgd": SignsgdOptions,
}
METHOD_NAMES = tuple(METHODS)
Method = Annotated[
    LteOptions
    | DdpOptions
    | LoraOptions
    | ReloraOptions
    | MhloraOptions
    | LocalSgdOptions
    | DilocoOptions
    | DasoOptions
    | SapipeOptions
    | AdamixOptions
    | PowerSgdOptions
    | TopkOptions
    | SignsgdOptions,
    Field(discriminator="name"),
]
