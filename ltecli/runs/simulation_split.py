"""Pick the processes and threads that simulate a run folder's devices, and say so.

A run keeps its split from session to session, since sums in another order round otherwise; the events record it.
`lte train` asks before it simulates. The rule is in simulate.planning.simulation_split, memory in simulation_fits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ltecli.commands.launch import processes_rule
from ltecli.commands.simulation_fits import fits_in_processes
from ltecli.console import Output
from ltecli.runs.run_folder import RunFolder
from simulate.common.errors import InputError
from simulate.common.events import read_events
from simulate.config.hardware import LOCAL
from simulate.config.profiles import load_profile
from simulate.config.run import Run
from simulate.costs.flops import pass_flops
from simulate.costs.message_schedule import schedule, sent_bytes
from simulate.launch.preflight.address import loopback_interface
from simulate.models.families.table import FAMILIES
from simulate.planning.simulation_split import PEAK_SHARE, Split, Work, choose_split, split_of

if TYPE_CHECKING:
    import torch


def check_processes(run: Run, device: torch.device, processes: int) -> None:
    """Raise InputError where `--processes` cannot simulate the run."""
    given = f"--processes {processes}"
    if processes == 1:
        return
    if device.type != "cpu":
        raise InputError(f"{given}: a simulation on {device.type} takes one process; --device cpu takes several")
    if live := run.live_keys:
        raise InputError(f"{given}: other processes do not have the objects of {', '.join(live)}; leave it away")
    if lack := _lack():
        raise InputError(f"{given}: {lack}; leave it away")
    if rule := processes_rule(run, processes, given):
        raise InputError(rule)


def pick_split(folder: RunFolder, device: torch.device, given: int | None, output: Output) -> Split:
    """Return the split that trains a folder's devices on this machine, and print it; `given` is --processes."""
    import torch

    # Fewer than there are cores where the user says so, as a sweep does that trains several runs at once.
    cores, recorded = torch.get_num_threads(), recorded_split(folder)
    if given is not None:
        split = split_of(given, cores)
    elif recorded is not None and recorded == split_of(recorded.processes, cores) and _can(folder, device, recorded):
        split = recorded
    else:
        split = _best(folder, device, cores)
    if recorded is not None and recorded != split:
        output.hint(f"  simulated in {split}, and in {recorded} before: the same run to rounding, not to the bit")
    elif split.processes > 1 or (cores > 1 and folder.run.cluster.devices > 1):
        output.hint(f"  simulated in {split}")
    return split


def recorded_split(folder: RunFolder) -> Split | None:
    """Return the split of the run's last session; None for a new run, and for one that was launched."""
    if folder.resume_from is None or not folder.events.exists():
        return None
    sessions = [e for e in read_events(folder.events) if e["kind"] in ("start", "resume") and e.keys() & SPLIT_KEYS]
    last = sessions[-1] if sessions else {}
    return Split(last.get("simulated_processes", 1), last["threads"]) if "threads" in last else None


SPLIT_KEYS = {"threads", "processes"}
"""Keys of the event of a session that say how it spread its devices: when simulated, and when launched."""


def split_facts(split: Split) -> dict[str, int]:
    """Return what the event of a session records, so that the next one is the same to the bit."""
    return {"threads": split.threads, "simulated_processes": split.processes}


@contextmanager
def threads_of_torch(threads: int) -> Iterator[None]:
    """Compute with so many threads inside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _can(folder: RunFolder, device: torch.device, split: Split) -> bool:
    return split.processes == 1 or (device.type == "cpu" and not _lack() and _is_possible(folder, split.processes))


def _best(folder: RunFolder, device: torch.device, cores: int) -> Split:
    run = folder.run
    # A user's own code may do something that must happen once; only --processes runs it in several processes.
    is_own_code = bool(run.live_keys) or run.model.family not in FAMILIES
    if device.type != "cpu" or is_own_code or min(cores, run.cluster.devices) == 1 or _lack():
        return split_of(1, cores)
    return choose_split(_work(folder), cores, lambda processes: _is_possible(folder, processes))


def _work(folder: RunFolder) -> Work:
    run, shape = folder.run, folder.run.shape()
    done = int(folder.resume_from.name.rpartition("-")[2]) if folder.resume_from else 0
    steps, devices = run.train.steps, run.cluster.devices
    (one,), flops = load_profile(LOCAL).devices(1), devices * pass_flops(run, shape)
    # Not the planned seconds: rates measured beside other programs make them several times too long.
    undisturbed_s = flops / (PEAK_SHARE * one.flop_per_s.of(run.train.dtype))
    messages = sum(len(part.exchange.transfers) * part.times(steps, steps) for part in schedule(run, shape))
    return Work(
        devices=devices,
        steps=steps - done,
        step_s=undisturbed_s,
        layer_flops=flops / run.train.accumulate / max(1, shape.layers),
        sent_bytes=sent_bytes(run, shape, steps) / devices / steps,
        messages=messages / steps,
    )


def _is_possible(folder: RunFolder, processes: int) -> bool:
    run = folder.run
    return processes_rule(run, processes, "") is None and fits_in_processes(run, processes, folder.data.num_bytes)


def _lack() -> str | None:
    """Return what this machine lacks for exchanges between processes, None where it lacks nothing."""
    import torch.distributed as dist

    if sys.platform == "win32" or not dist.is_available() or not dist.is_gloo_available():
        return "this machine's torch has no gloo, by which processes exchange"
    if dist.is_initialized():  # a script's own group, of which there is one in a process
        return "this Python process has joined a process group of torch.distributed"
    try:
        loopback_interface()
    except InputError as error:
        return str(error)
    return None
