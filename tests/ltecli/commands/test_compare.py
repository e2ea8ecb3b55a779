"""`lte compare`: a real comparison of two methods, where a rival's keys come from, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from ltecli.app import main
from ltecli.commands.compare import choose_keys, rival_builder
from simulate.config.run import load_given_run, load_run
from tests.ltecli.command import Lte, Refused, write_run
from tests.ltecli.commands.sweeps import train_here


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished comparison of lte with ddp."""
    folder = tmp_path_factory.mktemp("compared")
    run = write_run(folder / "tiny.toml", train={"steps": 4, "evaluate_every": 2})
    line = ("compare", str(run), "--with", "ddp", "--set-for", "ddp:train.learning_rate=0.01", "--quiet")
    with pytest.MonkeyPatch.context() as patch:
        train_here(patch)
        assert main([*line, "--out", str(folder / "done")]) == 0
    return folder / "done"


def test_methods_train_on_the_same_network_data_samples_and_seed(compared: Path) -> None:
    own, rival = (load_run(compared / f"method={name},seed=0" / "run.toml") for name in ("lte", "ddp"))
    assert (own.method.name, rival.method.name) == ("lte", "ddp")
    assert (own.model, own.data, own.cluster) == (rival.model, rival.data, rival.cluster)
    assert rival.train == own.train.model_copy(update={"learning_rate": 0.01})


def test_the_report_says_who_is_best_by_what(lte: Lte, compared: Path) -> None:
    document = lte("report", compared, "--json").json()
    comparison = document["comparison"]
    assert (comparison["reference"], comparison["samples"]) == ("lte", 16)
    by_name = {contender["settings"]["method.name"]: contender for contender in comparison["contenders"]}
    own = by_name["lte"]
    assert comparison["reference_loss"] == own["val_loss"]["mean"]
    assert own["to_reference_loss"]["samples"]["mean"] == 16
    assert own["to_reference_loss"]["sent_bytes"]["mean"] == own["sent_bytes_per_device"]["mean"]
    text = lte("report", compared).stdout
    assert f"Best by {comparison['verdict'].removeprefix('best by ')}." in text
    assert "--seeds 3" in text
    assert text.splitlines()[0].split()[:3] == ["loss,", "16", "samples"]


def test_a_rivals_keys_are_the_plans_choice_or_given(lte: Lte, here: Path, run_toml: Path) -> None:
    base = load_given_run(run_toml)
    rival = choose_keys(base, "powersgd")
    assert rival.source == f"as lte plan chooses on {base.cluster.profile}"
    outcome = lte(
        "compare", run_toml, "--with", "powersgd,diloco", "--set-for", "diloco:method.merge_every=2,4", "--dry-run",
        "--seeds", "2",
    )  # fmt: skip
    assert outcome.stdout.splitlines()[1:] == [
        f"  method={name},seed={seed}"
        for name in ("lte", "powersgd", "diloco,merge_every=2", "diloco,merge_every=4")
        for seed in (0, 1)
    ]
    rank = rival.options.rank  # type: ignore[attr-defined]
    assert f"powersgd: rank {rank}" in outcome.stderr
    assert "; by --set-for method.merge_every 2 and 4" in outcome.stderr
    assert "train.learning_rate = 0.003 is kept for powersgd and diloco" in outcome.stderr


@pytest.mark.parametrize(("steps", "most"), [(20, 10), (100, 20), (1000, 200)])
def test_a_rival_merges_five_times_at_least_where_it_can(here: Path, steps: int, most: int) -> None:
    """The plan tries 10, 30 and 100 steps a round; of 20 steps, 10 are the fewest."""
    base = load_given_run(write_run(here / "run.toml", train={"steps": steps}))
    rival = choose_keys(base, "diloco")
    assert rival.options.round_steps <= most
    end = {20: " for as many rounds as there can be", 100: " for 5 rounds or more", 1000: base.cluster.profile}
    assert rival.source.endswith(end[steps])


def test_a_rival_that_fits_nowhere_gets_its_defaults(here: Path) -> None:
    run = load_given_run(
        write_run(here / "large.toml", model={"name": "llama_7b"}, cluster={"profile": "raspberry_x8", "devices": 2},
                  method={"name": "lte", "rank": 64})
    )  # fmt: skip
    assert choose_keys(run, "ddp").source == "defaults: none of its settings fits raspberry_x8"


def test_fewer_devices_at_a_time_take_more_steps_for_the_samples(here: Path) -> None:
    base = load_given_run(write_run(here / "run.toml", cluster={"devices": 4}, train={"warmup_steps": 2}))
    build = rival_builder(base, choose_keys(base, "local-sgd"))
    half = ["method.participation=0.5", "method.merge_transport=server", "method.merge_optimizer=reset"]
    train = build(half).train
    assert (train.steps, train.evaluate_every, train.warmup_steps) == (16, 8, 4)
    assert build([]).train == base.train
    assert build([*half, "train.steps=10"]).train.steps == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--with", "lte"), ("lte is the run's own method",)),
        (("--with", "ddp,ddp"), ("ddp is named twice",)),
        (("--with", "ddp,"), ("a name is empty",)),
        (("--with", "dilco"), ("did you mean 'diloco'",)),
        (("--with", "ddp", "--set", "train.steps=4,8"), ("one value a key", "lte sweep")),
        (("--with", "ddp", "--set-for", "diloco:method.merge_every=2"), ("METHOD:table.key=value", "(ddp)")),
        (("--with", "ddp", "--set-for", "train.steps=4"), ("METHOD:table.key=value",)),
        (("--with", "diloco", "--set-for", "diloco:method.rank=2"), ("method=diloco", "method.rank", "--skip-refused")),
    ],
)
def test_mistakes_are_refused(
    refused: Refused, run_toml: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """Past the hints on stderr, which --quiet leaves out."""
    refused("compare", run_toml, *options, "--quiet", words=words)
