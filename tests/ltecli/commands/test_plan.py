"""`lte plan`: the JSON contract, pins, the written run.toml, warnings, rejections and refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simulate.config.method_options import DEFAULT_SCALE
from simulate.config.profiles import load_profile
from simulate.config.run import load_given_run, load_run
from simulate.methods.lte.options import LteOptions
from simulate.planning.notes import best_batch
from tests.ltecli.command import PROFILE, Lte, Refused, assert_one_line, lte_process, write_prose

TOP_KEYS = {"version", "profile", "model", "chosen", "candidates", "rejected", "notes"}
CANDIDATE_KEYS = {
    "method", "rank", "heads", "heads_per_device", "quantize", "merge_every", "merge_transport", "micro_batch",
    "activation_checkpointing", "memory_bytes", "sent_bytes_per_round", "sent_bytes_per_step",
    "received_bytes_per_step", "step_s", "round_s", "samples_per_s", "wall_s", "warnings",
}  # fmt: skip
MEMORY_KEYS = {
    "total",
    "weights",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "temporary",
    "allocator",
    "reserved",
}
HOME = ("plan", "--profile", PROFILE)
ONE_BATCH = ("--tokens", "100000", "--set", "train.micro_batch=4", "--set", "train.activation_checkpointing=false")
SMALL = (*HOME, *ONE_BATCH)
ONE_METHOD = ("--method", "lte", "--rank", "8", "--merge-every", "10")
"""Pins that leave the batch open."""


def every_candidate(plan: Any) -> list[Any]:
    dense = [plan["dense"]] if plan["dense"] else []
    return [*plan["candidates"], *(rejected["candidate"] for rejected in plan["rejected"]), *dense]


def test_the_json_keeps_its_contract(gpt2: Any) -> None:
    assert gpt2.keys() >= TOP_KEYS
    assert gpt2["model"].keys() >= {"name", "parameters", "adapted_parameters"}
    assert gpt2["chosen"] in gpt2["candidates"]
    for candidate in every_candidate(gpt2):
        assert candidate.keys() >= CANDIDATE_KEYS
        memory = candidate["memory_bytes"]
        assert memory.keys() == MEMORY_KEYS
        assert memory["total"] == sum(size for part, size in memory.items() if part != "total")


def test_gpt2_at_home_has_hundreds_of_candidates_and_dense_beside_the_choice(gpt2: Any) -> None:
    assert len(gpt2["candidates"]) >= 500
    assert gpt2["dense"]["method"] == "ddp"
    assert gpt2["dense"]["wall_s"] > 0


def test_candidates_fit_and_the_rejected_say_why_they_do_not(gpt2: Any) -> None:
    device = load_profile(PROFILE).device[0]
    assert all(c["memory_bytes"]["total"] <= device.usable_bytes < device.memory_bytes for c in gpt2["candidates"])
    assert gpt2["rejected"]
    for rejected in gpt2["rejected"]:
        assert rejected["candidate"]["memory_bytes"]["total"] > device.usable_bytes
        assert "needs" in rejected["reason"]
        assert device.kind in rejected["reason"]


def test_candidates_rank_by_time_to_equal_loss(gpt2: Any) -> None:
    times = [candidate["equivalent_wall_s"] for candidate in gpt2["candidates"]]
    assert times == sorted(times)
    without_extra = [c for c in gpt2["candidates"] if not c["quantize"].startswith("nf4")]
    assert gpt2["chosen"] == without_extra[0]


def test_gpt2_has_its_published_size(gpt2: Any) -> None:
    assert gpt2["model"] == {"name": "gpt2", "parameters": 124_439_808, "adapted_parameters": 84_934_656}


def test_equal_requests_give_equal_plans(lte: Lte, tmp_path: Path) -> None:
    command = (*SMALL, "--json")
    other_process = lte_process(*command, cwd=tmp_path).outcome()
    assert lte(*command).stdout == lte(*command).stdout == other_process.stdout


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("--method", "method", "ddp"),
        ("--method", "method", "lte"),
        ("--rank", "rank", 24),
        ("--heads-per-device", "heads_per_device", 2),
        ("--quantize", "quantize", "int8"),
        ("--merge-every", "merge_every", 7),
        ("--set", "merge_transport", "server"),
        ("--set", "reset", "b"),
    ],
)
def test_a_pin_holds_for_every_candidate(lte: Lte, option: str, key: str, value: object) -> None:
    given = f"method.{key}={value}" if option == "--set" else str(value)
    plan = lte(*SMALL, option, given, "--json").json()
    assert plan["candidates"]
    assert {candidate[key] for candidate in plan["candidates"]} == {value}


def test_pinned_training_keys_hold(lte: Lte) -> None:
    plan = lte(*SMALL, "--json").json()
    batches = {(c["micro_batch"], c["activation_checkpointing"]) for c in plan["candidates"]}
    assert batches == {(4, False)}


def test_a_pinned_alpha_is_kept_and_a_free_one_follows_the_rank(lte: Lte, here: Path) -> None:
    lte(*SMALL, "--rank", "8", "--set", "method.alpha=2048", "-o", "pinned.toml")
    lte(*SMALL, "--rank", "8", "--method", "lte", "-o", "free.toml")
    assert [load_run(here / name).method.alpha for name in ("pinned.toml", "free.toml")] == [2048, DEFAULT_SCALE * 8]  # type: ignore[union-attr]


@pytest.mark.parametrize("devices", [1, 3, 16])
def test_devices_may_differ_from_the_profile(lte: Lte, devices: int) -> None:
    plan = lte(*SMALL, "--devices", str(devices), "--method", "lte", "--json").json()
    assert plan["devices"] == devices
    assert all(c["heads"] == devices * c["heads_per_device"] for c in plan["candidates"])
    assert all((c["sent_bytes_per_step"] == 0) == (devices == 1) for c in plan["candidates"])


def test_dense_stands_beside_a_pinned_method(lte: Lte) -> None:
    plan = lte(*SMALL, "--method", "lte", "--json").json()
    assert plan["dense"]["method"] == "ddp"
    assert "beside dense" in lte(*SMALL, "--method", "lte", "--all").stdout


@pytest.mark.usefixtures("two_batches")
def test_the_written_run_is_the_choice(lte: Lte, here: Path) -> None:
    keys = ("--set", "train.seed=5", "--set", "model.context=64")
    outcome = lte(*HOME, "--tokens", "100000", "--method", "lte", *keys, "-o", "run.toml", "--json")
    chosen, run = outcome.json()["chosen"], load_run(here / "run.toml")
    assert isinstance(run.method, LteOptions)
    method = {key: chosen[key] for key in ("rank", "heads_per_device", "quantize", "merge_every", "merge_transport")}
    assert {key: getattr(run.method, key) for key in method} == method
    train = {key: chosen[key] for key in ("steps", "micro_batch", "activation_checkpointing")}
    assert {key: getattr(run.train, key) for key in train} == train
    assert (run.cluster.profile, run.cluster.devices) == (PROFILE, 4)
    assert (run.train.seed, run.model.context) == (5, 64)
    assert outcome.stderr == "wrote run.toml; next: lte train run.toml\n"


def test_a_written_run_may_be_edited_by_hand(lte: Lte, here: Path) -> None:
    lte(*SMALL, "--method", "lte", "-o", "run.toml")
    edited = here / "run.toml"
    edited.write_text("# mine\n" + edited.read_text().replace("seed = 0", "seed = 9 # lucky\n# as I like it"))
    assert load_run(edited).train.seed == 9


def test_a_file_is_replaced_only_by_force(lte: Lte, refused: Refused, here: Path) -> None:
    (here / "run.toml").write_text("mine")
    refused(*SMALL, "-o", "run.toml", words=("run.toml exists", "--force"))
    assert lte(*SMALL, "-o", "run.toml", "--force").code == 0
    assert load_run(here / "run.toml").cluster.profile == PROFILE


def test_nothing_is_written_without_being_asked(lte: Lte, here: Path) -> None:
    assert lte(*SMALL).code == 0
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("target", [".", "/dev/null/run.toml", "/proc/run.toml"])
def test_a_target_that_cannot_be_written_is_refused(lte: Lte, here: Path, target: str) -> None:
    assert_one_line(lte(*SMALL, "-o", target), 2, ("--out", target))
    assert list(here.iterdir()) == []


def warnings_of(lte: Lte, *arguments: str) -> list[str]:
    return [" ".join(c["warnings"]) for c in lte(*SMALL, *arguments, "--json").json()["candidates"]]


def test_too_small_a_rank_is_warned_about(lte: Lte) -> None:
    low = ("--devices", "2", "--method", "lte", "--heads-per-device", "1")
    assert all(
        "rank x heads = 16 is below the largest layer dimension 128" in w for w in warnings_of(lte, *low, "--rank", "8")
    )
    assert not any("rank x heads" in w for w in warnings_of(lte, *low, "--rank", "64"))


def test_a_transport_dearer_than_dense_reduction_is_warned_about(lte: Lte) -> None:
    pins = ("--method", "lte", "--set", "method.merge_transport=gather", "--set", "method.wire=full")
    many = ("--devices", "8", "--heads-per-device", "1", *pins)
    assert all(
        "gather takes longer than reducing the dense delta" in w for w in warnings_of(lte, *many, "--rank", "64")
    )
    few = ("--devices", "2", *pins)
    assert not any("takes longer" in w for w in warnings_of(lte, *few, "--rank", "8", "--heads-per-device", "1"))


def test_a_dominating_link_is_warned_about(lte: Lte) -> None:
    full = ("--method", "ddp", "--set", "method.wire=full")
    assert all("the link dominates" in w for w in warnings_of(lte, *full))
    assert not any("the link dominates" in w for w in warnings_of(lte, "--devices", "1"))


def test_warnings_of_the_choice_are_shown(lte: Lte) -> None:
    full = (*SMALL, "--method", "ddp", "--set", "method.wire=full")
    assert "warning: the link dominates" in lte(*full, "--all").stdout
    assert "! Exchange takes most time: --set" in lte(*full).stdout


def test_a_plan_with_a_quorum_is_trained_as_it_is_and_suggests_nothing_that_a_quorum_refuses(
    lte: Lte, here: Path
) -> None:
    asked = (*SMALL, "--method", "lte", "--set", "cluster.quorum=3", "--set", "method.wire=full")
    screens = [lte(*asked), lte(*asked, "-o", "quorum.toml", "--all")]
    text = " ".join(f"{screen.stdout} {screen.stderr}" for screen in screens)
    assert load_given_run(here / "quorum.toml").cluster.quorum == 3
    assert "Exchange takes most time: --set method.wire=int8, or a higher --merge-every" in text
    assert "merges go on with 3 of 4 devices" in text
    assert "method.wire = int8" in text and "pace = deadline" not in text
    assert "all devices repeat" not in text
    assert "100% of the samples" not in text  # devices of one kind are equally fast


def test_a_plan_gives_each_kind_of_device_a_batch_with_a_quorum_and_int8_too(lte: Lte, here: Path) -> None:
    mixed = ("plan", "-p", "mixed_gtx1080ti_rtx2060_rtx3090", "--model", "gpt2", "--method", "lte", "--rank", "64")
    few = ("--heads-per-device", "4", "--merge-every", "10", "--quantize", "none")
    asked = ("--set", "cluster.quorum=2", "--set", "method.wire=int8")
    plan = lte(*mixed, *few, *asked, "-o", "run.toml", "--all")
    run = load_given_run(here / "run.toml")
    assert run.cluster.quorum == 2 and getattr(run.method, "wire", "") == "int8"
    batches = [one.train.device_batch for one in run.classes]
    assert len(set(batches)) == 3 and batches[2] > batches[0]
    assert "with a batch for each kind of device ([[cluster.class]])" in plan.stdout + plan.stderr
    assert "idle for" not in plan.stdout + plan.stderr  # who is slower takes fewer steps


def test_nothing_feasible_names_the_nearest_miss(lte: Lte, here: Path) -> None:
    outcome = lte("plan", "--profile", "raspberry_x8", "--model", "gpt2_xl", *ONE_METHOD, "-o", "run.toml", "--json")
    assert_one_line(outcome, 3, ("nearest miss", "8.59 GB", "more on each device would do", "model.context"))
    assert outcome.json()["chosen"] is None
    assert list(here.iterdir()) == []


def test_host_memory_counts_too(lte: Lte, here: Path) -> None:
    profile = lte("profile", "show", PROFILE).stdout.replace(
        "host_memory_bytes = 17179869184", "host_memory_bytes = 500_000"
    )
    (here / "bare.toml").write_text(profile)
    bare = ("plan", "-p", "bare.toml", *ONE_BATCH)
    plan = lte(*bare, "--method", "lte", "--set", "method.reset=none", "--json")
    assert_one_line(plan, 3, ("of host memory", "more on each host would do"))
    assert lte(*bare, "--set", "method.reset=b").code == 0


def test_a_long_warm_up_leaves_out_too_short_candidates(lte: Lte, refused: Refused, here: Path) -> None:
    warm = ("--method", "ddp", "--tokens", "100000", "--set", "train.warmup_steps=50")
    plan = lte(*HOME, *warm, "-o", "run.toml", "--json").json()
    assert min(candidate["steps"] for candidate in plan["candidates"]) > 50
    assert load_run(here / "run.toml").train.warmup_steps == 50
    refused(*HOME, "--tokens", "600", "--set", "train.warmup_steps=50", words=("train.warmup_steps = 50", "--tokens"))
    long = ("--method", "ddp", "--tokens", "10000000", "--set", "train.warmup_steps=2000")
    assert lte(*HOME, *long).code == 0


def test_data_is_read_from_files_and_folders_of_any_depth(lte: Lte, here: Path) -> None:
    folder = here / "bücher" / "eins"
    (folder / ".git").mkdir(parents=True)
    write_prose(folder / "é.txt")
    (folder / ".git" / "object").write_bytes(b"\x00")
    assert lte(*SMALL, "--data", "bücher").code == 0
    assert lte(*SMALL, "--data", folder / "é.txt").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--profile rtx3060", ("profile = 'rtx3060'", "did you mean", "known:")),
        ("--model gpt3", ("'gpt3'", "did you mean 'gpt'?", "gpt2_xl")),
        ("--method lt", ("method.name = 'lt'", "did you mean 'lte'?", "ddp")),
        ("--method nope", ("method.name = 'nope' is not a method; known: adamix",)),
        ("--quantize int4", ("method.quantize = 'int4'", "did you mean 'int8'?")),
        ("--devices 0", ("cluster.devices = 0", "greater than 0")),
        ("--devices -2", ("cluster.devices = -2", "greater than 0")),
        ("--devices 1000000", ("1000000 devices", "fewer --devices")),
        ("--profile mixed_gtx1080ti_rtx2060_rtx3090 --devices 4", ("cluster.devices = 4", "at most 3")),
        ("--tokens 0", ("--tokens 0", "greater than 0")),
        ("--tokens -5", ("--tokens -5", "greater than 0")),
        (f"--tokens {'9' * 400}", ("--tokens", "64 bits")),
        ("--rank 0", ("method.rank = 0", "greater than 0")),
        ("--rank 129", ("method.rank = 129 exceeds the 128", "--set method.rank=128")),
        ("--merge-every -1", ("method.merge_every = -1", "greater than 0")),
        ("--heads-per-device 0", ("method.heads_per_device = 0",)),
        ("--heads-per-device 3 --set train.micro_batch=4", ("train.micro_batch = 4", "not divisible", "micro_batch=3")),
        ("--method ddp --rank 8", ("--rank is for lte, lora", "the method is ddp")),
        ("--rank 8 --set method.rank=16", ("method.rank is given twice", "keep one")),
        ("--tokens 1000 --set train.steps=5", ("--tokens and train.steps", "keep one")),
        ("--batch-tokens 0", ("--batch-tokens 0", "greater than 0")),
        ("--batch-samples 64", ("--batch-samples 64", "trained on tokens", "--batch-tokens")),
        ("-m vit --batch-tokens 64", ("--batch-tokens 64", "trained on samples", "--batch-samples")),
        (
            "--batch-tokens 64 --set train.micro_batch=2 --set train.accumulate=2",
            ("--batch-tokens", "train.micro_batch x train.accumulate", "leave one"),
        ),
        ("--set train.accumulate=0", ("train.accumulate = 0", "greater than 0")),
        ("--set train.steps=5 --set train.warmup_steps=5", ("train.warmup_steps = 5", "train.steps = 5")),
        ("--set train.steps=abc", ("train.steps = 'abc'", "integer")),
        ("--set train.steps=1.5", ("train.steps = 1.5", "integer")),
        ("--set train.steps=true", ("train.steps = True", "integer")),
        ("--set train.learning_rate=nan", ("train.learning_rate = nan", "finite")),
        ("--set train.learning_rate=inf", ("train.learning_rate = inf", "finite")),
        ("--set train.learning_rate=-1", ("train.learning_rate = -1", "greater than 0")),
        ("--set train.dtype=fp17", ("train.dtype = 'fp17'", "did you mean")),
        ("--set model.layers=0", ("model.layers = 0", "greater than 0")),
        ("--set model.layers=10000000", ("model.layers = 10000000", "1000")),
        (f"--set model.width={'9' * 30}", ("model.width", "64 bits")),
        ("--set model.width=17", ("width = 17", "not divisible by attention_heads = 4")),
        ("--set model.vocab=100", ("model.vocab = 100", "--set model.vocab=256")),
        ("--set model.name=5", ("model.name = 5", "string")),
        ("--set modle.layers=2", ("modle is not a known key", "did you mean 'model'?")),
        ("--set model.layer=2", ("model.layer is not a known key", "did you mean 'layers'?")),
        ("--set foo", ("--set foo", "table.key=value")),
        ("--set =", ("--set =", "table.key=value")),
        ("--set a.b.c=1", ("--set a.b.c=1", "table.key=value")),
        ("--set model=3", ("--set model=3", "table.key=value")),
        ("--data nowhere.txt", ("data.path = 'nowhere.txt'", "does not exist")),
        ("--data nowhere.txt --set data.name=stdlib", ("exactly one of name", "path")),
        ("--set data.name=wikipedia", ("name = 'wikipedia'", "known: digits, hf:NAME, stdlib")),
    ],
)  # fmt: skip
def test_a_mistake_is_named_and_nothing_written(refused: Refused, arguments: str, words: tuple[str, ...]) -> None:
    refused("plan", "-o", "run.toml", *arguments.split(), words=words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("is empty",)),
        (b" \n\n", ("is empty",)),
        (b"too short", ("has 9 bytes", "need 1,291", "model.context")),
        (b"a\x00b", ("binary", "NUL")),
        (b"ab\xff", ("not UTF-8", "byte 2")),
    ],
)
def test_data_that_cannot_be_used_is_refused(
    refused: Refused, here: Path, content: bytes, words: tuple[str, ...]
) -> None:
    (here / "folder").mkdir()
    (here / "folder" / "text").write_bytes(content)
    refused("plan", "--data", "folder/text", words=("folder/text", *words))
    refused("plan", "--data", "folder", words=("folder", *words))


def test_an_empty_folder_is_no_data(refused: Refused, here: Path) -> None:
    (here / "empty").mkdir()
    refused("plan", "--data", "empty", words=("empty", "without files"))


def test_a_plan_of_full_messages_names_the_smaller_ones(lte: Lte) -> None:
    pins = ("--profile", "gtx1080ti_x8", *ONE_BATCH, "--method", "lte", "--rank", "8", "--json")

    def notes(*more: str) -> str:
        return "\n".join(lte("plan", *pins, *more).json()["notes"])

    assert "method.wire = int8 sends about a quarter" in notes("--set", "method.wire=full")
    assert "about a quarter" not in notes()
    assert "about a quarter" not in notes("--devices", "1")


def test_a_plan_for_unequal_devices_says_what_a_deadline_would_do(lte: Lte) -> None:
    devices = ("--profile", "mixed_gtx1080ti_rtx2060_rtx3090", "--devices", "3", "--set", "train.micro_batch=16")
    # By itself the plan lets a majority merge, which stands for a deadline.
    mixed = (*devices, "--set", "cluster.quorum=3", "--method", "local-sgd", "--json")
    notes = "\n".join(lte("plan", *mixed).json()["notes"])
    assert "method.pace = deadline nobody waits" in notes
    paced = lte("plan", *mixed, "--set", "method.pace=deadline").json()
    assert "nobody waits" not in "\n".join(paced["notes"])
    assert any("of the samples that they would in lockstep" in warning for warning in paced["chosen"]["warnings"])
    same = lte("plan", "--profile", "gtx1080ti_x8", *ONE_BATCH, "--method", "local-sgd", "--json").json()
    assert "nobody waits" not in "\n".join(same["notes"])


def test_hints_go_to_stderr_and_results_to_stdout(lte: Lte) -> None:
    text, json = lte(*SMALL), lte(*SMALL, "--json")
    assert text.stderr == json.stderr
    assert text.stderr.startswith("next  lte plan ... -o run.toml") and text.stderr.count("\n") == 1
    assert "Can it?" in text.stdout
    assert json.json()["version"] == 1


def batches_of(plan: Any) -> set[tuple[int, int]]:
    return {(c["micro_batch"], c["accumulate"]) for c in every_candidate(plan)}


@pytest.mark.parametrize(
    ("asked", "batches", "note"),
    [
        # Four devices and 128 tokens a sample: 512 tokens for one sample of each device.
        ("16384", {(1, 32), (2, 16), (4, 8), (8, 4), (16, 2), (32, 1)}, "as asked"),
        ("5000", {(1, 10), (2, 5)}, "near the 5,000 asked for"),  # 5,120; 4 x 2 would be 4,096
        # 85 samples of each device; 2 x 42 and 4 x 21 are 1.2 % away, 8 x 11 and 16 x 5 more than 2 %.
        ("43520", {(1, 85), (2, 42), (4, 21)}, "asked"),
        ("100", {(1, 1)}, "near the 100 asked for"),
    ],
)
def test_a_step_comes_near_to_the_tokens_asked_for(
    lte: Lte, asked: str, batches: set[tuple[int, int]], note: str
) -> None:
    plan = lte(*HOME, "--tokens", "100000", *ONE_METHOD, "--batch-tokens", asked, "--json").json()
    assert batches_of({**plan, "dense": None}) == batches
    chosen = plan["chosen"]
    tokens = chosen["micro_batch"] * chosen["accumulate"] * 4 * 128
    assert chosen["steps"] == -(-100_000 // tokens)
    assert any(f"a step has {tokens:,} tokens" in text and note in text for text in plan["notes"])


def test_a_pinned_half_of_the_batch_leaves_the_other_free(lte: Lte) -> None:
    command = (*HOME, "--tokens", "100000", *ONE_METHOD, "--batch-tokens", "16384", "--json", "--set")
    assert batches_of(lte(*command, "train.micro_batch=4").json()) == {(4, 8)}
    assert batches_of(lte(*command, "train.accumulate=4").json()) == {(8, 4)}


@pytest.mark.parametrize(
    ("arguments", "least", "smallest"),
    [
        (("--model", "vit", "--samples", "50000"), 32, {(1, 8), (2, 4), (4, 2), (8, 1)}),
        (("--set", "model.context=16", "--tokens", "100000"), 512, {(1, 8), (2, 4), (4, 2), (8, 1)}),
        (("--tokens", "100000"), 512, {(1, 1)}),
    ],
)
def test_no_step_is_smaller_than_the_rule_of_the_default_batch(
    lte: Lte, arguments: tuple[str, ...], least: int, smallest: set[tuple[int, int]]
) -> None:
    plan = lte(*HOME, *arguments, *ONE_METHOD, "--json").json()
    unit = 1 if least == 32 else 16 if "model.context=16" in arguments else 128
    sizes = {batch: batch[0] * batch[1] * 4 * unit for batch in batches_of(plan)}
    assert min(sizes.values()) == least
    assert {batch for batch, size in sizes.items() if size == least} == smallest
    assert {batch[0] for batch in sizes} == {1, 2, 4, 8, 16, 32}  # one a micro_batch: the grid does not grow
    assert any(f"no step has fewer than {least}" in note for note in plan["notes"])


def test_a_batch_that_is_given_stays_as_it_is(lte: Lte) -> None:
    command = (*HOME, *ONE_METHOD, "--model", "vit", "--samples", "50000", "--set", "train.micro_batch=1")
    plan = lte(*command, "--json").json()
    assert batches_of(plan) == {(1, 1)} and any("samples" in n and "as given" in n for n in plan["notes"])


def test_the_power_laws_batch_is_the_published_one() -> None:
    """At 1e18 operations, 0.2920 x 1e18^0.3271 = 225,519 tokens, in two digits."""
    shape = SimpleNamespace(parameters=10**8)
    candidate = SimpleNamespace(context=SimpleNamespace(shape=shape), tokens=10**10 / 6)
    assert best_batch(candidate) == 230_000  # type: ignore[arg-type]


def test_a_written_plan_also_runs_with_few_steps(lte: Lte, here: Path) -> None:
    assert lte(*SMALL, "-o", "run.toml").code == 0
    planned, short = load_run(here / "run.toml"), load_given_run(here / "run.toml", ["train.steps=10"])
    assert planned.train.warmup_share == 0.05 and planned.train.warmup_steps is None
    assert planned.train.num_warmup_steps == planned.train.steps // 20 > 0
    assert short.train.num_warmup_steps == 0


def test_a_long_warm_up_is_cut_at_2000_steps(lte: Lte, here: Path) -> None:
    lte(*HOME, *ONE_METHOD, "--set", "train.steps=123457", "--set", "train.micro_batch=4", "-o", "run.toml")
    assert load_run(here / "run.toml").train.num_warmup_steps == 2000


def test_a_plan_says_which_layers_pick_columns(lte: Lte) -> None:
    """Eight heads of rank 96 cover the 768 inputs of GPT-2's layers, and not the 3,072 of the MLP's second."""
    pins = ("--set", "method.draws=columns", "--set", "method.rank=96", "--set", "method.heads_per_device=1")
    notes = lte("plan", "--profile", "raspberry_x8", "--model", "gpt2", "--method", "lte", *pins, "--json").json()[
        "notes"
    ]
    (note,) = (line for line in notes if line.startswith("method.draws = columns"))
    assert note.endswith("drawn jointly in blocks.*.mlp.down, whose inputs are more than 8 heads x rank 96 cover")
