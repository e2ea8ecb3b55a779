"""The command line: its options, and for each command a call into ltecli/commands.

Each body imports its command when it is called, so that --help and plan stay fast and plan stays without torch. `main`
is the entry point of the `lte` script and of `python -m ltecli`.
"""

from __future__ import annotations

import enum
import os
import shlex
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core
import typer.main

from ltecli import completion
from ltecli.environment import set_defaults_of_libraries
from ltecli.errors import (
    BAD_INPUT,
    INTERRUPTED,
    StdoutError,
    exit_if_stuck,
    guarded,
    one_line,
    report_stdout_error,
    stdout_checked,
)
from ltecli.help_pages import write_example, write_options
from simulate.common.exits import end_process
from simulate.common.gc_paused import collector_paused
from simulate.common.quantities import read_count
from simulate.common.version import version as lte_version

app = typer.Typer(
    name="lte",
    help="Plan, train and report LoRA-the-Explorer pre-training on small, old or far-apart GPUs.",
    rich_markup_mode=None,
    # What is not a user's mistake keeps Python's own traceback, which a report of a bug needs.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
profile_app = typer.Typer(help="Look at hardware profiles, or measure one.", rich_markup_mode=None)
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
"""Base class of all mistakes in options; older versions of typer take it from click, newer ones have their own."""
app.add_typer(profile_app, name="profile")


class OnceCommand(typer.core.TyperCommand):
    """A command whose options are given once: of two values the parser would take the last, without a word."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Parse the arguments; raises a usage error for an option that has two values."""
        given = self.make_parser(ctx).parse_args(args=list(args))[2]
        for parameter in given:
            is_value = isinstance(parameter, typer.core.TyperOption) and not parameter.is_flag
            if is_value and not parameter.multiple and given.count(parameter) > 1:
                ctx.fail(f"{parameter.opts[0]} is given {given.count(parameter)} times; keep one")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write the options under headings."""
        write_options(self.get_params(ctx), ctx, formatter)

    def format_epilog(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write an example."""
        write_example(ctx.command_path, formatter)


class DeviceName(str, enum.Enum):
    """Values of --device."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    XPU = "xpu"
    MPS = "mps"


class ExportFormat(str, enum.Enum):
    """Values of lte export --format."""

    SAFETENSORS = "safetensors"
    HF = "hf"


Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set any run.toml key: method.rank=16",
        autocompletion=completion.set_keys,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no hints.")]
ProfileName = Annotated[
    str | None,
    typer.Option(
        "--profile",
        "-p",
        help="A shipped profile, `local`, or a path to profile.toml.",
        autocompletion=completion.profile_names,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="gpt, gpt2, llama_60m, vit_s16, mixer_s16, ...: see docs/models.md.",
        autocompletion=completion.model_names,
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", autocompletion=completion.run_folders)]
DataPath = Annotated[str | None, typer.Option("--data", "-d", help="Text or images: a file, a folder or a .zip.")]
SecretFile = Annotated[
    Path | None, typer.Option(help="File with the secret that both ends share (else LTE_SECRET); not on loopback.")
]
LinkFrom = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN",
        help="Take the link that the nodes of a launched run measured.",
        autocompletion=completion.run_folders,
    ),
]
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write a page of figures; it needs no network.")
]
Devices = Annotated[int | None, typer.Option("--devices", "-n", help="Devices to use; default: all of the profile.")]


def _count(text: str) -> int:
    try:
        return read_count(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


Tokens = Annotated[
    int | None,
    typer.Option(
        "--tokens", parser=_count, metavar="COUNT", help="Tokens to train on, 2.5B say; default: 20 a parameter."
    ),
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", parser=_count, metavar="COUNT", help="Images to train on, for models of images."),
]


def _command_line(ctx: typer.Context) -> str:
    """Return the command line as given, which `main` leaves in the context, for whoever wants to repeat it."""
    return shlex.join(["lte", *ctx.obj])


def _print_version(given: bool) -> None:
    if given:
        typer.echo(f"lte {lte_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Plan, train and report LoRA-the-Explorer pre-training on small, old or far-apart GPUs."""


@app.command(cls=OnceCommand)
@guarded
def plan(
    ctx: typer.Context,
    profile: ProfileName = None,
    model: Model = None,
    data: DataPath = None,
    devices: Devices = None,
    tokens: Tokens = None,
    samples: Samples = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(parser=_count, metavar="COUNT", help="Tokens of a step over all devices to come near to, 500k."),
    ] = None,
    batch_samples: Annotated[
        int | None, typer.Option(parser=_count, metavar="COUNT", help="The same in images, for models of images.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Pin the method, any of docs/methods.md.", autocompletion=completion.method_names),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Pin the rank of one head.")] = None,
    heads_per_device: Annotated[int | None, typer.Option(help="Pin the heads of one device.")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Pin the frozen weights' format: none, bf16, int8, nf4 or nf4-double.")
    ] = None,
    merge_every: Annotated[int | None, typer.Option(help="Pin the steps between merges.")] = None,
    assignments: Set = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the choice as run.toml.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Let written files replace existing ones.")] = False,
    show_all: Annotated[
        bool, typer.Option("--all", help="Show all figures and notes, and the best candidates.")
    ] = False,
    top: Annotated[int | None, typer.Option(min=1, help="With --all: ways to train to show; default: 8.")] = None,
    probe: Annotated[Path | None, typer.Option(help="A probe.json of lte probe: ranks to try and to mark.")] = None,
    link_from: LinkFrom = None,
    objective: Annotated[str, typer.Option(help="What to minimise: time, bytes, memory or cost.")] = "time",
    within: Annotated[str | None, typer.Option(metavar="TIME", help="Longest time to equal loss: 8h, 3d.")] = None,
    efficiency: Annotated[Path | None, typer.Option(help="A samples model of yours, like samples.toml.")] = None,
    why: Annotated[bool, typer.Option("--why", help="Explain the choice against its neighbours.")] = False,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="Simulate rounds of the choice, event by event.")
    ] = False,
    rounds: Annotated[int | None, typer.Option(help="With --timeline: rounds to simulate; default: 100.")] = None,
    timeline_svg: Annotated[Path | None, typer.Option(help="Draw the timeline into this file.")] = None,
    html: Html = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write all candidates as CSV; - for stdout.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Trace the choice's training on fake tensors, to check its memory.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Find what fits the hardware, what it costs, and choose.

    Nothing is written without -o.
    """
    # Imports make many objects that all stay, as planning does.
    with collector_paused():
        from ltecli.commands.plan import plan_command
        from ltecli.plan_request import PlanArgs

    pins = {
        "name": method,
        "rank": rank,
        "heads_per_device": heads_per_device,
        "quantize": quantize,
        "merge_every": merge_every,
    }
    request = PlanArgs(
        profile=profile,
        model=model,
        data=data,
        devices=devices,
        tokens=tokens,
        samples=samples,
        batch_tokens=batch_tokens,
        batch_samples=batch_samples,
        objective=objective,
        within=within,
        efficiency=efficiency,
        pins=pins,
        assignments=tuple(assignments or ()),
        probe=probe,
        link_from=link_from,
    )
    to_explain = None
    if why or timeline or rounds is not None or timeline_svg is not None or html is not None:
        from ltecli.commands.explain import ExplainArgs  # it loads numpy, for the simulation of rounds

        to_explain = ExplainArgs(why, timeline, rounds, timeline_svg, force, html)
    return plan_command(request, out, force, top, as_json, to_explain, verify, show_all, csv, _command_line(ctx))


@app.command(cls=OnceCommand)
@guarded
def init(
    gpu: Annotated[
        list[str] | None, typer.Option(metavar="'N x GPU'", help="Devices, like '8 x GTX 1080 Ti'; repeat.")
    ] = None,
    link: Annotated[
        list[str] | None, typer.Option(help="'1 GbE', '50/10 DSL', '100 Mbit/s', 'wifi'; one a place.")
    ] = None,
    model: Model = None,
    data: DataPath = None,
    tokens: Tokens = None,
    name: Annotated[str, typer.Option(help="Name of the profile.")] = "home",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the profile and run.toml.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> int:
    """Write a profile and a run.toml from a few answers.

    What no option answers is asked in a terminal.
    """
    from ltecli.commands.init import InitArgs, init_command

    return init_command(InitArgs(gpu or (), link or (), model, data, tokens, name), out, force)


@app.command("probe", cls=OnceCommand)
@guarded
def probe_a_run(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run.toml.", autocompletion=completion.runs)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the findings as probe.json.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Let -o replace an existing file.")] = False,
    batches: Annotated[int, typer.Option(min=1, help="Steps that give gradients, before and after the warm-up.")] = 8,
    warmup: Annotated[int, typer.Option(min=1, help="Dense steps of the warm-up.")] = 50,
    layers: Annotated[bool, typer.Option("--layers", help="Show every adapted layer.")] = False,
    device: Annotated[DeviceName, typer.Option(help="Where to probe.")] = DeviceName.AUTO,
    assignments: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Estimate rank, heads and batch from a few gradients.

    They are taken at the start, and again after a short dense warm-up.
    """
    from ltecli.commands.probe import ProbeArgs, probe_command

    options = ProbeArgs(batches, warmup, tuple(assignments or ()))
    return probe_command(run, options, out, force, layers, device.value, as_json, quiet)


@app.command(cls=OnceCommand)
@guarded
def validate(
    only: Annotated[str | None, typer.Option(help="One section: memory, bytes or time.")] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", "-p", help="A measured profile of this machine, for times.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller runs: about half a minute.")] = False,
    shapes: Annotated[int | None, typer.Option(min=1, help="Random runs of each kind.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random runs.")] = 0,
    family: Annotated[
        str | None, typer.Option(help="Family of the random networks: gpt, llama, vit or mixer; default: all.")
    ] = None,
    autocast: Annotated[str, typer.Option(help="Format of the matrix products: none, bf16 or fp16.")] = "none",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the tables as markdown.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Compare predictions with measurements on this machine.

    The predictions are planned memory, bytes and time.
    """
    from ltecli.commands.validate import ValidateArgs, validate_command

    sample = ValidateArgs(quick, shapes, seed, family, autocast)
    return validate_command(only, sample, out, as_json, quiet, profile)


@app.command(cls=OnceCommand)
@guarded
def train(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN", help="run.toml, or a run folder; default: plan one now.", autocompletion=completion.runs
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default: runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    data: DataPath = None,
    device: Annotated[DeviceName, typer.Option(help="Where to simulate.")] = DeviceName.AUTO,
    diagnostics: Annotated[
        bool, typer.Option("--diagnostics", help="Diagnose heads and gradients at every evaluation.")
    ] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="Try the run with a small network and few steps.")] = False,
    ignore_memory: Annotated[
        bool, typer.Option("--ignore-memory", help="Simulate even if this machine seems too small for all devices.")
    ] = False,
    launch: Annotated[
        bool, typer.Option("--launch", help="Train for real: a process for each device, here or on several machines.")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(help="Processes on this machine; default: as many as pay, and with --launch one a device.", min=1),
    ] = None,
    nodes: Annotated[int, typer.Option(help="With --launch: machines that take part.", min=1)] = 1,
    node: Annotated[int | None, typer.Option(help="With --launch: number of this machine, from 0.", min=0)] = None,
    join: Annotated[str | None, typer.Option(help="With --launch: HOST:PORT of node 0.")] = None,
    interface: Annotated[str | None, typer.Option(help="With --launch: the only network interface to use.")] = None,
    secret_file: Annotated[
        Path | None, typer.Option(help="With --launch: file with the secret that nodes share (else LTE_SECRET).")
    ] = None,
    trust_network: Annotated[
        bool, typer.Option("--trust-network", help="With --launch: accept an address that is not private.")
    ] = False,
    store: Annotated[
        str | None, typer.Option(help="With --launch: HOST:PORT of lte store, so that node 0 may be lost, too.")
    ] = None,
    assignments: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Train a run, with its devices simulated or launched for real.

    Simulated devices share one process, or a few where that is faster. Ctrl-C saves and stops.
    """
    from ltecli.commands.launch import LaunchArgs
    from ltecli.commands.train import TrainArgs, train_command

    args = TrainArgs(data, tuple(assignments or ()), diagnostics, tiny)
    options = LaunchArgs(processes, nodes, node, join, interface, secret_file, trust_network, store)
    options.check(launch)
    return train_command(
        run, out, resume, device.value, args, options if launch else None, processes, as_json, quiet, ignore_memory
    )


@app.command(cls=OnceCommand)
@guarded
def doctor(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN", help="run.toml, whose formats and devices count, too.", autocompletion=completion.runs
        ),
    ] = None,
    launch: Annotated[bool, typer.Option("--launch", help="Count what stops a launched run, too.")] = False,
    device: Annotated[DeviceName, typer.Option(help="Where to train; cpu leaves GPUs out.")] = DeviceName.AUTO,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where run folders shall lie.")] = Path("runs"),
    as_json: Json = False,
) -> int:
    """Find what would stop or spoil a run on this machine.

    Each finding says what mends it.
    """
    from ltecli.commands.doctor import doctor_command

    return doctor_command(run, device.value, launch, out, as_json)


@app.command(cls=OnceCommand)
@guarded
def store(
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen at, one address of this machine.")],
    secret_file: Annotated[
        Path | None, typer.Option(help="File with the secret of the run (else LTE_SECRET); not on loopback.")
    ] = None,
    trust_network: Annotated[
        bool, typer.Option("--trust-network", help="Accept an address that is not private.")
    ] = False,
) -> None:
    """Keep the store of launched runs on a machine of its own, so that no node is needed, until Ctrl-C."""
    from ltecli.console import Output
    from simulate.launch.lasting_store import serve_store
    from simulate.launch.preflight.secret import read_secret

    serve_store(listen, read_secret(secret_file), trust_network, Output().hint)


@app.command(cls=OnceCommand)
@guarded
def secret(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File to write; it must not exist.")],
) -> int:
    """Make the secret that the nodes of a launched run share."""
    from ltecli.commands.launch import secret_command

    return secret_command(path)


@app.command(cls=OnceCommand)
@guarded
def invite(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run.toml.", autocompletion=completion.runs)],
    node: Annotated[str, typer.Option("--for", metavar="NODE", help="Node to invite: node1, node2, ...")],
    nodes: Annotated[int | None, typer.Option(help="Machines that take part; default: one a device.", min=1)] = None,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Node 0, as others reach it; default: this machine.")
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option(help="The run's secret (else LTE_SECRET, or lte.secret beside run.toml, made if needed)."),
    ] = None,
    wireguard: Annotated[
        str | None,
        typer.Option(metavar="HOST[:PORT]", help="Add a WireGuard tunnel to node 0, which has this public address."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; default: nodeK.invite.json.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Write the one file by which another machine joins a launched run.

    It holds the run and its secret (mode 0600), and digests of data and code.
    """
    from ltecli.commands.invite import InviteArgs, invite_command
    from ltecli.console import Output

    args = InviteArgs(node, nodes, address, secret_file, wireguard, out)
    return invite_command(run, args, Output(as_json, quiet or as_json))


@app.command(cls=OnceCommand)
@guarded
def join(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file that lte invite wrote.")],
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Where the run's data lie here; default: node 0's path.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default: runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    check: Annotated[bool, typer.Option("--check", "--dry-run", help="Only check this machine, and end.")] = False,
    device: Annotated[DeviceName, typer.Option(help="Where to train.")] = DeviceName.AUTO,
    processes: Annotated[
        int | None, typer.Option(help="Processes on this machine; default: one a device, GPU or core.", min=1)
    ] = None,
    interface: Annotated[str | None, typer.Option(help="The only network interface to use.")] = None,
    trust_network: Annotated[
        bool, typer.Option("--trust-network", help="Accept an address that is not private.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Take part in a launched run that this machine was invited to.

    Versions, code and data are compared with node 0's first.
    """
    from ltecli.commands.join import JoinArgs, join_command
    from ltecli.console import Output

    args = JoinArgs(data, out, resume, device.value, check)
    return join_command(file, args, Output(as_json, quiet or as_json), processes, interface, trust_network)


@app.command(cls=OnceCommand)
@guarded
def report(
    ctx: typer.Context,
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Run folders, or a sweep's; several are compared.",
            autocompletion=completion.run_folders,
        ),
    ],
    html: Html = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write all evaluations as CSV; - for stdout.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --html and --csv replace existing files.")] = False,
    as_json: Json = False,
) -> None:
    """Show planned, simulated and measured figures side by side."""
    from ltecli.commands.report import ReportFiles, report_command

    report_command(runs, as_json, ReportFiles(html, csv, force, _command_line(ctx)))


@app.command(cls=OnceCommand)
@guarded
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that trains, or will.")],
    once: Annotated[bool, typer.Option("--once", help="Print the present state and end.")] = False,
    as_json: Json = False,
) -> int:
    """Show what a run does now, live, from another terminal.

    In a pipe, each change is a line.
    """
    from ltecli.commands.watch import watch_command

    return watch_command(run, once, as_json)


SetMany = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUES", help="Values to try of a run.toml key: method.rank=8,16; repeat."),
]
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each, with seeds counted up from the run's.")]
Parallel = Annotated[
    int | None, typer.Option(min=1, help="Runs at a time; default: one a core and as memory has room, one on a GPU.")
]
SweepOut = Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default: runs/NAME-sweep or -compare.")]
SkipRefused = Annotated[bool, typer.Option("--skip-refused", help="Leave out what run.toml's rules refuse.")]
IgnoreMemory = Annotated[
    bool, typer.Option("--ignore-memory", help="Simulate even if this machine seems too small for all devices.")
]
PageForce = Annotated[bool, typer.Option("--force", help="Let --html replace an existing file.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say which runs, and how long they take; train nothing.")]


@app.command(cls=OnceCommand)
@guarded
def sweep(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run.toml.")],
    assignments: SetMany = None,
    seeds: Seeds = 1,
    out: SweepOut = None,
    parallel: Parallel = None,
    device: Annotated[DeviceName, typer.Option(help="Where to simulate.")] = DeviceName.AUTO,
    skip_refused: SkipRefused = False,
    ignore_memory: IgnoreMemory = False,
    dry_run: DryRun = False,
    html: Html = None,
    force: PageForce = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Train every combination of values, with several seeds, and print one table.

    The same command goes on where it stopped. Commas within brackets, braces and quotes separate no values.
    """
    from ltecli.commands.sweep import SweepArgs, sweep_command

    args = SweepArgs(
        tuple(assignments or ()), seeds, out, parallel, device.value, skip_refused, ignore_memory, dry_run, html, force
    )
    return sweep_command(run, args, as_json, quiet)


@app.command(cls=OnceCommand)
@guarded
def compare(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run.toml, whose method is the reference.")],
    others: Annotated[str, typer.Option("--with", metavar="METHODS", help="Methods, as ddp,diloco: docs/methods.md.")],
    set_for: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD:KEY=VALUES", help="Set keys of one method: diloco:method.merge_every=20; repeat."),
    ] = None,
    assignments: Set = None,
    seeds: Seeds = 1,
    out: SweepOut = None,
    parallel: Parallel = None,
    device: Annotated[DeviceName, typer.Option(help="Where to simulate.")] = DeviceName.AUTO,
    skip_refused: SkipRefused = False,
    ignore_memory: IgnoreMemory = False,
    dry_run: DryRun = False,
    html: Html = None,
    force: PageForce = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Train a run's method and others on the same network, data and samples, and say who is best by what.

    A rival's keys are those that the planner chooses at the run's batch. The same command goes on where it stopped.
    """
    from ltecli.commands.compare import compare_command
    from ltecli.commands.sweep import SweepArgs

    args = SweepArgs(
        tuple(assignments or ()), seeds, out, parallel, device.value, skip_refused, ignore_memory, dry_run, html, force
    )
    return compare_command(run, others, set_for or (), args, as_json, quiet)


@app.command(cls=OnceCommand)
@guarded
def export(
    run: RunFolder,
    form: Annotated[
        ExportFormat,
        typer.Option("--format", help="safetensors with lte's names, or what transformers loads."),
    ] = ExportFormat.SAFETENSORS,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write; default: RUN/export.")] = None,
    as_json: Json = False,
) -> int:
    """Write the merged model of a run's newest checkpoint."""
    from ltecli.commands.export import export_command

    return export_command(run, form.value, out, as_json)


@app.command(cls=OnceCommand)
@guarded
def sample(
    run: RunFolder,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to go on from.")],
    length: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token each time.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    as_json: Json = False,
) -> int:
    """Let a run's newest weights go on with a text."""
    from ltecli.commands.use import sample_command

    return sample_command(run, prompt, length, temperature, seed, as_json)


@app.command("eval", cls=OnceCommand)
@guarded
def evaluate(
    run: RunFolder,
    data: Annotated[str, typer.Option("--data", "-d", help="Text or images: a file, a folder or a .zip.")],
    field: Annotated[
        str | None, typer.Option(help="Field of .jsonl or Parquet that holds the text; default: the run's.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Score a run's newest weights on other data.

    All of a text counts; of images the held-out ones.
    """
    from ltecli.commands.use import eval_command

    return eval_command(run, data, field, as_json)


@profile_app.command("list", cls=OnceCommand)
@guarded
def profile_list(as_json: Json = False) -> None:
    """List the shipped profiles, and `local`: this machine."""
    from ltecli.commands.profile import list_command

    list_command(as_json)


@profile_app.command("show", cls=OnceCommand)
@guarded
def profile_show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A shipped profile, `local`, or a path to profile.toml.",
            autocompletion=completion.profile_names,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Print a profile as TOML, with the source of every figure."""
    from ltecli.commands.profile import show_command

    show_command(name, as_json)


@profile_app.command("check", cls=OnceCommand)
@guarded
def profile_check(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A profile.toml, or a shipped one.", autocompletion=completion.profile_names
        ),
    ],
    as_json: Json = False,
) -> int:
    """Print a profile in plain units, and point at slips."""
    from ltecli.commands.profile import check_command

    return check_command(name, as_json)


@profile_app.command("measure", cls=OnceCommand)
@guarded
def profile_measure(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write it to a .toml; default: print it.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Half a minute at most, with fewer sizes.")] = False,
    devices: Annotated[int, typer.Option("--devices", "-n", min=1, help="Devices like this one in the profile.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Processor threads; default: torch's.")] = None,
    device: Annotated[DeviceName, typer.Option(help="Device to measure.")] = DeviceName.AUTO,
    link: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Measure the link to a peer's `lte profile serve`, too.")
    ] = None,
    link_from: LinkFrom = None,
    secret_file: SecretFile = None,
    force: Annotated[bool, typer.Option("--force", help="Let -o replace an existing file.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine, and write a profile for plans."""
    from ltecli.commands.measure import MeasureArgs, measure_command

    request = MeasureArgs(quick, devices, threads, device.value, link, secret_file, link_from)
    measure_command(request, out, force, as_json, quiet)


@profile_app.command("serve", cls=OnceCommand)
@guarded
def profile_serve(
    interface: Annotated[str, typer.Option(help="The only interface to listen on: eth0, wlan0, lo.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 29511,
    secret_file: SecretFile = None,
) -> None:
    """Answer `lte profile measure --link` on another machine, until Ctrl-C."""
    from ltecli.commands.measure import serve_command

    serve_command(interface, port, secret_file)


def _open_closed_streams() -> None:
    """Put nothing in place of streams that whoever started this process has closed, as services do."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


@lru_cache(maxsize=1)
def _command() -> Any:
    """Return all commands with their options, built once: a process may call `main` many times."""
    return typer.main.get_command(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `lte` command; returns the exit code."""
    _open_closed_streams()
    # Tables and curves use characters beyond ASCII, which the locale of a bare container refuses.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    set_defaults_of_libraries()
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        Path.cwd()
    except FileNotFoundError:  # libraries would end the process with words about themselves
        sys.stderr.write("lte: the current folder was removed; cd to one that exists\n")
        return BAD_INPUT
    try:
        completion.join_words_of_bash()
        # Without standalone mode typer raises mistakes to us, where it would print them in its own form and exit.
        with stdout_checked():
            code = int(_command()(given or ["--help"], prog_name="lte", standalone_mode=False, obj=given) or 0)
    except StdoutError as error:
        code = report_stdout_error(error)
    except USAGE_ERROR as error:
        message = one_line(error.format_message())  # type: ignore[attr-defined]
        # Only mistakes within a command know which one it was.
        context = getattr(error, "ctx", None)
        sys.stderr.write(f"lte: {message.rstrip('.')}; see {context.command_path if context else 'lte'} --help\n")
        return BAD_INPUT
    exit_if_stuck(code)
    return code


def script() -> NoReturn:
    """Run the command line as a program."""
    code = main()
    if code == INTERRUPTED:
        end_process(code)
    sys.exit(code)
