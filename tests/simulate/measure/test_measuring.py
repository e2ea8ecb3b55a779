"""Measuring at small sizes: a complete profile, which plans use and which loads as it was saved."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from simulate.common import toml_io
from simulate.common.errors import InputError
from simulate.config.hardware import Device, Profile
from simulate.config.profiles import detect_local, load_profile
from simulate.costs.step_time import device_step_s
from simulate.measure import machine
from simulate.measure.kernels import Sizes, merged, packed_formats
from simulate.measure.machine import MeasurementScope, measure_disk, measure_profile
from simulate.measure.step_times import QUICK_CASES, Case, held_out_times
from simulate.measure.timer import Stopwatch
from tests import tiny
from tests.gpus import no_gpu

TINY = Sizes(
    products=[(16, 8, 8), (32, 32, 32), (32, 2, 32)], attention=[(16, 8)], optimizer=[256], steps=[(1, 32, 1)],
    packing=[8, 16], family_steps=[(1, 32, 1)],
)  # fmt: skip


@pytest.fixture(scope="module")
def profile() -> Profile:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "COPY_BYTES", 2**20)
        patch.setattr(machine, "PEAK_SIZE", 64)
        patch.setattr(machine, "DISK_BYTES", 2**16)
        patch.setattr(machine, "QUICK_S", 0.0)
        return measure_profile(MeasurementScope(True, 3, 1, "cpu"), detect_local().link, lambda what: None, TINY)


def test_a_measured_profile_is_complete_and_loads_as_it_was_saved(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "measured.toml"
    path.write_text(toml_io.dump(profile.model_dump(exclude_none=True)))
    assert load_profile(str(path)) == profile
    assert profile.device[0].source == "measured"
    assert profile.device[0].kernels is not None
    assert set(profile.device[0].kernels.elementwise_of) == {"llama", "vit", "mixer"}
    assert profile.device[0].kernels.full_attention
    assert profile.device[0].disk_write_bytes_per_s
    assert profile.count == 3
    assert profile.measurement is not None
    assert profile.measurement.threads == 1
    assert set(profile.measurement.median_s) == set(profile.measurement.p90_s)
    assert all(profile.measurement.p90_s[name] >= seconds for name, seconds in profile.measurement.median_s.items())


def test_measuring_leaves_the_threads_as_they_were(profile: Profile) -> None:
    before = torch.get_num_threads()
    held_out_times(profile, cases=[])
    assert torch.get_num_threads() == before


def test_plans_go_by_what_was_measured(profile: Profile) -> None:
    run = tiny.ddp_run(train={"dtype": "fp32"})
    plain = profile.device[0].model_copy(update={"kernels": None})
    measured_s, plain_s = (device_step_s(run, run.model.shape(), [device])[0] for device in (profile.device[0], plain))
    assert measured_s > plain_s  # starting kernels is most of so small a step


def test_every_format_of_frozen_weights_is_measured(profile: Profile) -> None:
    kernels = profile.device[0].kernels
    assert kernels is not None
    assert {"bf16", "int8"} <= set(kernels.unpack) == set(kernels.pack) == set(packed_formats())
    assert all([size for size, _ in points] == [64.0, 256.0] for points in kernels.unpack.values())
    run = tiny.lte_run(train={"dtype": "fp32"}, quantize="int8", reset="b")
    slower = {"int8": [[size, rate / 100] for size, rate in kernels.unpack["int8"]]}
    slow = profile.device[0].model_copy(update={"kernels": kernels.model_copy(update={"unpack": slower})})
    fast_s, slow_s = (device_step_s(run, run.model.shape(), [device])[0] for device in (profile.device[0], slow))
    assert slow_s > fast_s


def test_held_out_steps_are_planned_and_measured(profile: Profile) -> None:
    case = Case("tiny", {**tiny.SIZES}, {"name": "lte", "rank": 2}, 1)
    [(name, planned_s, measured_s)] = held_out_times(profile, cases=[case])
    assert name == "tiny"
    assert planned_s > 0
    # Two layers of width 16: far more than a microsecond, far less than a second.
    assert 1e-6 < measured_s < 1


def test_every_held_out_case_is_a_valid_run() -> None:
    assert len({case.name for case in QUICK_CASES}) == len(QUICK_CASES)
    assert {case.run().method.name for case in QUICK_CASES} == {"ddp", "lte"}
    assert {case.run().model.name for case in QUICK_CASES} == {"gpt", "vit"}


def test_neighbouring_points_become_one() -> None:
    assert merged([[100.0, 7.0], [10.0, 1.0], [11.0, 5.0], [12.0, 2.0]]) == [[11.0, 2.0], [100.0, 7.0]]


def test_a_stopwatch_sees_work_and_forgets_its_calls() -> None:
    watch = Stopwatch(torch.device("cpu"), 0.0)
    calls: list[int] = []
    taken = watch.seconds("work", lambda: calls.append(sum(range(100_000))), least=3)
    assert 1e-4 < taken < 1
    assert watch.p90_s["work"] >= watch.median_s["work"] == taken
    assert len(calls) >= 3


def test_a_disk_is_measured_in_this_folder_by_parts_of_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes, moments = list[int](), iter(range(10**6))

    def write(folder: Path, name: str, tensors: dict[str, torch.Tensor], about: dict[str, object]) -> None:
        assert folder.absolute().parent == tmp_path
        sizes.append(tensors["noise"].nbytes)
        for _ in range(0 if sizes[-1] == 1 else 4):  # four ticks of the clock longer
            next(moments)

    monkeypatch.setattr(machine, "write_part", write)
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: float(next(moments))))
    disk = measure_disk(2**16)
    assert sizes == [1] * machine.DISK_REPEATS + [2**16] * machine.DISK_REPEATS
    assert (disk.flush_s, disk.write_bytes_per_s) == (1.0, 2**16 / 4)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(machine, "write_part", write)
    with pytest.raises(InputError, match=r"cannot be measured.*Read-only.*run this in a folder"):
        measure_disk(2**16)


def test_the_peak_is_above_every_kernel(profile: Profile) -> None:
    kernels = profile.device[0].kernels
    assert kernels is not None
    fast = kernels.model_copy(update={"full_attention": [[1.0, 1e15]]})
    device = machine._device(MeasurementScope(), False, 1e9, {"fp32": 1e9}, fast, machine.Disk(1e8, 0.01))
    assert device.flop_per_s.fp32 == 1e15
    assert Profile(device=[Device.model_validate(device.model_dump())], link=profile.link)


def test_a_profile_of_a_gpu_that_is_not_here_is_not_validated(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert profile.measurement is not None
    of_gpu = profile.measurement.model_copy(update={"device": "cuda"})
    no_gpu(monkeypatch)
    with pytest.raises(InputError, match=r"'measured' was measured on a GPU, and this PyTorch .* sees no cuda device"):
        held_out_times(profile.model_copy(update={"measurement": of_gpu}))
