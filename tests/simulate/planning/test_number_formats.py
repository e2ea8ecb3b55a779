"""What a plan tells of lower formats: refusals, gains, and times at the matching rate."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulate.common import processor
from simulate.common.units import change_text
from simulate.config.profiles import detect_local, load_profile
from simulate.costs.flops import pass_flops, update_flops
from simulate.costs.step_time import device_step_s
from tests import tiny
from tests.ltecli.command import PROFILE, Lte, Refused

SMALL = ("plan", "--tokens", "100000", "--set", "train.micro_batch=4", "--set", "train.activation_checkpointing=false")


@pytest.mark.parametrize(
    ("profile", "wanted", "words"),
    [
        ("gtx1080ti_x8", "bf16", ("GTX 1080 Ti", "no bf16 rate", "train.autocast=fp16")),
        ("t4_x4", "bf16", ("train.autocast=fp16",)),
        ("mixed_gtx1080ti_rtx2060_rtx3090", "bf16", ("GTX 1080 Ti", "train.autocast=fp16")),
        ("laptop_cpu", "bf16", ("no bf16 rate", "train.autocast=none", "fp32 only")),
        ("raspberry_x8", "fp16", ("no fp16 rate", "train.autocast=none")),
    ],
)
def test_a_format_that_a_device_lacks_is_refused(
    refused: Refused, profile: str, wanted: str, words: tuple[str, ...]
) -> None:
    refused(*SMALL, "--profile", profile, "--set", f"train.autocast={wanted}", words=words)


@pytest.mark.parametrize(
    ("profile", "picked"),
    [
        ("rtx3060_x4_home", "bf16"),
        ("t4_x4", "fp16"),
        ("v100_x8", "fp16"),
        ("jetson_orin_nano_x8_wifi", "bf16"),
        ("gtx1080ti_x8", "none"),
        ("mixed_gtx1080ti_rtx2060_rtx3090", "none"),
        ("laptop_cpu", "none"),
    ],
)
def test_the_plan_picks_the_format_in_which_all_gpus_are_faster(lte: Lte, profile: str, picked: str) -> None:
    plan = lte(*SMALL, "--profile", profile, "--json").json()
    assert {candidate["autocast"] for candidate in plan["candidates"]} == {picked}
    notes = [note for note in plan["notes"] if note.startswith(f"train.autocast = {picked}, in which")]
    assert len(notes) == (picked != "none")


def test_a_given_format_stays_and_the_plan_says_what_the_devices_could_do(lte: Lte) -> None:
    plan = lte(*SMALL, "--profile", PROFILE, "--set", "train.autocast=none", "--json").json()
    (note,) = [note for note in plan["notes"] if "train.autocast" in note]
    assert "bf16 and fp16, bf16 at 2x the fp32 rate" in note
    assert plan["chosen"]["autocast"] == "none"


@pytest.mark.parametrize("given", ["none", "bf16"])
def test_the_note_keeps_its_word(lte: Lte, given: str) -> None:
    pins = ("--method", "ddp", "--profile", PROFILE, "--model", "gpt2", "--set", "train.micro_batch=2")
    command = ("plan", "--tokens", "100000", "--set", "train.activation_checkpointing=false", *pins, "--json")
    picks = lte(*command).json() if given == "bf16" else lte(*command, "--set", "train.autocast=none").json()
    other = lte(*command, "--set", f"train.autocast={'none' if given == 'bf16' else 'bf16'}").json()
    assert picks["chosen"]["autocast"] == given
    time, sent = (other["chosen"][key] / picks["chosen"][key] for key in ("wall_s", "sent_bytes_per_step"))
    assert sent == 1  # autocast is a local matter
    peak = other["chosen"]["memory_bytes"]["total"] / picks["chosen"]["memory_bytes"]["total"]
    (note,) = [note for note in picks["notes"] if "train.autocast" in note]
    assert f"would take {change_text(time)} time and {change_text(peak)} memory" in note


@pytest.mark.parametrize(
    ("line", "formats"),
    [
        ("flags\t\t: fpu avx2 amx_bf16", {"bf16"}),
        ("Features\t: fp asimd asimdhp bf16", {"bf16", "fp16"}),
        ("flags: avx2", set()),
    ],
)
def test_a_processor_tells_in_which_formats_it_multiplies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, formats: set[str]
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(processor, "CPUINFO", info)
    processor.machine_facts.cache_clear()
    try:
        assert processor.multiplied_formats() == formats
        rates = detect_local().device[0].flop_per_s
        assert rates.bf16 == (2 * rates.fp32 if "bf16" in formats else None)
    finally:
        processor.machine_facts.cache_clear()


def test_passes_go_at_the_lower_formats_rate_and_updates_at_the_weights() -> None:
    (device,) = load_profile("t4_x4").device
    slow = device.model_copy(update={"memory_bytes_per_s": 1e30, "efficiency": 1.0})  # arithmetic alone
    run = tiny.variant_run("ddp, muon", train={"dtype": "fp32", "autocast": "fp16"})
    shape = run.model.shape()
    rates = device.flop_per_s
    assert rates.fp16 is not None
    expected = pass_flops(run, shape) / rates.fp16 + update_flops(run, shape) / rates.fp32
    assert device_step_s(run, shape, [slow]) == pytest.approx((expected,))
    assert update_flops(run, shape) > 0


def test_casts_of_weights_cost_memory_traffic() -> None:
    """Frozen weights twice a step, trained ones once: 4 bytes read and 2 written."""
    (device,) = load_profile("t4_x4").device
    slow = device.model_copy(update={"flop_per_s": device.flop_per_s.model_copy(update={"fp32": 1e30, "fp16": 1e30})})
    for name, times in (("ddp", 1), ("lte", 2)):
        runs = [tiny.variant_run(name, train={"dtype": "fp32", "autocast": a}) for a in ("none", "fp16")]
        shape = runs[0].model.shape()
        plain_s, cast_s = (device_step_s(run, shape, [slow])[0] for run in runs)
        casts_s = times * 6 * shape.adapted_parameters / device.memory_bytes_per_s
        assert cast_s - plain_s == pytest.approx(casts_s)
