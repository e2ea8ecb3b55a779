"""Classes of unequal devices in run.toml: read, written, set on the command line, and refused in one line."""

import re
from pathlib import Path

import pytest

from simulate.common import toml_io
from simulate.common.errors import InputError
from simulate.config.run import Run, build_run, dump_run, load_given_run, run_fingerprint

FILE = """
[model]
name = "gpt"
[method]
name = "lte"
rank = 16
[train]
steps = 20
[cluster]
devices = 3
[[cluster.class]]
devices = 2
micro_batch = 16
heads_per_device = 2
[[cluster.class]]
devices = 1
rank = 4
accumulate = 2
autocast = "bf16"
"""


def run_of(folder: Path, *assignments: str) -> Run:
    path = folder / "run.toml"
    path.write_text(FILE, encoding="utf-8")
    return load_given_run(path, assignments)


def test_each_class_is_a_run_with_its_own_values(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    first, second = run.classes
    assert (first.train.micro_batch, first.method.heads_per_device, first.method.rank) == (16, 2, 16)  # type: ignore[attr-defined]
    assert (second.train.micro_batch, second.train.accumulate, second.train.autocast) == (8, 2, "bf16")
    assert second.method.rank == 4 and first.train.autocast == "none"  # type: ignore[attr-defined]
    assert [one.cluster.devices for one in run.classes] == [3, 3]
    assert not first.cluster.classes


def test_devices_are_of_classes_in_order(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert [run.class_of(device) for device in range(3)] == [0, 0, 1]
    assert run.cluster.class_devices == [range(2), range(2, 3)]
    assert run.of_devices(range(2)) == run.of_class(0)
    with pytest.raises(InputError, match="devices 1 to 2 would share a process"):
        run.of_devices(range(1, 3))


def test_totals_are_sums_over_classes(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert run.device_samples == (16, 16, 16)
    assert run.samples_per_step == 48
    assert run.heads == 2 + 2 + 1
    assert run_of(tmp_path, "cluster.class.1.accumulate=3").samples_per_step == 56


def test_the_scale_follows_from_the_alpha_of_all_and_the_rank_of_each(tmp_path: Path) -> None:
    first, second = run_of(tmp_path, "method.alpha=64.0").classes
    assert first.method.scale == 4 and second.method.scale == 16  # type: ignore[attr-defined]


def test_a_run_without_classes_is_written_without_the_key() -> None:
    run = build_run({"model": {"name": "gpt"}})
    assert "class" not in dump_run(run)
    assert run.classes == [run] and run.of_class(0) is run and run.class_of(3) == 0


def test_written_classes_are_read_again(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    text = dump_run(run)
    assert text.count("[[cluster.class]]") == 2
    assert build_run(toml_io.parse(text, "written")) == run
    assert build_run(run.model_dump(exclude_none=True)) == run
    assert run_fingerprint(run) != run_fingerprint(run_of(tmp_path, "cluster.class.0.micro_batch=8"))


def test_a_key_of_a_class_is_set_by_its_number(tmp_path: Path) -> None:
    run = run_of(tmp_path, "cluster.class.0.micro_batch=4", "cluster.class.2.devices=1", "cluster.devices=4")
    assert [one.train.micro_batch for one in run.classes] == [4, 8, 8]
    assert run.classes[2].method.rank == 16  # type: ignore[attr-defined]


def test_classes_are_set_as_a_whole(tmp_path: Path) -> None:
    run = run_of(tmp_path, "cluster.class=[{devices = 1, rank = 2}, {devices = 2}]")
    assert [one.method.rank for one in run.classes] == [2, 16]  # type: ignore[attr-defined]


REFUSED = {
    "cluster.devices=4": r"class has 2 \+ 1 = 3 devices, and devices = 4; try --set cluster.devices=3",
    "cluster.class.2.micro_batch=1": r"command line: cluster.class\[2\].devices is missing",
    "cluster.class.0.micro_batch=0": r"command line: cluster.class\[0\].micro_batch = 0: input should be greater",
    "cluster.class.0.micro_batch=3": r"class\[0\]: train.micro_batch = 3 is not .*cluster.class.0.micro_batch=2",
    "cluster.class.1.rank=500": r"cluster.class\[1\]: method.rank = 500 exceeds .*; try --set cluster.class.1.rank=",
    "cluster.class.1.rnk=5": r"cluster.class\[1\].rnk is not a known key; did you mean 'rank'\?",
    "cluster.class.4.rank=5": "there are 2 tables; the next one has number 2",
    "cluster.class=4": r"cluster.class = 4",
    "train.dtype=fp64": r"cluster.class\[1\]: train.autocast = 'bf16' lowers the precision of fp32",
}


@pytest.mark.parametrize("assignment", REFUSED)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, assignment: str) -> None:
    with pytest.raises(InputError, match=REFUSED[assignment]) as refused:
        run_of(tmp_path, assignment)
    assert len(str(refused.value).splitlines()) == 1


def test_a_method_without_the_key_refuses_it() -> None:
    table = {"method": {"name": "relora"}, "cluster": {"devices": 1, "class": [{"devices": 1, "rank": 4}]}}
    with pytest.raises(InputError, match=re.escape("method.name = 'relora' needs equal ones; leave it away")):
        build_run(table)


@pytest.mark.parametrize(
    ("keys", "move"),
    [
        ({"quantize": "int8", "merge_transport": "server"}, "--set method.merge_transport=gather"),
        ({"quantize": "int8", "master": "none"}, "--set method.master=host"),
    ],
)
def test_formats_that_make_no_one_model_are_refused(keys: dict[str, str], move: str) -> None:
    classes = [{"devices": 1}, {"devices": 1, "quantize": "nf4"}]
    with pytest.raises(InputError, match=move):
        build_run({"method": {"name": "lte", **keys}, "cluster": {"devices": 2, "class": classes}})
