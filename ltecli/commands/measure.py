"""lte profile measure: measure this machine and its link as a hardware profile. lte profile serve: be the link's peer.

A measured profile makes plans accurate; one from data sheets is a guess. simulate.measure has the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ltecli.console import Output, plain_table
from ltecli.output_paths import check_file, write_file
from simulate.common import toml_io
from simulate.common.errors import InputError
from simulate.common.run_files import PROFILE_FILE
from simulate.common.units import bytes_text
from simulate.config.calibration import keep
from simulate.config.hardware import Link, Profile
from simulate.config.profiles import detect_local

NOISY = 2.0
"""Ratio of 90th percentile to median above which medians are in doubt."""


@dataclass(frozen=True)
class MeasureArgs:
    """Options of a measurement."""

    quick: bool = False
    devices: int = 1
    threads: int | None = None
    device: str = "auto"
    link: str | None = None
    """HOST:PORT of a peer that runs lte profile serve."""
    secret_file: Path | None = None
    link_from: Path | None = None
    """Folder of a launched run that measured its links."""


def measure_command(request: MeasureArgs, out: Path | None, force: bool, as_json: bool, quiet: bool) -> None:
    """Measure this machine, and write or print the profile; raises InputError."""
    output = Output(as_json, quiet)
    if out is not None:
        if out.suffix != ".toml":  # a profile's name is its file's name without .toml
            raise InputError(f"--out {out}: a profile's file ends in .toml; name it {out.name}.toml")
        check_file(out, force, PROFILE_FILE)
    # The link comes first: a peer that does not answer should not cost a minute of measuring.
    link = _link(request, output)
    from simulate.measure.machine import MeasurementScope, measure_profile

    scope = MeasurementScope(request.quick, request.devices, request.threads, request.device)
    profile = measure_profile(scope, link, lambda what: output.hint(f"measuring {what}"))
    measured = profile.measurement
    # A choice of threads, or a GPU, is not what `local` describes.
    describes_local = measured is not None and measured.device == "cpu" and request.threads is None
    if measured is not None and describes_local and (problem := keep(profile.device[0], measured)):
        output.hint(problem)
    document = profile.model_dump(exclude_none=True)
    if out is not None:
        profile = profile.model_copy(update={"name": out.stem})
        document = profile.model_dump(exclude_none=True)
        write_file(out, toml_io.dump(document))
        _show(profile, output, request.threads)
        output.hint(f"next: lte plan --profile {out}")
    else:
        output.text(toml_io.dump(document).rstrip())
    output.json(document)


def _link(request: MeasureArgs, output: Output) -> Link:
    """Return the measured link to a peer or between a run's nodes, else a guess; raises InputError."""
    # Nothing in this machine shows how fast its links are, so without a measurement they stay a guess.
    guess = detect_local().link
    if request.link is not None and request.link_from is not None:
        raise InputError("--link and --link-from both say where the link's figures come from; keep one")
    if request.link_from is not None:
        from ltecli.runs.measured_link import link_from, link_text

        link = link_from(request.link_from, guess)
        output.hint(f"the link of {request.link_from}: {link_text(link)}")
        return link
    if request.link is None:
        return guess
    from simulate.launch.preflight.link_pair import measure_pair
    from simulate.launch.preflight.secret import read_secret

    link = measure_pair(request.link, read_secret(request.secret_file))
    output.hint(f"measured the link to {request.link}")
    return link


def _show(profile: Profile, output: Output, threads: int | None) -> None:
    """Print the measured figures, and a warning where they vary much; `threads` is --threads."""
    device, measurement = profile.device[0], profile.measurement
    assert device.kernels is not None
    assert measurement is not None
    table = plain_table("measured", "from", "to")
    kernels = device.kernels
    rows = [
        ("products", "FLOP/s", kernels.products), ("attention", "FLOP/s", kernels.attention),
        ("attention, not causal", "FLOP/s", kernels.full_attention or []), ("elementwise", "B/s", kernels.elementwise),
        *((f"elementwise, {family}", "B/s", points) for family, points in kernels.elementwise_of.items()),
        ("optimizer", "B/s", kernels.optimizer),
    ]  # fmt: skip
    for name, unit, points in rows:
        rates = [rate / 1e9 for _, rate in points]
        table.add_row(name, f"{min(rates):.3g} G{unit}", f"{max(rates):.3g} G{unit}")
    output.table(table)
    memory, disk = bytes_text(int(device.memory_bytes_per_s)), bytes_text(int(measurement.disk_write_bytes_per_s))
    output.text(f"memory {memory}/s, disk {disk}/s written; {measurement.threads} threads, {measurement.clock}")
    slowest = max(measurement.p90_s, key=lambda name: measurement.p90_s[name] / measurement.median_s[name])
    spread = measurement.p90_s[slowest] / measurement.median_s[slowest]
    if spread > NOISY:
        instead = "" if threads == 1 else ", or with --threads 1, which counts processor time"
        output.warning(
            f"{slowest}: one time in ten took {spread:.1f} times the median; this machine is busy: measure it idle"
            + instead
        )


def serve_command(interface: str, port: int, secret_file: Path | None) -> None:
    """Answer peers that measure their link to this machine, until Ctrl-C."""
    from simulate.launch.preflight.link_pair import serve_pairs
    from simulate.launch.preflight.secret import read_secret

    output = Output()
    serve_pairs(interface, port, read_secret(secret_file), output.hint)
