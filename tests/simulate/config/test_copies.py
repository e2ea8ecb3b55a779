"""Copies of tables with other keys: what a table keeps of its own figures is computed anew."""

from __future__ import annotations

from simulate.config.profiles import load_profile
from simulate.config.tables import Cluster


def test_a_copy_says_anew_whether_it_has_a_quorum() -> None:
    cluster = Cluster(profile="rtx3060_x4_home", devices=4)
    assert not cluster.has_quorum
    with_quorum = cluster.model_copy(update={"quorum": 3})
    assert with_quorum.has_quorum and not with_quorum.model_copy(update={"quorum": None}).has_quorum


def test_a_copy_of_a_device_with_more_memory_may_fill_more() -> None:
    (device, *_) = load_profile("gtx1080ti_x8").devices(1)
    headroom = device.memory_bytes - device.usable_bytes
    larger = device.model_copy(update={"memory_bytes": 2 * device.memory_bytes})
    assert abs(2 * device.memory_bytes - larger.usable_bytes - 2 * headroom) <= 1  # a share of the whole, rounded
    assert device.is_cuda and not device.model_copy(update={"device_type": "cpu"}).is_cuda
