"""Runs with random sizes and options, to compare plans with measurements; torch-free.

No closed form was fitted to them. A run is addressed by (seed, index), so that a list of runs can be cut or split and
its runs stay the same. `lte validate` and the tests of memory measure them, through simulate.measure.accuracy.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from simulate.config.run import Run, build_run
from simulate.models.families.table import FAMILIES

Table = dict[str, Any]
AUTOCASTS = ("none", "bf16", "fp16")
METHODS = (
    "lte", "ddp", "diloco", "lora", "lte", "local-sgd", "topk", "lte", "relora", "powersgd", "lte", "mhlora", "daso",
    "sapipe", "lte", "signsgd", "adamix", "sparseloco",
)  # fmt: skip
"""Methods in turns; their number and that of the families have no common divisor, so that every pair occurs."""
LAYERS = (2, 3, 4, 5, 6, 8, 12)
MANY_LAYERS, MANY_EVERY = (16, 24, 32, 40), 8
"""Layers of deep networks, and the runs from one to the next: depth costs time and shows little else."""
WIDTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
CONTEXTS = (32, 64, 96, 128, 256, 384, 512, 1024, 2048)
RANKS = (2, 4, 8, 16, 32, 64)
WIRES = ("full", "full", "fp16", "bf16", "int8", "int4")
SMALL = {"widths": (64, 96, 128), "contexts": (16, 32, 48), "layers": (2, 3), "ranks": (2, 4, 8)}
"""Sizes of runs that train within a second or two."""
MERGE_EVERY = 4


@dataclass(frozen=True)
class Sample:
    """A number of random runs, and what they have in common."""

    count: int
    seed: int = 0
    family: str | None = None
    """One of FAMILIES; None: all of them in turns."""
    autocast: str = "none"
    small: bool = False
    """Whether the networks are small enough to be measured by training them."""

    def runs(self) -> list[Run]:
        """Return the runs; a longer sample of the same seed begins with them."""
        return [self.run(index) for index in range(self.count)]

    def run(self, index: int) -> Run:
        """Return one random run; a hundred of them hold every method, reset, transport, wire and optimizer."""
        # A generator a run: runs before it, and draws that are added to them later, leave it as it is.
        draw = random.Random(f"held-out {self.seed} {index}")
        devices, heads = draw.choice((2, 3, 4, 8)), draw.choice((1, 1, 2, 4))
        model = _model(draw, self.family or list(FAMILIES)[index % len(FAMILIES)], index, self.small)
        method = _method(draw, METHODS[index % len(METHODS)], heads, devices, model, self.small)
        batch = draw.choice((1, 2, 3, 4, 8)) * (heads if "heads_per_device" in method else 1)
        recomputes, double = draw.random() < 0.4, draw.random() < 0.1
        train = {
            "steps": 100,
            "micro_batch": batch,
            "activation_checkpointing": recomputes,
            "dtype": "fp64" if double and self.autocast == "none" else "fp32",
            "autocast": self.autocast,
            "optimizer": _optimizer(draw, method),
        }
        return build_run({"model": model, "method": method, "train": train, "cluster": {"devices": devices}})

    def shrunk(self) -> Sample:
        """Return the sample with small networks."""
        return replace(self, small=True)


def _model(draw: random.Random, family: str, index: int, small: bool) -> Table:
    deep = index % MANY_EVERY == MANY_EVERY - 1 and not small  # too slow to train
    layers = draw.choice(SMALL["layers"] if small else MANY_LAYERS if deep else LAYERS)
    width = draw.choice(SMALL["widths"] if small else WIDTHS)
    sizes: Table = {"layers": layers, "width": width}
    keys = FAMILIES[family].model_fields
    if "attention_heads" in keys:
        sizes["attention_heads"] = draw.choice([heads for heads in (2, 4, 8, 16) if width // heads >= 16])
    if "context" in keys:
        vocab = draw.choice((256, 300) if small else (256, 1000, 5000, 32000))
        sizes |= {"context": draw.choice(SMALL["contexts"] if small else CONTEXTS), "vocab": vocab}
    else:
        patch = draw.choice((4, 8) if small else (4, 8, 16))
        sizes |= {"patch": patch, "image": patch * draw.choice((4, 6) if small else (4, 6, 8, 14))}
        sizes["classes"] = draw.choice((10, 100, 1000))
    if "mlp_width" in keys:
        sizes["mlp_width"] = width * draw.choice((2, 3)) + draw.choice((0, 8))
    if "tokens_width" in keys:
        sizes |= {"tokens_width": draw.choice((32, 64, 128, 256)), "channels_width": width * draw.choice((2, 4))}
    return {"name": keys["name"].default, **sizes}


def _method(draw: random.Random, name: str, heads: int, devices: int, model: Table, small: bool) -> Table:
    limit = model["width"]  # a rank is at most the smallest dimension of an adapted layer
    if "tokens_width" in model:
        limit = min(limit, model["tokens_width"], (model["image"] // model["patch"]) ** 2)
    rank = min(draw.choice(SMALL["ranks"] if small else RANKS), limit)
    return {"name": name, **_OPTIONS[name](draw, rank, heads, devices, model)}


def _lte(draw: random.Random, rank: int, heads: int, devices: int, model: Table) -> Table:
    reset, late, paced = draw.choice(("none", "b", "ab")), draw.random() < 0.2, draw.random() < 0.1
    options: Table = {
        "rank": rank,
        "heads_per_device": heads,
        "merge_every": MERGE_EVERY,
        "merge_transport": draw.choice(("gather", "reduce", "server", "auto")),
        "reset": reset,
        "wire": draw.choice(WIRES),
        "fragments": draw.choice((1, 1, 2)),
        "norms": draw.choice(("average", "average", "one", "vector-lora", "none")),
        "biases": draw.choice(("average", "average", "frozen")),
        "merge_optimizer": draw.choice(("keep", "keep", "prune", "reset")),
        "frozen_a": reset != "none" and draw.random() < 0.4,
    }
    # The options refuse late merges that would drop what heads learn meanwhile, and with pairs on norms.
    if late and options["norms"] != "vector-lora" and (reset == "none" or (reset == "b" and options["frozen_a"])):
        options |= {"merge_delay": 1}
    elif paced and reset != "none":
        options |= {"fragments": 1, **_uneven(draw, devices)}
    return options


def _uneven(draw: random.Random, devices: int) -> Table:
    """Return options for devices of unequal speed; the first one, which is measured, takes all steps."""
    others = [draw.randint(1, MERGE_EVERY) for _ in range(devices - 1)]
    return {"pace": "deadline", "steps_taken": [[MERGE_EVERY, *others]]}


def _local_sgd(draw: random.Random, rank: int, heads: int, devices: int, model: Table) -> Table:
    kind = draw.choice(("reduce", "server", "average", "compressed", "late", "paced"))
    return {
        "merge_every": MERGE_EVERY,
        "merge_transport": "server" if kind == "server" else "reduce",
        "merge_optimizer": "average" if kind == "average" else draw.choice(("keep", "reset")),
        "wire": draw.choice(WIRES[2:]) if kind == "compressed" else "full",
        "merge_delay": 2 if kind == "late" else 0,
        **(_uneven(draw, devices) if kind == "paced" else {}),
    }


def _diloco(draw: random.Random, rank: int, heads: int, devices: int, model: Table) -> Table:
    return {
        "merge_every": MERGE_EVERY, "wire": draw.choice(WIRES), "fragments": draw.choice((1, 1, 2)),
        "merge_delay": draw.choice((0, 0, 1)),
    }  # fmt: skip


def _sparseloco(draw: random.Random, rank: int, heads: int, devices: int, model: Table) -> Table:
    return {**_diloco(draw, rank, heads, devices, model), "density": draw.choice((0.01, 0.03125, 0.5))}


_OPTIONS: dict[str, Callable[[random.Random, int, int, int, Table], Table]] = {
    "lte": _lte,
    "local-sgd": _local_sgd,
    "diloco": _diloco,
    "sparseloco": _sparseloco,
    "ddp": lambda draw, *_: {"wire": draw.choice(WIRES)},
    "lora": lambda draw, rank, *_: {"rank": rank},
    "relora": lambda draw, rank, *_: {"rank": rank, "warm_start_steps": draw.choice((0, 0, 5))},
    "mhlora": lambda draw, rank, heads, *_: {"rank": rank, "heads_per_device": heads},
    "adamix": lambda draw, rank, *_: {"rank": rank, "experts": draw.choice((2, 3))},
    "daso": lambda draw, rank, heads, devices, model: {
        "devices_per_node": 1 if devices % 2 else draw.choice((1, 2)), "delay_steps": draw.choice((0, 1, 2)),
    },
    "sapipe": lambda draw, *_: {"compensation": draw.choice(("none", "prediction", "delay"))},
    "powersgd": lambda draw, *_: {"rank": draw.choice((1, 2, 4, 8))},
    "topk": lambda draw, *_: {"density": draw.choice((0.01, 0.1))},
    "signsgd": lambda draw, *_: {},
}  # fmt: skip


def _optimizer(draw: random.Random, method: Table) -> str:
    # Both read Adam's moments, which Muon has not; the options refuse them together.
    needs_adam = method.get("compensation") == "prediction" or method.get("merge_optimizer") == "average"
    return "muon" if draw.random() < 0.2 and not needs_adam else "adamw"
