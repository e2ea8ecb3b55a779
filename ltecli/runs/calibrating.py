"""Measure this machine after a run or a validation, so that later plans on `local` need not guess its speed.

It happens once on a machine, takes at most 10 s, and never stands before a first step.
"""

from __future__ import annotations

from ltecli.console import Output
from simulate.config.calibration import is_wanted


def calibrate_here(output: Output) -> None:
    """Measure this machine's processor and keep its rates, where that was not done before."""
    if not is_wanted():
        return
    from simulate.measure.machine import calibrate

    output.hint("measuring this machine once, for later plans on `local` (at most 10 s; LTE_CALIBRATE=0 leaves it out)")
    if problem := calibrate(lambda what: None):
        output.hint(problem)
