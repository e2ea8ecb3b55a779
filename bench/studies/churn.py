"""Compare restarting everybody with a quorum, where devices leave while a run goes on.

    python bench/studies/churn.py

Each row is a run of so many Raspberry Pis, a tenth of them five times slower, of which 2 % leave within an hour and are
back after a minute. *Restart* is the closed form of launched runs without a quorum, which repeat a round in which one
leaves (simulate/rules/churn.py), on lockstep's time; *quorum* is the timeline's, event by event. docs/planning.md has
the figures.
"""

from __future__ import annotations

import argparse
import time

from pace import profile_of

from simulate.config.run import build_run
from simulate.rules.churn import redo_factor
from simulate.timeline.engine import Timeline, simulate

LEAVE_PER_HOUR, JOIN_S, JITTER = 0.02, 60.0, 0.1
MODEL = {"name": "gpt", "layers": 2, "width": 64, "attention_heads": 4, "context": 64, "vocab": 256}
SLOWER, TENTH = 5, 10


def timeline_of(devices: int, rounds: int, leave_per_hour: float, **cluster: int) -> Timeline:
    """Return the timeline of a run."""
    profile = profile_of(SLOWER)
    churn = {"leave_per_hour": leave_per_hour, "join_s": JOIN_S, "step_jitter": JITTER}
    fast, slow = (device.model_copy(update=churn) for device in profile.device)
    method = {"name": "lte", "rank": 16, "merge_every": 100, "merge_transport": "server"}
    table = {
        "model": MODEL, "method": method, "train": {"steps": 100 * rounds}, "cluster": {"devices": devices, **cluster},
    }  # fmt: skip
    return simulate(
        build_run(table), (fast,) * (devices - devices // TENTH) + (slow,) * (devices // TENTH), profile.link
    )


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[10, 100, 1_000, 10_000])
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    print("| devices | lockstep, nobody leaves | restart | quorum | of lockstep's samples | left | back | processor |")
    print("|---|---|---|---|---|---|---|---|")
    for devices in arguments.devices:
        still = timeline_of(devices, arguments.rounds, 0.0)
        factor = redo_factor(LEAVE_PER_HOUR, JOIN_S, still.round_s, devices)
        started_s = time.process_time()
        quorum = timeline_of(devices, arguments.rounds, LEAVE_PER_HOUR, quorum=devices // 2 + 1)
        spent_s = time.process_time() - started_s
        share = quorum.device_steps / still.device_steps
        print(
            f"| {devices:,} | {still.wall_s:,.0f} s | {factor * still.wall_s:,.0f} s | {quorum.wall_s:,.0f} s | "
            f"{share:.1%} | {quorum.leaves} | {quorum.joins} | {spent_s:.1f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
