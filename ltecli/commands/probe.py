"""lte probe: take a few gradients and a short dense warm-up of a run, and recommend rank, heads and batch from them.

The spectra of gradients and weight updates show the rank that training needs, before any device-days are spent.
simulate.probe measures and recommends; this module checks memory, prints, and writes probe.json for lte plan --probe.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltecli.console import Output, plain_table
from ltecli.output_paths import check_file, write_file
from simulate.common.errors import InputError
from simulate.common.limits import usable_memory
from simulate.common.progress import reported_by
from simulate.common.units import bytes_text
from simulate.config.method_table import BASELINE, default_options
from simulate.config.profiles import detect_local
from simulate.config.run import Run, load_given_run
from simulate.costs.memory import peak_memory
from simulate.data.load import load_data
from simulate.layers.formats import ELEMENT_BYTES
from simulate.probe.schema import Estimate, Probe, Spectrum, dump_probe

DOUBLE_BYTES = 8
DECOMPOSED = 6
"""Copies of the largest layer, in double precision, that a singular value decomposition holds at its peak."""


@dataclass(frozen=True)
class ProbeArgs:
    """Options of a probe."""

    batches: int
    """Steps whose gradients are taken, before the warm-up and again after it."""
    warmup_steps: int
    """Dense steps of the warm-up."""
    assignments: Sequence[str] = ()
    """Changes of run.toml, as table.key=value."""


def probe_command(
    given: Path, options: ProbeArgs, out: Path | None, force: bool, with_layers: bool, device_name: str,
    as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Probe a run, print the findings, and write them to `out`; returns the exit code."""
    output = Output(as_json, quiet or as_json)
    if out is not None:
        check_file(out, force, "probe.json")
    run = load_given_run(given, options.assignments)
    if run.cluster.classes:
        raise InputError("cluster.class: a probe takes gradients of equal devices; leave the classes away for it")
    need = needed_bytes(run)
    output.hint(
        f"derived: {options.batches} x {run.samples_per_step} samples of gradients twice, {options.warmup_steps} dense "
        f"steps of {run.samples_per_step} samples, up to about {bytes_text(need)} of memory"
    )
    # Data take seconds to load, torch to import: refuse before.
    _check_memory(need, device_name, output)
    with reported_by(output.progress):
        data = load_data(run)
    from simulate.data.batches import build_batches
    from simulate.layers.accelerator import choose
    from simulate.probe.spectra import probe_run

    device = choose(device_name)
    batches = build_batches(run, data, device)
    probe = probe_run(run, batches, device, data.source, options.batches, options.warmup_steps, output.hint)
    if out is not None:  # before it is printed: a reader may leave early, as head does
        write_file(out, dump_probe(probe))
    output.json(probe.model_dump())
    _show(probe, output, with_layers)
    if out is not None:
        output.hint(f"wrote {out}; next: lte plan --probe {out}")
    else:
        output.hint("next: lte probe ... -o probe.json, then lte plan --probe probe.json")
    return 0


def needed_bytes(run: Run) -> int:
    """Return the bytes of a probe: a dense step on all devices' samples, sums of gradients, two snapshots."""
    shape, element_bytes, devices = run.shape(), ELEMENT_BYTES[run.train.dtype], run.cluster.devices
    # One dense device on all devices' samples: the planner's formula of its memory is the probe's, too.
    dense = run.model_copy(
        update={
            "method": default_options(BASELINE),
            "train": run.train.model_copy(update={"micro_batch": run.train.micro_batch * devices}),
            "cluster": run.cluster.model_copy(update={"devices": 1}),
        }
    )
    # What other programs hold is not the probe's; _check_memory compares with what is free.
    one = detect_local().device[0].model_copy(update={"reserved_bytes": 0})
    decomposed = DECOMPOSED * DOUBLE_BYTES * max(linear.weights for linear in shape.adapted)
    kept = (shape.parameters + 2 * shape.adapted_parameters) * element_bytes
    return peak_memory(dense, shape, one).total + kept + decomposed


def _check_memory(need: int, device_name: str, output: Output) -> None:
    """Raise InputError for more memory than this machine has; warn of more than is free."""
    if device_name == "cuda":
        return  # the GPU's allocator raises by itself
    total, free = usable_memory()
    if need > total:
        raise InputError(
            f"the probe needs about {bytes_text(need)}: one dense model with gradients, moments and activations, and "
            f"this machine has {bytes_text(total)}; try a lower --set train.micro_batch, or a smaller model"
        )
    if need > free:
        output.warning(f"the probe needs about {bytes_text(need)}, and {bytes_text(free)} are free")


def _show(probe: Probe, output: Output, with_layers: bool) -> None:
    model, settings = probe.network, probe.settings
    output.heading(
        f"{model.name}: {model.parameters:,} parameters ({model.adapted_parameters:,} adapted in "
        f"{len(probe.layers)} layers), {probe.data.source}, seed {settings.seed}"
    )
    output.table(_states_table(probe))
    if with_layers:
        output.text("")
        output.text(
            "ranks that hold 50 % / 90 % of the squared norm; signal and noise scale (samples) after the warm-up"
        )
        output.table(_layers_table(probe), secondary=("signal", "noise scale"))
    advice = probe.recommendation
    assert advice is not None
    output.text("")
    output.heading(f"recommended for {settings.heads} heads on {settings.devices} devices (estimates)")
    table = plain_table("", "estimate", "range")
    advised = {"rank of a head": advice.rank, "heads": advice.heads, "batch of all devices": advice.batch_samples}
    for name, figure in advised.items():
        table.add_row(name, *_estimate_cells(figure))
    output.table(table)
    for sentence in advice.reasoning:
        output.text(f"- {sentence}")


def _estimate_cells(figure: Estimate | None) -> tuple[str, str]:
    if figure is None:
        return "-", "too noisy to estimate"
    return f"{figure.estimate:.0f}", f"{figure.low:.0f} to {figure.high:.0f}"


def _states_table(probe: Probe) -> Any:
    """Return a table of the two states whose gradients were taken; ranks are medians and ranges over layers."""
    states = (probe.initial, probe.warmed)
    table = plain_table("", *(f"after {state.steps} steps" for state in states))
    table.add_row("loss", *(f"{state.loss:.4f}" for state in states))
    scales = (state.noise for state in states)
    table.add_row("noise scale, samples", *(_scale_text(n.scale_samples) for n in scales))
    table.add_row("signal in the mean gradient", *(f"{state.noise.signal_share:.0%}" for state in states))
    gradients = ([layer.initial for layer in probe.layers], [layer.warmed for layer in probe.layers])
    for name, key in (("effective rank", "effective_rank"), ("stable rank", "stable_rank"),
                      ("rank that holds 50 %", "rank_50"), ("rank that holds 90 %", "rank_90")):  # fmt: skip
        cells = (_spread_text([getattr(g.spectrum, key) for g in layers if g.spectrum]) for layers in gradients)
        table.add_row(f"gradient: {name}, median (layers)", *cells)
    steps = probe.settings.round_steps
    for what, name in ((f"update of {steps} steps", "round_update"), ("update of the warm-up", "update")):
        spectra: list[Spectrum] = [s for layer in probe.layers if (s := getattr(layer, name)) is not None]
        for share, key in (("50 %", "rank_50"), ("90 %", "rank_90"), ("99 %", "rank_99")):
            table.add_row(f"{what}: rank that holds {share}", "", _spread_text([getattr(s, key) for s in spectra]))
    return table


def _spread_text(ranks: Sequence[float]) -> str:
    return f"{statistics.median(ranks):.0f} ({min(ranks):.0f} to {max(ranks):.0f})" if ranks else "-"


def _scale_text(scale: float | None) -> str:
    return "too noisy" if scale is None else f"{scale:.1f}"


def _layers_table(probe: Probe) -> Any:
    """Return a table of each layer's ranks that hold 50 % / 90 % of the squared norm."""
    table = plain_table(
        "layer",
        "shape",
        "gradient at the start",
        "after the warm-up",
        "signal",
        "noise scale",
        "update of a round",
        "of the warm-up",
    )
    for layer in probe.layers:
        table.add_row(
            layer.name,
            f"{layer.outputs} x {layer.inputs}",
            _ranks_text(layer.initial.spectrum),
            _ranks_text(layer.warmed.spectrum),
            f"{layer.warmed.noise.signal_share:.0%}",
            _scale_text(layer.warmed.noise.scale_samples),
            _ranks_text(layer.round_update),
            _ranks_text(layer.update),
        )
    return table


def _ranks_text(spectrum: Spectrum | None) -> str:
    return "-" if spectrum is None else f"{spectrum.rank_50} / {spectrum.rank_90}"
