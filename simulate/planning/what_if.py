"""Simulate a plan's choice on a timeline, and answer what other hardware would change.

The closed forms of a plan assume equal, steady devices. Here rounds are simulated with each device's jitter and
absences, and again with more devices, better links and faster devices, to show which purchase pays. `lte plan
--timeline` calls look_ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from simulate.config.hardware import Device, Link, Profile
from simulate.config.run import Run
from simulate.costs.message_schedule import num_rounds
from simulate.costs.samples import samples_factor
from simulate.costs.step_time import round_time
from simulate.planning.candidate import Candidate
from simulate.planning.planner import Plan
from simulate.planning.search_space import train_for
from simulate.rules.churn import away_share, redo_factor
from simulate.timeline.engine import Timeline, simulate

ROUNDS = 100
"""Rounds to simulate unless the user asks for another number."""
COMPARED_ROUNDS = 20
"""Rounds to simulate of each alternative."""
WORTH_GAIN = 1.1
"""Smallest speedup at which doubling the devices is worth it."""
MOST_DEVICES = 2**17
"""Most devices that doublings reach."""
UPGRADE_MATTERS = 1.01
"""Smallest speedup of an upgrade that is reported."""
CHURN_PER_HOUR, JOIN_S = 0.02, 60.0
"""Assumed chance that a device leaves within an hour, and seconds until it is back where the profile has none."""
DRAWN_DEVICES, DRAWN_ROUNDS = 6, 3
"""Most devices and rounds that the chart shows."""


@dataclass(frozen=True)
class Doubling:
    """The same method on twice the devices of the previous row."""

    devices: int
    equivalent_wall_s: float
    gain: float


@dataclass(frozen=True)
class Upgrade:
    """One figure of the profile, doubled (a latency: halved), and the run's speedup."""

    what: str
    speedup: float


@dataclass(frozen=True)
class Churn:
    """Cost of devices that leave; both factors multiply the time of a run that no device leaves."""

    leave_per_hour: float
    join_s: float
    elastic_factor: float
    """Factor where the other devices continue without the lost one."""
    redo_factor: float | None
    """Factor where a round with a loss is repeated; None where the run would never end."""
    drops_lost: bool
    """Whether the run, launched, goes on without lost devices, since it has a quorum; else it repeats the round."""


@dataclass(frozen=True)
class Outlook:
    """All answers of --timeline."""

    timeline: Timeline
    planned_s: float
    """Seconds of the same rounds by the closed form: no jitter, and no device leaves."""
    run_wall_s: float
    """Seconds of the whole run: rounds at the simulated pace, evaluations and checkpoints."""
    doublings: tuple[Doubling, ...]
    worth_devices: int
    upgrades: tuple[Upgrade, ...]
    churn: Churn

    def to_dict(self) -> dict[str, Any]:
        """Return the answers as the plan's JSON has them."""
        timeline = self.timeline
        return {
            "devices": timeline.devices,
            "rounds": timeline.rounds,
            "steps": timeline.steps,
            "wall_s": timeline.wall_s,
            "planned_wall_s": self.planned_s,
            "run_wall_s": self.run_wall_s,
            "device_s": timeline.seconds,
            "device_steps": timeline.device_steps,
            "leaves": timeline.leaves,
            "worth_devices": self.worth_devices,
            "worth_gain": WORTH_GAIN,
            "doublings": [asdict(doubling) for doubling in self.doublings],
            "upgrades": [asdict(upgrade) for upgrade in self.upgrades],
            "churn": asdict(self.churn),
            "spans": [asdict(span) for span in timeline.spans],
        }


def look_ahead(plan: Plan, chosen: Candidate, rounds: int) -> Outlook:
    """Simulate the choice's first rounds, and those of its alternatives."""
    run, profile = chosen.run, plan.profile
    devices = profile.devices(run.cluster.devices)
    drawn = representatives(devices)
    timeline = simulate(run, devices, profile.link, rounds, drawn, DRAWN_ROUNDS)
    steps = run.model_copy(update={"train": run.train.model_copy(update={"steps": timeline.steps})})
    time = round_time(steps, run.shape(), devices, profile.link)
    doublings = tuple(_doublings(chosen, profile, devices))
    worth = [doubling.devices for doubling in doublings if doubling.gain >= WORTH_GAIN]
    return Outlook(
        timeline=timeline,
        planned_s=timeline.steps * time.compute_s + num_rounds(steps) * (time.merge_s + time.exchange_s),
        run_wall_s=timeline.wall_s * run.train.steps / timeline.steps + chosen.eval_and_save.total_s,
        doublings=doublings,
        worth_devices=max(worth, default=len(devices)),
        upgrades=tuple(sorted(_upgrades(run, devices, profile.link), key=lambda upgrade: -upgrade.speedup)),
        churn=_churn(devices, timeline, run.cluster.drops_lost),
    )


def representatives(devices: Sequence[Device]) -> list[int]:
    """Return a few devices to draw: the first of each kind, then others evenly spread."""
    # Reversed, so that the first device of a kind is the last one written.
    firsts = list({device.kind: index for index, device in reversed(list(enumerate(devices)))}.values())
    count = min(DRAWN_DEVICES, len(devices))
    spread = [index * len(devices) // count for index in range(count)]
    chosen = list(dict.fromkeys([*sorted(firsts), *spread]))[:DRAWN_DEVICES]
    return sorted(chosen)


def _equivalent_s(chosen: Candidate, devices: Sequence[Device], link: Link) -> float:
    """Return the seconds to equal loss on other devices, with a batch that grows with them and the same tokens."""
    cluster = chosen.run.cluster
    # Doubled devices are the same ones again, with their classes.
    classes = cluster.classes * (len(devices) // cluster.devices)
    cluster = cluster.model_copy(update={"devices": len(devices), "classes": classes})
    run = chosen.run.model_copy(update={"cluster": cluster})
    train = train_for(
        run, run.train.micro_batch, run.train.accumulate, run.train.activation_checkpointing, chosen.tokens
    )
    run = run.model_copy(update={"train": train})
    timeline = simulate(run, devices, link, COMPARED_ROUNDS)
    # Devices that skip or repeat steps train on fewer samples; the time grows by what is missing.
    trained = timeline.device_steps / len(devices) * run.tokens_per_step
    samples = samples_factor(run, run.shape(), chosen.tokens, chosen.efficiency)
    return timeline.wall_s * samples * chosen.tokens / trained


def _doublings(chosen: Candidate, profile: Profile, devices: tuple[Device, ...]) -> Iterator[Doubling]:
    """Yield twice as many devices, and again, until a doubling is not worth it."""
    before_s, gain = _equivalent_s(chosen, devices, profile.link), WORTH_GAIN
    # Shards and given steps list one number a device, so they fix the number of devices.
    given = chosen.run.method.given_steps or chosen.run.cluster.merges_given
    fixed = chosen.run.data.shards is not None or given is not None
    while not fixed and gain >= WORTH_GAIN and 2 * len(devices) <= MOST_DEVICES:
        devices = devices * 2
        seconds = _equivalent_s(chosen, devices, profile.link)
        gain, before_s = before_s / seconds, seconds
        yield Doubling(len(devices), seconds, gain)


def _upgrades(run: Run, devices: Sequence[Device], link: Link) -> Iterator[Upgrade]:
    """Yield each figure of links and devices with the speedup of doubling it."""
    before_s = simulate(run, devices, link, COMPARED_ROUNDS).wall_s
    for what, changed in _better_links(link):
        yield Upgrade(what, before_s / simulate(run, devices, changed, COMPARED_ROUNDS).wall_s)
    # One copy a kind, since costs group devices by id().
    kinds = {id(device): device.model_copy(update=_twice_as_fast(device)) for device in devices}
    faster = [kinds[id(device)] for device in devices]
    yield Upgrade("devices twice as fast", before_s / simulate(run, faster, link, COMPARED_ROUNDS).wall_s)


def _better_links(link: Link) -> Iterator[tuple[str, Link]]:
    """Yield the link with each of its figures better, in words and as a link; all devices' lines change with it."""
    rates = [key for key, rate in link if key.endswith("bytes_per_s") and rate is not None]
    changes: dict[str, dict[str, float]] = {f"link.{key} x 2": {key: 2 * getattr(link, key)} for key in rates}
    # Either direction alone is often no upgrade: both carry a merge.
    both = ("up_bytes_per_s", "down_bytes_per_s")
    changes["link.up_bytes_per_s and down_bytes_per_s x 2"] = {key: 2 * getattr(link, key) for key in both}
    changes["link.latency_s / 2"] = {"latency_s": link.latency_s / 2}
    for what, update in changes.items():
        up, down = (2.0 if key in update else 1.0 for key in both)
        latency = 0.5 if "latency_s" in update else 1.0
        lines = tuple(line.times(up, down, latency) for line in link.lines)
        yield what, link.model_copy(update=update).with_lines(lines)


def _twice_as_fast(device: Device) -> dict[str, Any]:
    rates = {dtype: rate and 2 * rate for dtype, rate in device.flop_per_s}
    return {
        "flop_per_s": device.flop_per_s.model_copy(update=rates),
        "memory_bytes_per_s": 2 * device.memory_bytes_per_s,
    }


def _churn(devices: Sequence[Device], timeline: Timeline, drops_lost: bool) -> Churn:
    """Return the expected cost of churn for rounds of the simulated length (simulate/rules/churn.py)."""
    join_s = max(device.join_s for device in devices) or JOIN_S
    redo = redo_factor(CHURN_PER_HOUR, join_s, timeline.round_s, len(devices))
    elastic = 1 / (1 - away_share(CHURN_PER_HOUR, join_s, timeline.round_s))
    return Churn(CHURN_PER_HOUR, join_s, elastic, None if redo == float("inf") else redo, drops_lost)
