"""The typer app: parse, call, render. Bodies import what they need, so that --help and plan stay light."""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ltecli.errors import BAD_INPUT, guarded, leave_at_once_if_stuck, one_line
from simulate.common.gc_paused import collector_paused
from simulate.common.version import version as lte_version

app = typer.Typer(
    name="lte",
    help="Plan, train and report LoRA-the-Explorer pre-training on small, old or far-apart GPUs.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
profile_app = typer.Typer(help="Look at hardware profiles, or measure one.", rich_markup_mode=None)
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
"""What every mistake in options and arguments derives from; older typers take it from click, newer ones bring it."""
app.add_typer(profile_app, name="profile")


class DeviceName(str, enum.Enum):
    """Where tensors live."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class ExportFormat(str, enum.Enum):
    """How an exported model is written."""

    SAFETENSORS = "safetensors"
    HF = "hf"


Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any run.toml key: method.rank=16")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no hints.")]
ProfileName = Annotated[
    str | None, typer.Option("--profile", "-p", help="A shipped profile, `local`, or a path to profile.toml.")
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="gpt, gpt2, llama_60m, vit_s16, mixer_s16, ...: see docs/models.md.")
]
DataPath = Annotated[str | None, typer.Option("--data", "-d", help="Text or images: a file, a folder or a .zip.")]
SecretFile = Annotated[
    Path | None, typer.Option(help="File with the secret that both ends share (else LTE_SECRET); not on loopback.")
]
LinkFrom = Annotated[
    Path | None, typer.Option(metavar="RUN", help="Take the link that the nodes of a launched run measured.")
]
Devices = Annotated[int | None, typer.Option("--devices", "-n", help="Devices to use; default: all of the profile.")]
Tokens = Annotated[int | None, typer.Option("--tokens", help="Tokens to train on; default: 20 a parameter.")]
Samples = Annotated[int | None, typer.Option("--samples", help="The same for models of images: images to train on.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lte {lte_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Plan, train and report LoRA-the-Explorer pre-training on small, old or far-apart GPUs."""


@app.command()
def plan(
    profile: ProfileName = None,
    model: Model = None,
    data: DataPath = None,
    devices: Devices = None,
    tokens: Tokens = None,
    samples: Samples = None,
    method: Annotated[str | None, typer.Option(help="Pin the method, any of docs/methods.md.")] = None,
    rank: Annotated[int | None, typer.Option(help="Pin the rank of one head.")] = None,
    heads_per_device: Annotated[int | None, typer.Option(help="Pin the heads of one device.")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Pin the frozen weights' format: none, bf16, int8, nf4 or nf4-double.")
    ] = None,
    merge_every: Annotated[int | None, typer.Option(help="Pin the steps between merges.")] = None,
    assignments: Set = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the choice as run.toml.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Let -o replace an existing file.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Candidates to show.")] = 8,
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
    verify: Annotated[
        bool, typer.Option("--verify", help="Follow the choice's own training without numbers, to check its memory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Work out what fits and what it costs, and choose; writes nothing without -o."""
    with collector_paused():
        from ltecli.commands.plan import plan_command
        from ltecli.plan_request import PlanArgs

    asked = why or timeline or rounds is not None or timeline_svg is not None
    request = PlanArgs(
        profile=profile,
        model=model,
        data=data,
        devices=devices,
        tokens=tokens,
        samples=samples,
        objective=objective,
        within=within,
        efficiency=efficiency,
        pins={
            "name": method,
            "rank": rank,
            "heads_per_device": heads_per_device,
            "quantize": quantize,
            "merge_every": merge_every,
        },
        assignments=tuple(assignments or ()),
        probe=probe,
        link_from=link_from,
    )

    def command() -> int:
        extras = None
        if asked:
            from ltecli.commands.explain import ExplainArgs

            extras = ExplainArgs(why, timeline, rounds, timeline_svg, force)
        return plan_command(request, out, force, top, as_json, extras, verify)

    raise typer.Exit(guarded(command))


@app.command("probe")
def probe_a_run(
    run: Annotated[Path, typer.Argument(help="run.toml.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write what was found as probe.json.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Let -o replace an existing file.")] = False,
    batches: Annotated[int, typer.Option(min=1, help="Steps whose batches give gradients, at each of two points.")] = 8,
    warmup: Annotated[int, typer.Option(min=1, help="Dense steps between them.")] = 50,
    layers: Annotated[bool, typer.Option("--layers", help="Show every adapted layer.")] = False,
    device: Annotated[DeviceName, typer.Option(help="Where to probe.")] = DeviceName.AUTO,
    assignments: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Estimate rank, heads and batch from a few gradients and a short dense warm-up."""
    from ltecli.commands.probe import ProbeArgs, probe_command

    options = ProbeArgs(batches, warmup, tuple(assignments or ()))
    raise typer.Exit(guarded(lambda: probe_command(run, options, out, force, layers, device.value, as_json, quiet)))


@app.command()
def validate(
    only: Annotated[str | None, typer.Option(help="One section: memory, bytes or time.")] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", "-p", help="A measured profile of this machine, for times.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller runs: about half a minute.")] = False,
    shapes: Annotated[int | None, typer.Option(min=1, help="Random runs of each kind.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random runs.")] = 0,
    family: Annotated[
        str | None, typer.Option(help="Of their networks: gpt, llama, vit or mixer; default: all.")
    ] = None,
    autocast: Annotated[str, typer.Option(help="Format of their matrix products: none, bf16 or fp16.")] = "none",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the tables as markdown.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Set predictions of memory, bytes and time beside what happens on this machine."""
    from ltecli.commands.validate import ValidateArgs, validate_command

    asked = ValidateArgs(quick, shapes, seed, family, autocast)
    raise typer.Exit(guarded(lambda: validate_command(only, asked, out, as_json, quiet, profile)))


@app.command()
def train(
    run: Annotated[Path | None, typer.Argument(help="run.toml, or a run folder; default: plan one now.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default: runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    data: DataPath = None,
    device: Annotated[DeviceName, typer.Option(help="Where to simulate.")] = DeviceName.AUTO,
    diagnostics: Annotated[
        bool, typer.Option("--diagnostics", help="Diagnose heads and gradients as often as it is evaluated.")
    ] = False,
    launch: Annotated[
        bool, typer.Option("--launch", help="Train for real: a process for each device, here or on several machines.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(help="With --launch: processes on this machine; default: one a device.", min=1)
    ] = None,
    nodes: Annotated[int, typer.Option(help="With --launch: machines that take part.", min=1)] = 1,
    node: Annotated[int | None, typer.Option(help="With --launch: which of them this is, from 0.", min=0)] = None,
    join: Annotated[str | None, typer.Option(help="With --launch: HOST:PORT of node 0.")] = None,
    interface: Annotated[str | None, typer.Option(help="With --launch: network interface to use; no other is.")] = None,
    secret_file: Annotated[
        Path | None, typer.Option(help="With --launch: file with the secret that nodes share (else LTE_SECRET).")
    ] = None,
    trust_network: Annotated[
        bool, typer.Option("--trust-network", help="With --launch: accept an address that is not private.")
    ] = False,
    assignments: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Simulate the run's devices in this process, or launch them for real; Ctrl-C saves and leaves."""
    from ltecli.commands.launch import launch_options
    from ltecli.commands.train import TrainArgs, train_command

    changes = TrainArgs(data, tuple(assignments or ()), diagnostics)

    def command() -> int:
        options = launch_options(launch, processes, nodes, node, join, interface, secret_file, trust_network)
        return train_command(run, out, resume, device.value, changes, options, as_json, quiet)

    raise typer.Exit(guarded(command))


@app.command()
def secret(
    path: Annotated[Path, typer.Argument(help="File to write; it must not exist.")],
) -> None:
    """Make the secret that the nodes of a launched run share."""
    from ltecli.commands.launch import secret_command

    raise typer.Exit(guarded(lambda: secret_command(path)))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are set side by side.")],
    as_json: Json = False,
) -> None:
    """Set planned, simulated and measured figures side by side."""
    from ltecli.commands.report import report_command

    raise typer.Exit(guarded(lambda: report_command(runs, as_json)))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    form: Annotated[
        ExportFormat, typer.Option("--format", help="safetensors with our names, or what transformers loads.")
    ] = ExportFormat.SAFETENSORS,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write; default: RUN/export.")] = None,
    as_json: Json = False,
) -> None:
    """Write the merged model of a run's newest checkpoint."""
    from ltecli.commands.export import export_command

    raise typer.Exit(guarded(lambda: export_command(run, form.value, out, as_json)))


@profile_app.command("list")
def profile_list(as_json: Json = False) -> None:
    """List the shipped profiles, and `local`: this machine."""
    from ltecli.commands.profile import list_command

    raise typer.Exit(guarded(lambda: list_command(as_json)))


@profile_app.command("show")
def profile_show(
    name: Annotated[str, typer.Argument(help="A shipped profile, `local`, or a path to profile.toml.")],
    as_json: Json = False,
) -> None:
    """Print a profile as TOML, with the source of every figure."""
    from ltecli.commands.profile import show_command

    raise typer.Exit(guarded(lambda: show_command(name, as_json)))


@profile_app.command("measure")
def profile_measure(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write it to a .toml; default: print it.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Half a minute at most, with fewer sizes.")] = False,
    devices: Annotated[int, typer.Option("--devices", "-n", min=1, help="Devices like this one in the profile.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Processor threads; default: as torch takes.")] = None,
    device: Annotated[DeviceName, typer.Option(help="What to measure.")] = DeviceName.AUTO,
    link: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Measure the link to a peer's `lte profile serve`, too.")
    ] = None,
    link_from: LinkFrom = None,
    secret_file: SecretFile = None,
    force: Annotated[bool, typer.Option("--force", help="Let -o replace an existing file.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine, and write a profile that plans go by."""
    from ltecli.commands.measure import MeasureArgs, measure_command

    request = MeasureArgs(quick, devices, threads, device.value, link, secret_file, link_from)
    raise typer.Exit(guarded(lambda: measure_command(request, out, force, as_json, quiet)))


@profile_app.command("serve")
def profile_serve(
    interface: Annotated[str, typer.Option(help="The interface to listen on, and no other: eth0, wlan0, lo.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 29511,
    secret_file: SecretFile = None,
) -> None:
    """Answer `lte profile measure --link` on another machine, until Ctrl-C."""
    from ltecli.commands.measure import serve_command

    raise typer.Exit(guarded(lambda: serve_command(interface, port, secret_file)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `lte` command; returns the exit code."""
    # Tables and curves use characters beyond ASCII, which a bare container's locale would refuse.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    # Before anything imports torch, which a plan of somebody's own network does as well. Kineto announces every trace.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Looking for plugins, pydantic would read what every installed package says of itself.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # Threads that spin while they wait for each other stand still beside anybody else's work: tens of times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = int(app(given or ["--help"], prog_name="lte", standalone_mode=False) or 0)
        leave_at_once_if_stuck(code)
        return code
    except USAGE_ERROR as error:
        message = one_line(error.format_message())  # type: ignore[attr-defined]
        context = getattr(error, "ctx", None)
        sys.stderr.write(f"lte: {message.rstrip('.')}; see {context.command_path if context else 'lte'} --help\n")
        return BAD_INPUT
