"""Planned against measured seconds of steps that no calibration used, by a profile measured right before.

    python bench/studies/step_time.py                 # measures this machine, then twelve held-out steps
    python bench/studies/step_time.py mine.toml       # by a profile that `lte profile measure` wrote here

With `--threads 1` seconds are processor time, which other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import statistics
import sys

from simulate.config.profiles import detect_local, load_profile
from simulate.measure.machine import MeasurementScope, measure_profile
from simulate.measure.step_times import held_out_times, quantized_cases


def main() -> None:
    """Print a Markdown table, the mean and the worst error, and the share of steps that take longer than planned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", nargs="?")
    parser.add_argument("--quick", action="store_true", help="a quick measurement and four steps")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quantized", action="store_true", help="steps over frozen weights in each format instead")
    arguments = parser.parse_args()
    if arguments.profile:
        profile = load_profile(arguments.profile)
    else:
        scope = MeasurementScope(quick=arguments.quick, threads=arguments.threads)
        profile = measure_profile(scope, detect_local().link, lambda what: print(what, file=sys.stderr))
    rows = held_out_times(profile, arguments.quick, quantized_cases() if arguments.quantized else None)
    print("| step | planned | measured | error |\n|---|---|---|---|")
    errors = [planned / measured - 1 for _, planned, measured in rows]
    for (name, planned, measured), error in zip(rows, errors, strict=True):
        print(f"| {name} | {planned * 1e3:.2f} ms | {measured * 1e3:.2f} ms | {error:+.1%} |")
    under = sum(error < 0 for error in errors) / len(errors)
    mean, worst = statistics.mean(map(abs, errors)), max(errors, key=abs)
    print(f"\nmean error {mean:.1%}, worst {worst:+.1%}, {under:.0%} planned too short")


if __name__ == "__main__":
    main()
