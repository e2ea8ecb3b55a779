"""The link that a launched run's nodes measured before they began, in place of a profile's link."""

from __future__ import annotations

from pathlib import Path

from ltecli.runs.figures import RunRecord, read_run
from simulate.common.errors import InputError
from simulate.common.run_files import EVENTS_FILE
from simulate.config.hardware import Link
from simulate.launch.preflight.channel import BadFrameError
from simulate.launch.preflight.link_figures import LinkFigures, measured_link, parse_link, rate_text


def link_from(run: Path, planned: Link) -> Link:
    """Return `planned` with the figures that a run measured; raises InputError for a run that measured none."""
    return measured_link(_ring_links(read_run(run)), planned)


def link_text(link: Link) -> str:
    """Return the measured figures, for people."""
    return f"{rate_text(link.up_bytes_per_s)} on its slowest edge, {link.latency_s * 1e3:.3g} ms on its farthest"


def _ring_links(record: RunRecord) -> list[LinkFigures]:
    """Return the ring's links as the newest launch measured them; raises InputError."""
    # Every launch on several nodes measures anew; the newest figures count.
    event = record.last("links")
    if event is None:
        started = record.last("start")
        launched = started is not None and "processes" in started
        raise InputError(
            f"--link-from {record.path}: was "
            + ("launched on one machine" if launched else "simulated in one process")
            + ", where there is no link to measure; name a run of lte train --launch --nodes N, or see lte profile "
            "measure --link"
        )
    try:
        links = [parse_link(edge) for edge in event["links"]]
        if not links:
            raise BadFrameError("has none")
    except (BadFrameError, KeyError, TypeError) as error:
        where = record.path / EVENTS_FILE
        raise InputError(f"{where}: its links event is damaged ({error}); restore the file") from None
    return links
