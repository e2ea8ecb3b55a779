"""Launched runs on shaped links: measured beside planned and simulated, and beside PyTorch's own data parallelism.

python -m bench.studies.links --mbit 10 100 1000                 # needs root, `ip` and `tc`
python -m bench.studies.links --mbit 100 --delay-s 0.02 --cases "ddp" "lte T 10"

Nodes are network namespaces of this machine (tests/network/lab.py), one process of one thread each, held to a core, so
that all share the cores alike. The profile's compute is measured first, by rounds without a limit on the links, and its
link is the shaped rate: from these two figures comes every planned one. With `--profile` the compute is what `lte
profile measure` found instead, one of it on each core at once, as the nodes will compute. `whole` launches runs
with evaluations and recovery points, and sets all of their seconds beside the plan's. `losses` trains the cases in one
process, which gives the launched runs' losses, to say how many steps each needs to a loss: seconds to it are those
steps at the measured pace. docs/accuracy.md and bench/README.md have the figures; jitter.py
launches its runs by this module.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.studies.training import train_table
from bench.studies.wire import LAB_LATENCY_S, PAYLOAD_SHARE
from simulate.common import toml_io
from simulate.config.hardware import Profile
from simulate.config.profiles import load_profile
from simulate.config.run import build_run, dump_run
from simulate.costs.step_time import round_time
from simulate.launch.preflight.secret import make_secret
from simulate.planning.candidate import candidate_of
from simulate.planning.planner import evaluate
from tests.network.lab import Lab, Node, why_not

Table = dict[str, Any]

NODES, PORT, TIMEOUT_S = 4, 29600, 3000.0
MODEL: Table = {"name": "gpt", "layers": 6, "width": 384, "attention_heads": 6, "context": 128}
"""10.8 million parameters."""
MICRO_BATCH = 4
YARDSTICK = "torch DDP"
LTE: Table = {"name": "lte", "rank": 96}
CASES: dict[str, Table] = {
    YARDSTICK: {"name": "ddp"},
    "ddp": {"name": "ddp"},
    "powersgd rank 4": {"name": "powersgd", "rank": 4},
    "diloco T 10": {"name": "diloco", "merge_every": 10},
    "diloco T 30": {"name": "diloco", "merge_every": 30},
    "lte T 10": {**LTE, "merge_every": 10},
    "lte T 30": {**LTE, "merge_every": 30},
    "lte T 30, int8": {**LTE, "merge_every": 30, "wire": "int8"},
}
MEASURED_ROUNDS, MEASURED_STEPS = 3, 4
"""Rounds, or steps of methods that exchange at every step, after one that is not counted."""


@dataclass(frozen=True)
class LinkSetting:
    """Settings that all cases share."""

    nodes: int
    delay_s: float
    data: str | None


@dataclass(frozen=True)
class Paced:
    """One case on one kind of link."""

    case: str
    mbit: float
    step_s: float
    """Measured, the median of rounds over their steps."""
    planned_step_s: float
    simulated_step_s: float
    sent_bytes_per_step: float
    """Counted payload of one device."""
    wire_bytes_per_step: float
    """Bytes that crossed a node's interface, the mean of nodes."""
    tokens_per_step: int

    @property
    def tokens_s(self) -> float:
        """Seconds for a million tokens."""
        return self.step_s * 1e6 / self.tokens_per_step


def run_table(case: str, profile: Path | str, steps: int, setting: LinkSetting) -> Table:
    """Return the run of a case."""
    return {
        "model": MODEL,
        "data": {"path": setting.data} if setting.data else {"name": "stdlib"},
        "method": CASES[case],
        "train": {
            "steps": steps, "micro_batch": MICRO_BATCH, "evaluate_every": steps, "evaluate_samples": 16,
            "checkpoint_every": steps, "learning_rate": 2e-3, "warmup_steps": steps // 20,
            "optimizer": "muon" if CASES[case]["name"] == "lte" else "adamw",
        },
        "cluster": {"devices": setting.nodes, "profile": str(profile), "timeout_s": TIMEOUT_S, "recover_every": 10**6},
    }  # fmt: skip


def guessed_node(flop_per_s: float) -> Table:
    """Return a node of the lab as a profile's device, at a rate of operations."""
    device = load_profile("gtx1080ti_x8").model_dump(exclude_none=True)["device"][0]
    rates = {"flop_per_s": {"fp32": flop_per_s}, "efficiency": 1.0, "memory_bytes_per_s": 5e9}
    return {**device, "kind": "one node of the lab", "source": "measured", **rates}


def write_profile(path: Path, device: Table, mbit: float | None, setting: LinkSetting) -> Profile:
    """Write the profile of the lab: what each of its nodes computes, and what its links carry."""
    profile = load_profile("gtx1080ti_x8").model_dump(exclude_none=True)
    link = profile["link"]
    profile["device"] = [{**device, "count": setting.nodes}]
    # Without a limit the links take hardly any time beside the compute that is calibrated.
    rate = 1e10 if mbit is None else mbit * 1e6 / 8 * PAYLOAD_SHARE
    link.update(topology="star", up_bytes_per_s=rate, down_bytes_per_s=rate, latency_s=LAB_LATENCY_S + setting.delay_s)
    link.update(collectives="gloo", source="measured")
    profile["name"] = path.stem
    path.write_text(toml_io.dump(profile), encoding="utf-8")
    return load_profile(str(path))


def _on_its_core(node: Node) -> list[str]:
    cores = sorted(os.sched_getaffinity(0))
    return ["taskset", "-c", str(cores[node.index % len(cores)])]


def launch(lab: Lab, folder: Path, table: Table, setting: LinkSetting) -> list[Table]:
    """Launch a run on all nodes; return its events."""
    run_file = folder / "run.toml"
    run_file.write_text(dump_run(build_run(table)), encoding="utf-8")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "LTE_SECRET": make_secret(), "PYTHONPATH": str(root)}
    # One thread a node, held to one core, so that nodes disturb each other as little as machines would.
    environment["OMP_NUM_THREADS"] = "1"
    command = [
        sys.executable, "-m", "ltecli", "train", str(run_file), "--launch", "--quiet", "--nodes", str(setting.nodes),
        "--processes", "1", "--join", f"{lab[0].address}:{PORT}",
    ]  # fmt: skip
    started = [
        node.popen(
            [*_on_its_core(node), *command, "--node", str(node.index), "--out", str(folder / f"node{node.index}")],
            env=environment, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for node in lab
    ]  # fmt: skip
    errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("\n".join(errors))
    events = (folder / "node0" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in events]


def pace(case: str, mbit: float | None, profile: Profile, path: Path, setting: LinkSetting) -> Paced:
    """Measure a case's step, over whole rounds."""
    run = build_run(run_table(case, path, 100, setting))
    round_steps = run.method.round_steps
    steps = round_steps * (MEASURED_ROUNDS + 1) if round_steps > 1 else MEASURED_STEPS + 1
    bytes_per_s = None if mbit is None else mbit * 1e6 / 8
    with (
        Lab(setting.nodes, bytes_per_s=bytes_per_s, delay_s=setting.delay_s) as lab,
        tempfile.TemporaryDirectory() as folder,
    ):
        if case == YARDSTICK:
            before = [node.counters() for node in lab]
            seconds, sent = _yardstick(lab, steps, setting), 0.0
            crossed = [(node.counters() - earlier).sent_bytes for node, earlier in zip(lab, before, strict=True)]
            simulated = planned_step_s(run, profile)
        else:
            events = launch(lab, Path(folder), run_table(case, path, steps, setting), setting)
            logged = [event for event in events if event["kind"] == "step"]
            ends = [event for event in logged if event["step"] % round_steps == 0]
            seconds = statistics.median(
                (later["wall_s"] - earlier["wall_s"]) / (later["step"] - earlier["step"])
                for earlier, later in pairwise(ends)
            )
            sent, simulated = logged[-1]["sent_bytes"] / setting.nodes / steps, logged[-1]["simulated_s"] / steps
            crossed = next(event["sent_bytes_by_node"] for event in events if event["kind"] == "wire")
    return Paced(
        case, mbit or 0.0, seconds, planned_step_s(run, profile), simulated, sent, statistics.mean(crossed) / steps,
        setting.nodes * MICRO_BATCH * MODEL["context"],
    )  # fmt: skip


def planned_step_s(run: Any, profile: Profile) -> float:
    """Return the plan's seconds of a step, the round's exchange included."""
    planned = round_time(run, run.model.shape(), profile.devices(run.cluster.devices), profile.link)
    return planned.round_s / planned.steps


def _yardstick(lab: Lab, steps: int, setting: LinkSetting) -> float:
    """Return the median seconds of a step of torch's DistributedDataParallel."""
    root = Path(__file__).parents[2]
    shared = {"MASTER_ADDR": lab[0].address, "MASTER_PORT": str(PORT), "WORLD_SIZE": str(setting.nodes)}
    shared |= {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    task = json.dumps(run_table(YARDSTICK, "gtx1080ti_x8", steps, setting))
    ranks = [
        node.popen(
            [*_on_its_core(node), sys.executable, "-m", "bench.studies.links_rank", task],
            cwd=root, stdout=subprocess.PIPE, text=True, env={**os.environ, **shared, "RANK": str(node.index)},
        )
        for node in lab
    ]  # fmt: skip
    printed = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{YARDSTICK} failed")
    return float(statistics.median(json.loads(printed[0])[1:]))


def calibrate(folder: Path, setting: LinkSetting) -> Table:
    """Return a node as a device, at the rate of whole rounds on links without a limit, where all compute at once."""
    path = folder / "calibration.toml"
    case, guess = "lte T 10", 1e10
    profile = write_profile(path, guessed_node(guess), None, setting)
    measured = pace(case, None, profile, path, setting)
    run = build_run(run_table(case, path, 100, setting))
    planned = round_time(run, run.model.shape(), profile.devices(run.cluster.devices), profile.link)
    # Exchange and merge take their planned seconds; what is left of the measured step is compute.
    rest_s = planned.round_s - planned.steps * planned.compute_s
    flop_per_s = guess * planned.steps * planned.compute_s / (planned.steps * measured.step_s - rest_s)
    print(f"a node: {flop_per_s / 1e9:.1f} Gflop/s", file=sys.stderr, flush=True)
    return guessed_node(flop_per_s)


def measured_cases(arguments: argparse.Namespace, setting: LinkSetting) -> Iterator[tuple[str, float, Profile, Path]]:
    """Yield every case on every link, with the lab's profile; a node is as a profile has it, or calibrated."""
    with tempfile.TemporaryDirectory() as folder:
        given = load_profile(arguments.profile) if arguments.profile else None
        device = given.model_dump(exclude_none=True)["device"][0] if given else calibrate(Path(folder), setting)
        for mbit in arguments.mbit:
            path = Path(folder) / f"lab_{mbit:g}_mbit.toml"
            profile = write_profile(path, device, mbit, setting)
            for case in arguments.cases:
                yield case, mbit, profile, path


def whole_runs(arguments: argparse.Namespace) -> None:
    """Launch every case on every link, evaluating and saving as runs do, and print its seconds beside the plan's."""
    if reason := why_not():
        raise SystemExit(reason)
    setting = setting_of(arguments)
    print("| link | case | steps | whole run | planned | over it | stopped | planned evaluations | checkpoints |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case, mbit, profile, path in measured_cases(arguments, setting):
        if case != YARDSTICK:
            print(_whole_line(case, mbit, profile, path, arguments.steps, setting), flush=True)


def _whole_line(case: str, mbit: float, profile: Profile, path: Path, steps: int, setting: LinkSetting) -> str:
    table = run_table(case, path, steps, setting)
    table["train"].update(evaluate_every=max(10, steps // 4), evaluate_samples=64)
    del table["cluster"]["recover_every"]
    run = build_run(table)
    planned = candidate_of(evaluate(run, profile, steps * run.tokens_per_step, spaces_recovery=True))
    table["cluster"]["recover_every"] = planned.run.cluster.recover_every
    with (
        Lab(setting.nodes, bytes_per_s=mbit * 1e6 / 8, delay_s=setting.delay_s) as lab,
        tempfile.TemporaryDirectory(dir=Path.cwd()) as folder,  # on the disk that was measured
    ):
        events = launch(lab, Path(folder), table, setting)
    measured_s = next(event["wall_s"] for event in events if event["kind"] == "end")
    step_wall_s = {event["step"]: event["wall_s"] for event in events if event["kind"] == "step"}
    stopped_s = sum(event["wall_s"] - step_wall_s[event["step"]] for event in events if event["kind"] == "evaluate")
    stopped_s += sum(event["paused_s"] for event in events if event["kind"] == "checkpoint")
    stops = planned.eval_and_save
    return (
        f"| {mbit:g} Mbit/s | {case} | {steps} | {measured_s:.1f} s | {planned.wall_s:.1f} s | "
        f"{measured_s / planned.wall_s:.2f} | {stopped_s:.1f} s | {stops.evaluations} x {stops.evaluation_s:.2f} s | "
        f"{stops.saves} x {stops.save_s or 0:.2f} s |"
    )


def setting_of(arguments: argparse.Namespace) -> LinkSetting:
    """Return the settings that the options name."""
    return LinkSetting(arguments.nodes, arguments.delay_s, arguments.data)


def paces(arguments: argparse.Namespace) -> None:
    """Measure and print every case on every link."""
    if reason := why_not():
        raise SystemExit(reason)
    rows, setting = [], setting_of(arguments)
    for case, mbit, profile, path in measured_cases(arguments, setting):
        row = pace(case, mbit, profile, path, setting)
        rows.append(row)
        print(_line(row), file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps([row.__dict__ for row in rows]))
        return
    print("| link | case | measured step | planned | over it | simulated | 1M tokens | sent a step | wire / sent |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(_line(row))


def _line(row: Paced) -> str:
    wire = f"{row.wire_bytes_per_step / row.sent_bytes_per_step:.2f}" if row.sent_bytes_per_step else "-"
    return (
        f"| {row.mbit:g} Mbit/s | {row.case} | {row.step_s:.2f} s | {row.planned_step_s:.2f} s | "
        f"{row.step_s / row.planned_step_s:.2f} | {row.simulated_step_s:.2f} s | {row.tokens_s / 3600:.2f} h | "
        f"{row.sent_bytes_per_step / 1e6:.2f} MB | {wire} |"
    )


def losses(arguments: argparse.Namespace) -> None:
    """Train the cases in one process, and print the steps that each needs to dense training's loss."""
    for case in arguments.cases:
        if case == YARDSTICK:
            continue
        table = run_table(case, "gtx1080ti_x8", arguments.steps, setting_of(arguments))
        table["train"].update(evaluate_every=30, evaluate_samples=64, learning_rate=arguments.rate)
        trained = train_table(table)
        tokens = arguments.nodes * MICRO_BATCH * MODEL["context"]
        curve = ", ".join(f"{at // tokens}: {loss:.3f}" for at, loss in trained.curve)
        print(f"{case}: {curve}", flush=True)


def main() -> None:
    """Parse, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", nargs="?", choices=("paces", "whole", "losses"), default="paces")
    parser.add_argument("--mbit", type=float, nargs="+", default=[10, 100, 1000], help="link rates, both ways")
    parser.add_argument("--nodes", type=int, default=NODES, help="no more than cores for paces of any use")
    parser.add_argument("--delay-s", type=float, default=0.0, help="one way, by a relay")
    parser.add_argument("--profile", help="of one node, from lte profile measure")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--data", help="UTF-8 text file; default: the standard library's source")
    parser.add_argument("--steps", type=int, default=300, help="of whole and losses")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of losses")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    {"paces": paces, "whole": whole_runs, "losses": losses}[arguments.verb](arguments)


if __name__ == "__main__":
    main()
