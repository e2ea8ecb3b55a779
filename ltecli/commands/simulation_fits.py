"""Check that this machine can hold a simulation of all devices before `lte train` starts one, and make a run tiny.

A simulation holds N devices in one process, and a machine that cannot fails late: after minutes, or killed by the
system without a word. simulate.costs.simulated_memory says what it needs; its form is an estimate, so that
`--ignore-memory` trains anyway. `lte train --tiny` tries the same run with a small network and few steps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from simulate.common.errors import InputError
from simulate.common.limits import usable_memory
from simulate.common.units import bytes_text
from simulate.config.hardware import Device
from simulate.config.profiles import detect_local
from simulate.config.run import Run, build_run
from simulate.costs.allocator import WORKSPACE_BYTES
from simulate.costs.memory import host_memory_by_part
from simulate.costs.message_schedule import schedule
from simulate.costs.simulated_memory import PROCESS_BYTES, simulated_memory
from simulate.models.families.table import FAMILIES
from simulate.models.shapes import ModelShape

if TYPE_CHECKING:
    import torch

ALLOCATOR_SHARE = 0.1
"""Guess: share that a GPU's allocator holds beside a simulation's tensors; LARGE_HOLES was seen on a CPU."""
DATA_COPIES = 4
"""Guess: most bytes that a process holds for each byte of data, as tokens, samples or decoded images."""
TINY = {"layers": 2, "width": 64, "attention_heads": 2, "mlp_width": 128, "tokens_width": 32, "channels_width": 128,
        "context": 64}  # fmt: skip
"""Largest sizes of a tiny network."""
TINY_IMAGE, TINY_PATCH, TINY_STEPS, TINY_BATCH, TINY_RANK, TINY_DEVICES = 32, 8, 20, 2, 8, 8


def check_simulation_fits(run: Run, device: torch.device, is_tiny: bool, processes: int = 1) -> None:
    """Raise InputError where this machine cannot hold all devices of a run in so many processes."""
    on_gpu = device.type != "cpu"
    room = _rooms(device)
    shape = run.shape()
    short = _short(run, shape, room)
    if short is None:
        needed = processes_bytes(run, processes)
        if processes > 1 and needed > room["host"]:
            raise InputError(
                f"--processes {processes}: they need about {bytes_text(needed)} of host memory, and "
                f"{bytes_text(room['host'])} are free here; lower it, or --ignore-memory starts them"
            )
        return
    where, needed, free = short
    fits = _most_devices(run, shape, room)
    moves = [f"--set cluster.devices={fits} fits"] if fits else []
    moves += [] if is_tiny else ["--tiny tries the same run with a small network"]
    moves += ["--device cpu uses the host's memory"] if on_gpu and where == "GPU" else []
    raise InputError(
        f"cluster.devices = {run.cluster.devices}: simulating them in one process needs about {bytes_text(needed)} of "
        f"{where} memory, and {bytes_text(free)} are free here; {', or '.join([*moves, '--ignore-memory starts it'])}"
    )


def fits_in_processes(run: Run, processes: int, data_bytes: int) -> bool:
    """Whether this machine holds a run's devices in so many processes, each of which has the data."""
    import torch

    return (
        processes_bytes(run, processes) + (processes - 1) * DATA_COPIES * data_bytes
        <= _rooms(torch.device("cpu"))["host"]
    )


def fits_beside(run: Run, processes: int, others_bytes: int) -> bool:
    """Whether this machine holds a simulation in so many processes, and one more with tensors of `others_bytes`."""
    import torch

    return processes_bytes(run, processes) + PROCESS_BYTES + others_bytes <= _rooms(torch.device("cpu"))["host"]


def processes_bytes(run: Run, processes: int) -> int:
    """Return the host's bytes that a simulation in several processes needs, an upper bound."""
    shape, one = run.shape(), detect_local().device[0]
    share = _with_devices(run, -(-run.cluster.devices // processes))
    # What devices exchange is in each process once more, as it leaves and as it arrives from all.
    arriving = 2 * sum(part.exchange.sent_bytes for part in schedule(run, shape))
    return processes * (simulated_memory(share, shape, one).process + (arriving if processes > 1 else 0))


def host_memory_bytes(run: Run, device: torch.device) -> int:
    """Return the bytes of the host's memory that a process needs which simulates all devices of a run."""
    return dict(_needed(run, run.shape(), device.type != "cpu"))["host"]


def _rooms(device: torch.device) -> dict[str, int]:
    """Return the bytes that this process may hold in the host's memory, and in the GPU's where it trains there."""
    import psutil

    # What this process holds already is a part of what the form counts.
    rooms = {"host": usable_memory()[1] + psutil.Process().memory_info().rss}
    if device.type != "cpu":
        from simulate.layers.accelerator import memory_bytes

        rooms["GPU"] = memory_bytes(device)[0]
    return rooms


def _short(run: Run, shape: ModelShape, rooms: dict[str, int]) -> tuple[str, int, int] | None:
    """Return the memory that is short, the bytes that a simulation needs of it and those that are free; else None."""
    for name, needed in _needed(run, shape, "GPU" in rooms):
        if needed > rooms[name]:
            return name, needed, rooms[name]
    return None


def _needed(run: Run, shape: ModelShape, on_gpu: bool) -> Iterator[tuple[str, int]]:
    one = detect_local().device[0]
    if not on_gpu:
        yield "host", simulated_memory(run, shape, one).process
        return
    one = one.model_copy(update={"host_memory_bytes": one.memory_bytes, "device_type": "cuda"})
    tensors = simulated_memory(run, shape, one).tensors
    yield "GPU", int((1 + ALLOCATOR_SHARE) * tensors) + WORKSPACE_BYTES
    yield "host", PROCESS_BYTES + _host_bytes(run, shape, one)


def _host_bytes(run: Run, shape: ModelShape, device: Device) -> int:
    return sum(host_memory_by_part(run, shape, device).values())


def _most_devices(run: Run, shape: ModelShape, rooms: dict[str, int]) -> int:
    """Return the largest number of devices that fits and that the run's options allow; 0 where none does."""
    low, high = 0, run.cluster.devices
    while high - low > 1:
        middle = (low + high) // 2
        if _short(_with_devices(run, middle), shape, rooms) is None:
            low = middle
        else:
            high = middle
    return next((devices for devices in range(low, 0, -1) if _is_allowed(run, devices)), 0)


def _with_devices(run: Run, devices: int) -> Run:
    return run.model_copy(update={"cluster": run.cluster.model_copy(update={"devices": devices})})


def _is_allowed(run: Run, devices: int) -> bool:
    try:
        build_run(_with_devices(run, devices).model_dump(exclude_none=True), "devices")
    except InputError:  # nodes of several devices, steps or shards that are given for each device
        return False
    return True


def tiny_run(run: Run, given: Collection[str] = ()) -> tuple[Run, list[str]]:
    """Return the same run with a small network, few steps and devices, and what was replaced, a phrase each.

    `given` are keys, as table.key, whose values the user asked for beside --tiny: they stay.
    """
    names = ("model", "train", "method", "cluster")
    model, train, method, cluster = (getattr(run, name).model_dump(exclude_none=True) for name in names)
    shrunk = _tiny_model(run)
    heads = method.get("heads_per_device", 1)
    round_steps = run.method.round_steps
    small = {
        "steps": min(run.train.steps, 2 * round_steps if round_steps > 1 else TINY_STEPS),
        # Each head gets an equal part of the batch.
        "micro_batch": min(run.train.micro_batch, heads * TINY_BATCH),
        "evaluate_samples": min(run.train.evaluate_samples, TINY_BATCH),
    }
    if "train.steps" not in given:  # a warm-up belongs to its steps
        small["warmup_steps"] = min(run.train.num_warmup_steps, small["steps"] // 2)
        train.pop("warmup_share", None)  # both together are refused
    rank = {"rank": min(method["rank"], TINY_RANK)} if "rank" in method else {}
    if "class" in cluster:
        cluster = {**cluster, "class": [_tiny_class(one, heads) for one in cluster["class"]]}
    few = {"devices": TINY_DEVICES} if run.cluster.devices > TINY_DEVICES and _is_allowed(run, TINY_DEVICES) else {}
    changes = {"train": (train, small), "method": (method, rank), "cluster": (cluster, few)}
    tables = {"model": (model, shrunk)}
    for name, (old, update) in changes.items():
        tables[name] = old, old | {key: value for key, value in update.items() if f"{name}.{key}" not in given}
    replaced = [
        f"{name}.{key} = {new[key]} (was {old.get(key, 'not set')})"
        for name, (old, new) in tables.items()
        for key in new
        if old.get(key) != new[key]
    ]
    table = {**run.model_dump(exclude_none=True), **{name: new for name, (_, new) in tables.items()}}
    return build_run(table, "--tiny"), replaced


def _tiny_class(one: dict[str, Any], heads: int) -> dict[str, Any]:
    """Return a table of [[cluster.class]] with a small batch and rank, where it sets them."""
    most = {"rank": TINY_RANK, "micro_batch": one.get("heads_per_device", heads) * TINY_BATCH}
    return {key: min(value, most[key]) if key in most else value for key, value in one.items()}


def _tiny_model(run: Run) -> dict[str, object]:
    """Return the [model] table of a small network of the same family; a user's network becomes a gpt or a vit."""
    given = run.model.model_dump()
    known = run.model.family in FAMILIES
    family = run.model.family if known else "gpt" if run.model.unit == "tokens" else "vit"
    keys = FAMILIES[family].model_fields
    sizes = {key: min(size, given.get(key) or size) for key, size in TINY.items() if key in keys}
    sizes["width"] = TINY["width"]
    if "attention_heads" in keys:  # which divide the width
        sizes["attention_heads"] = TINY["attention_heads"]
    sizes |= {key: given[key] for key in ("vocab", "colours", "classes") if key in keys and given.get(key)}
    if "image" in keys:
        sizes |= {"image": TINY_IMAGE, "patch": TINY_PATCH}
    return {"name": keys["name"].default, **sizes}
