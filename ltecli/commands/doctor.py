"""lte doctor: what on this machine would stop or spoil a run, each in one line with what mends it.

`lte train` asks the same before it starts, by `check_machine`, and says nothing where all is well. The facts come from
simulate.doctor.machine, the judgement from simulate.doctor.checks. Exit code 2 says that something stops a run, or
keeps it from this machine's GPUs; --launch also counts what stops a launched run, --device cpu leaves GPUs out.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from ltecli.commands.launch import DEFAULT_PORT, LaunchArgs
from ltecli.console import Output, plain_table
from ltecli.errors import BAD_INPUT, DONE
from simulate.common.cache_folder import CACHE_VARIABLE, cache_folder
from simulate.common.disk import temporary_folder
from simulate.common.errors import InputError
from simulate.common.limits import usable_cores
from simulate.common.units import bytes_text
from simulate.config.run import Run, load_given_run
from simulate.doctor.checks import Purpose, diagnose, stops
from simulate.doctor.machine import Machine, examine

VERSION = 1
TITLES = {"run": "stops runs", "gpu": "keeps runs off the GPU", "launch": "stops --launch", "nothing": "warning"}


def doctor_command(run: Path | None, device_name: str, launch: bool, out: Path, as_json: bool) -> int:
    """Print the facts and the findings of this machine; returns the exit code."""
    output = Output(as_json)
    purpose = _purpose(None if run is None else load_given_run(run), device_name, launch, None, 1)
    folders, homeless = {"--out": out, "TMPDIR": temporary_folder()}, ""
    try:
        folders[CACHE_VARIABLE] = cache_folder()
    except InputError as error:  # runs that prepare no data do without
        homeless = str(error)
    machine = examine(folders, DEFAULT_PORT)
    findings = diagnose(machine, purpose)
    stopped = any(stops(finding, purpose) for finding in findings)
    output.table(_facts_table(machine))
    output.text("")
    for finding in findings:
        output.text(f"{TITLES[finding.stops]}: {finding}")
    if homeless:
        output.text(f"{TITLES['nothing']}: {homeless}")
    if not findings and not homeless:
        output.text("all well")
    elif not stopped:
        output.text(f"nothing stops a {'launched ' if launch else ''}run")
    facts = {
        **asdict(machine),
        "formats": sorted(machine.formats),
        "folders": [{**asdict(f), "path": str(f.path)} for f in machine.folders],
    }
    output.json(
        {
            "version": VERSION,
            "ok": not stopped,
            "findings": [{**asdict(finding), "line": str(finding)} for finding in findings],
            "machine": facts,
        }
    )
    return BAD_INPUT if stopped else DONE


def check_machine(run: Run, device_name: str, launch: LaunchArgs | None) -> list[str]:
    """Return warnings about this machine, a line each; raises InputError for the first finding that stops the run."""
    machine = examine({"TMPDIR": temporary_folder()})
    # As lte train decides: several GPUs are used by a launch, and auto is the first GPU where torch can use it.
    is_named = device_name not in ("auto", "cpu")
    on_gpu = is_named or (device_name == "auto" and any(gpu.has_kernels for gpu in machine.gpus[:1]))
    launched = launch is not None or (on_gpu and len(machine.gpus) > 1 and run.cluster.devices > 1)
    processes, nodes = (launch.processes, launch.nodes) if launch is not None else (None, 1)
    purpose = _purpose(run, device_name, launched, processes, nodes)
    warnings = []
    for finding in diagnose(machine, purpose):
        needs_gpu = is_named or (launched and on_gpu)
        if finding.stops == "run" or (finding.stops == "launch" and launched) or (finding.stops == "gpu" and needs_gpu):
            raise InputError(str(finding))
        if finding.stops == "gpu" and not on_gpu:
            warnings.append(f"{finding}; it trains on the CPU")
        elif finding.stops != "launch":
            warnings.append(str(finding))
    return warnings


def _purpose(run: Run | None, device_name: str, launch: bool, processes: int | None, nodes: int) -> Purpose:
    devices = -(-run.cluster.devices // nodes) if run else usable_cores()
    processes = (processes or max(1, min(devices, usable_cores()))) if launch else 1
    return Purpose(device_name, launch, processes, run.train.autocast if run else "none")


def _facts_table(machine: Machine) -> Table:
    table = plain_table("", "")
    table.columns[1].justify, table.show_header = "left", False
    torch, limits = machine.torch, machine.limits
    if torch is not None:
        built = f"for CUDA or ROCm {torch.cuda_version}" if torch.cuda_version else "for CPUs"
        kernels = f", kernels for {' '.join(torch.architectures)}" if torch.architectures else ""
        table.add_row("torch", f"{torch.version}, built {built}{kernels}")
        table.add_row("torch.distributed", ", ".join(torch.backends) or "none")
    for index, gpu in enumerate(machine.gpus):
        formats = f"bf16 {'yes' if gpu.has_bf16 else 'no'}"
        table.add_row(f"GPU {index}", f"{gpu.name}, {gpu.architecture}, {bytes_text(gpu.total_bytes)}, {formats}")
    if not machine.gpus:
        table.add_row("GPU", "hidden by CUDA_VISIBLE_DEVICES" if machine.nvidia.is_hidden else "none that torch sees")
    if machine.nvidia.driver:
        table.add_row("NVIDIA driver", machine.nvidia.driver)
    quota = f", quota {limits.cpus:.3g}" if limits.cpus else ""
    table.add_row("cores", f"{machine.cores}{quota}; torch uses {torch.threads if torch else '-'} threads")
    limit = ", a container's limit" if limits.memory_bytes == machine.memory_bytes else ""
    free = f"{bytes_text(machine.memory_free_bytes)} of {bytes_text(machine.memory_bytes)} free"
    table.add_row("memory", free + limit)
    if limits.processes is not None:
        table.add_row("processes", f"{limits.processes_free} of {limits.processes} free")
    user = machine.user_limits
    if user.processes is not None:
        table.add_row("processes of this user", f"{user.processes_free} of {user.processes} free")
    if user.open_files is not None:
        table.add_row("open files", f"at most {user.open_files} a process")
    for folder in machine.folders:
        # Of the option alone nobody knows what it says.
        label = "run folders (--out)" if folder.option == "--out" else folder.option
        table.add_row(label, f"{folder.path}, {bytes_text(folder.free_bytes)} free")
    return table
