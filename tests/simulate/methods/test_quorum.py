"""Merges without some devices: against slow twins, by hand, and as they were where nobody is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from simulate.config.run import Run, build_run
from simulate.costs.message_schedule import received_bytes, sent_bytes
from simulate.methods.quorum import Quorum
from tests import tiny
from tests.processes import OF_CLASSES, OVER_INT8, WITHOUT_SOME, run_without_some, train_in_processes, variant_table
from tests.reference.quorum import (
    QuorumDilocoTwin,
    QuorumLocalSgdTwin,
    QuorumLteFrozenATwin,
    QuorumLteTwin,
)
from tests.selection import others_slow
from tests.simulate.methods import adapter_parity, parity
from tests.simulate.methods.parity import hand_run, of_linear, set_copies

# Late by one merge and by two, lost and back, late at the end; the third never has a whole round.
ROWS = ((3, 3, 1), (3, 0, 1), (2, 2, 0), (3, 3, 0), (3, -1, 2), (2, -1, 3), (3, 3, 0))
LTE_ROWS = ((3, 3, 2, 1), (3, 0, 2, -1), (3, 2, 0, 1), (3, 0, 0, 3), (3, 0, 2, 3), (0, 2, 3, 0))
DENSE_STEPS = 20  # the last round is of two steps; of LTE's 19 it is of one


def with_merges(run: Run, rows: Any, steps: int | None = None, **cluster: Any) -> Run:
    """Return the run with given merges, and as many steps as it has if `steps` is not given."""
    table = run.model_dump(exclude_none=True)
    table["train"]["steps"] = steps or run.train.steps
    table["cluster"].update(merges_given=rows, **cluster)
    return build_run(table)


def dense(name: str, shards: tuple[float, ...] | None = None, p: float = 0.5, **method: Any) -> Run:
    run = parity.parity_run(name, shards=shards, merge_every=3, **method)
    return with_merges(run, ROWS, DENSE_STEPS, age_exponent=p)


def lte(**method: Any) -> Run:
    method = {"merge_every": 3, "reset": "b", "norms": "average", **method}
    return with_merges(adapter_parity.parity_run("lte, paced", devices=4, **plain(method)), LTE_ROWS)


def plain(method: dict[str, Any]) -> dict[str, Any]:
    return {"pace": "lockstep", "steps_taken": None, **method}


DENSE: dict[str, tuple[Any, Run]] = {
    "local sgd": (QuorumLocalSgdTwin, dense("local-sgd")),
    "shards, no discount": (QuorumLocalSgdTwin, dense("local-sgd", shards=(1.0, 2.0, 3.0), p=0.0)),
    "served": (QuorumLocalSgdTwin, dense("local-sgd", merge_transport="server")),
    "reset": (QuorumLocalSgdTwin, dense("local-sgd, reset")),
    "diloco": (QuorumDilocoTwin, dense("diloco", fragments=1)),
}
LTE: dict[str, tuple[Any, Run]] = {
    "gathered": (QuorumLteTwin, lte()),
    "two heads, redrawn": (QuorumLteTwin, lte(reset="ab", heads_per_device=2)),
    "reduced": (QuorumLteTwin, lte(merge_transport="reduce")),
    "frozen a, served": (QuorumLteFrozenATwin, lte(frozen_a=True, merge_transport="server")),
    "frozen a, gathered": (QuorumLteFrozenATwin, lte(frozen_a=True)),
}


@pytest.mark.parametrize("name", others_slow(DENSE, ["served", "diloco"]))
def test_every_dense_method_trains_like_the_twin(name: str) -> None:
    parity.assert_trains_like(*DENSE[name])


@pytest.mark.parametrize("name", others_slow(LTE, ["two heads, redrawn", "frozen a, served"]))
def test_lte_trains_like_the_twin(name: str) -> None:
    adapter_parity.assert_trains_like(*LTE[name])


KEPT = Quorum._put_rows


def restart_late(method: Quorum, device: int, rows: Any, before: Any) -> None:
    """Let late devices start anew from each merge."""


def stay_on_the_old_base(method: Quorum, device: int, rows: Any, before: Any) -> None:
    """Add what is averaged to the base of long ago."""
    KEPT(method, device, rows, {})


@pytest.mark.parametrize(
    ("attribute", "broken"),
    [
        pytest.param("_put_rows", restart_late, id="what is late is dropped"),
        pytest.param("_put_rows", stay_on_the_old_base, id="old bases count twice"),
        pytest.param("brought_N", property(lambda method: method.present_N.long()), id="steps do not count"),
    ],
)
@pytest.mark.parametrize("case", [DENSE["local sgd"], LTE["gathered"]], ids=["local sgd", "lte"])
def test_parity_detects_a_broken_engine(
    monkeypatch: pytest.MonkeyPatch, attribute: str, broken: Any, case: tuple[Any, Run]
) -> None:
    monkeypatch.setattr(Quorum, attribute, broken)
    module = adapter_parity if case[0] is QuorumLteTwin else parity
    with pytest.raises(AssertionError):
        module.assert_trains_like(*case)  # type: ignore[attr-defined]


def test_parity_detects_a_discount_of_another_power(monkeypatch: pytest.MonkeyPatch) -> None:
    twin, run = DENSE["local sgd"]
    other = run.model_copy(update={"cluster": run.cluster.model_copy(update={"age_exponent": 1.0})})
    with pytest.raises(AssertionError):
        tiny.assert_parity(tiny.train(tiny.build(other)), parity.twin_of(twin, run)[1])


def train_by_hand(method: Quorum, weight: torch.Tensor, values: dict[int, tuple[float, ...]]) -> None:
    """Take eight steps that move nothing by themselves; before some of them the copies get values."""
    inputs, targets = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    for step in range(8):
        method.step(inputs, targets, step)
        if step in values:
            set_copies(weight, *values[step])
        if (step + 1) % 4 == 0:
            method.merge(step)


def test_a_change_that_comes_one_merge_late_by_hand() -> None:
    run = with_merges(hand_run("local-sgd", merge_every=4), [[4, 0], [4, 4]])
    method, weight = of_linear(run, value=1.0)
    assert isinstance(method, Quorum)
    # From 1, the first goes to 3, alone at the first merge, and then from 3 to 7. The second went from 1 to 2, late.
    train_by_hand(method, weight, {3: (3.0, 2.0)})
    # It brings 4 steps that missed one merge: its share is (4/sqrt(2)) / (4 + 4/sqrt(2)), of its change of 1.
    share = 2**-0.5 / (1 + 2**-0.5)
    torch.testing.assert_close(weight.flatten(), torch.full((2,), 3.0 + share, dtype=torch.float64), rtol=1e-14, atol=0)


def test_a_late_device_is_moved_to_each_new_base_by_hand() -> None:
    run = with_merges(hand_run("local-sgd", merge_every=4), [[4, 0], [4, 4]], age_exponent=0.0)
    method, weight = of_linear(run, value=1.0)
    assert isinstance(method, Quorum)
    inputs, targets = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    for step in range(4):
        method.step(inputs, targets, step)
    set_copies(weight, 3.0, 2.0)
    method.merge(3)
    # The base went from 1 to 3, and the second had learned 1.
    assert weight.flatten().tolist() == [3.0, 4.0]
    assert method.ages_N.tolist() == [0, 1] and method.pending_N.tolist() == [0, 4]
    record = method.merge_record(7)
    method.step(inputs, targets, 4)
    set_copies(weight, 7.0, 99.0)  # what it does while it waits counts for nothing
    for step in range(5, 8):
        method.step(inputs, targets, step)
    record = method.merge_record(7)
    assert record == {
        "kind": "merge", "step": 8, "participants": [0, 1], "ages": [0, 1], "weights": [0.5, 0.5], "brought": [4, 4],
    }  # fmt: skip
    method.merge(7)
    assert weight.flatten().tolist() == [5.5, 5.5]  # 3 + (4 + 1)/2


def test_products_of_late_heads_add_to_the_newest_weights_by_hand() -> None:
    options = plain({"reset": "b", "merge_every": 4, "norms": "none"})
    table = adapter_parity.parity_run("lte, paced", devices=2, **options)
    method = adapter_parity.on_layer(with_merges(table, [[4, 0], [4, 2]]))
    layer = method.mergers[0].layers[0]  # type: ignore[attr-defined]
    inputs, targets = torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    products = []
    for step in range(8):
        method.step(inputs, targets, step)
        if step == 3:
            method.close_round(step)
            with torch.no_grad():
                layer.b[:] = torch.tensor([1.0, 2.0], dtype=torch.float64).view(2, 1, 1)
            products = [(layer.b[h] @ layer.a[h]).detach() for h in range(2)]
        if step % 4 == 3:
            method.merge(step)
        if step == 3:
            assert layer.b.detach().flatten().tolist() == [0.0] * layer.b[0].numel() + [2.0] * layer.b[1].numel()
    scale = method.options.scale  # type: ignore[attr-defined]
    # The second merge: 4 fresh steps whose B is still zero, and 2 that missed one merge.
    share = (2 / 2**0.5) / (4 + 2 / 2**0.5)
    expected = torch.eye(2, dtype=torch.float64) + scale * products[0] + share * scale * products[1]
    torch.testing.assert_close(layer.weight, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["local-sgd", "diloco", "lte, frozen a"])
def test_where_nobody_is_missing_nothing_changes_to_the_bit(name: str) -> None:
    run = tiny.variant_run(name, 3)
    assert run.method.round_steps == 4
    given = with_merges(run, [[4, 4, 4]])
    method = tiny.build(given)
    assert isinstance(method, Quorum)
    today, now = tiny.train(tiny.build(run)), tiny.train(method)
    assert torch.equal(today.losses, now.losses)
    assert all(torch.equal(today.weights[key], now.weights[key]) for key in today.weights)
    everyone = run.model_copy(update={"cluster": run.cluster.model_copy(update={"quorum": 3})})
    assert not isinstance(tiny.build(everyone), Quorum)


@pytest.mark.parametrize("case", [*DENSE.values(), *LTE.values()], ids=[*DENSE, *LTE])
def test_planned_bytes_are_those_counted(case: tuple[Any, Run]) -> None:
    run = case[1]
    method, data = tiny.build(run), tiny.batches(run)
    for step in range(run.train.steps):
        if step % run.method.round_steps == 0:
            counter = method.communicator.counter
            assert counter.sent_bytes == sent_bytes(run, run.shape(), step)
            assert counter.received_bytes == received_bytes(run, run.shape(), step)
        method.step(*data.batch(step, range(run.cluster.devices)), step)
        if method.merge_due(step):
            method.merge(step)
    counter = method.communicator.counter
    assert counter.sent_bytes == sent_bytes(run, run.shape(), run.train.steps)
    assert counter.received_bytes == received_bytes(run, run.shape(), run.train.steps)
    everyone = run.model_copy(update={"cluster": run.cluster.model_copy(update={"merges_given": None})})
    assert counter.sent_bytes != sent_bytes(everyone, run.shape(), run.train.steps)


IN_PROCESSES = (
    "local-sgd", "diloco", "lte, paced", "lte, paced, reduced", "local-sgd, paced, served", "local-sgd, paced int8",
    f"lte, paced{OVER_INT8}{OF_CLASSES}",
)  # fmt: skip
ALSO_IN_PROCESSES = (
    "lte, paced, reduced int4", f"local-sgd, paced, served{OF_CLASSES}", f"diloco{OVER_INT8}{OF_CLASSES}",
    f"lte, paced, served, muon{OVER_INT8}{OF_CLASSES}",
)  # fmt: skip


@pytest.mark.parametrize(
    ("processes", "variants"),
    others_slow(
        [(4, IN_PROCESSES), (4, ALSO_IN_PROCESSES), (2, IN_PROCESSES + ALSO_IN_PROCESSES)], [(4, IN_PROCESSES)]
    ),
    ids=["4", "4, others", "2"],
)
def test_processes_train_as_one_does_and_count_the_same(
    processes: int, variants: tuple[str, ...], tmp_path: Path
) -> None:
    names = [f"{name}{WITHOUT_SOME}" for name in variants]
    launched = train_in_processes(tmp_path, names, processes, steps=18)
    for name in names:
        method = tiny.build(run_without_some(name, variant_table(18, "fp64")))
        tiny.assert_parity(launched[name][0], tiny.train(method))
        assert launched[name][1]["sent"] == method.communicator.counter.sent_bytes, name
