"""Plans of profiles whose devices stand in nodes try them as one and by themselves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ltecli.plan_request import PlanArgs, plan_request
from simulate.common.errors import InputError
from simulate.config.hardware import Link
from simulate.config.profiles import load_profile
from simulate.planning.candidate import candidate_of, describe
from simulate.planning.plan_json import candidate_json
from simulate.planning.planner import Plan

FEW = ("model.layers=2", "train.micro_batch=4", "method.rank=8", "method.merge_transport=gather")
NODES = "node_bytes_per_s = 120e9\nnode_latency_s = 5e-6\n"


def profile(folder: Path, devices: int = 32, nodes: str = f"{NODES}devices_per_node = 8\n") -> str:
    """Write machines of eight devices each, joined by slow links; return the profile's path."""
    text = (Path(__file__).parents[3] / "profiles" / "v100_x8.toml").read_text()
    text = text.replace("count = 8", f"count = {devices}").replace("[link]\n", f"[link]\n{nodes}")
    path = folder / "nodes.toml"
    path.write_text(re.sub(r"(up|down)_bytes_per_s = 120.0e9", r"\1_bytes_per_s = 1e8", text))
    return str(path)


def planned(path: str, *assignments: str) -> Plan:
    args = PlanArgs(profile=path, model="gpt", pins={"name": "lte"}, assignments=(*FEW, *assignments))
    return plan_request(args, to_train=False)


def sizes(plan: Plan) -> set[int]:
    runs = (candidate_of(result).run for result in (*plan.candidates, *plan.rejected))
    return {getattr(run.method, "devices_per_node", 1) for run in runs if run.method.name == "lte"}


def test_both_are_planned_where_the_profile_has_nodes(tmp_path: Path) -> None:
    plan = planned(profile(tmp_path))
    assert sizes(plan) == {1, 8}
    for candidate in (c for c in plan.candidates if c.run.method.name == "lte"):
        size = candidate_json(candidate).get("devices_per_node", 1)
        assert candidate.run.heads == 32 // size * getattr(candidate.run.method, "heads_per_device", 1)
        assert ("nodes of 8" in describe(candidate.run)) == (size == 8)


def test_a_key_that_is_given_stays(tmp_path: Path) -> None:
    assert sizes(planned(profile(tmp_path), "method.devices_per_node=1")) == {1}


@pytest.mark.parametrize(
    ("devices", "nodes"),
    [
        pytest.param(32, NODES, id="no size of a node"),
        pytest.param(8, f"{NODES}devices_per_node = 8\n", id="one node"),
        pytest.param(12, f"{NODES}devices_per_node = 8\n", id="nodes that are not full"),
    ],
)
def test_lone_devices_alone_are_planned_otherwise(tmp_path: Path, devices: int, nodes: str) -> None:
    assert sizes(planned(profile(tmp_path, devices, nodes=nodes))) == {1}


def test_traffic_inside_goes_at_the_rate_of_the_node(tmp_path: Path) -> None:
    def exchange_s(rate: str) -> float:
        nodes = f"node_bytes_per_s = {rate}\ndevices_per_node = 8\n"
        plan = planned(profile(tmp_path, nodes=nodes), "method.devices_per_node=8")
        return min(c.time.exchange_s for c in plan.candidates if c.run.method.name == "lte")

    assert exchange_s("1e7") > 2 * exchange_s("120e9")


def test_a_size_without_a_rate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="devices_per_node = 8 without node_bytes_per_s"):
        load_profile(profile(tmp_path, nodes="devices_per_node = 8\n"))
    assert Link.model_fields["devices_per_node"].default is None
