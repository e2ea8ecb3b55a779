"""Tests of the API: it gives what the commands print, and trains objects as plain PyTorch does."""

from __future__ import annotations

import copy
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ltecli
from simulate.common.events import Event
from simulate.data import samples as samples_module
from simulate.data.batches import SampleBatches
from simulate.data.samples import Samples, read_samples
from tests.ltecli.command import PROFILE, Lte, tree, write_run
from tests.networks import Convolutional
from tests.reference.common import adamw, take_step

TIMES = ("wall_s", "path", "machines", "threads")
"""Figures of events that differ between equal runs."""
SMALL = {"model.layers": 1, "model.width": 8, "model.attention_heads": 1, "model.context": 8}
TRAIN = {"micro_batch": 4, "evaluate_every": 3, "evaluate_samples": 8, "learning_rate": 0.01, "dtype": "fp64"}


class Net(nn.Module):
    """Six numbers in, two out."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(x))
        return logits


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """A map-style data set without iteration."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.x[number], self.y[number]


def huber(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.huber_loss(outputs, targets, delta=0.5)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(3)
    return Net()


@pytest.fixture
def xy() -> tuple[Tensor, Tensor]:
    """Inputs, and targets of a regression."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(60, 6, generator=generator)
    return x, torch.stack([x.sum(1), x[:, 0] * x[:, 1]], dim=1)


@pytest.fixture
def classes(xy: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same inputs, and one of two classes each."""
    return xy[0], (xy[0].sum(1) > 0).long()


def plan_of(net: nn.Module, data: Any, devices: int = 2, **options: Any) -> ltecli.Plan:
    """Plan with little to choose, so that it takes a moment."""
    keys = {**TRAIN, **options.pop("train", {})}
    if options.get("method", "lte") == "lte":
        options = {"method": "lte", "rank": 2, "merge_every": 3, "quantize": "none", "heads_per_device": 1, **options}
    given = {"train.accumulate": 1, "train.autocast": "none", **options.pop("set", {})}
    return ltecli.plan(PROFILE, model=net, data=data, devices=devices, set=given, steps=6, **options, **keys)


def same_numbers(events: list[Event]) -> list[Event]:
    """Return events without what differs between equal runs."""
    kept = ("step", "evaluate", "round", "end")
    return [{k: v for k, v in event.items() if k not in TIMES} for event in events if event["kind"] in kept]


# The commands and the API are one path.


def test_the_import_costs_nothing_and_a_plan_no_torch() -> None:
    code = (
        "import sys, ltecli as lte\n"
        "assert not any(name.startswith(('ltecli.', 'simulate', 'pydantic', 'rich')) for name in sys.modules)\n"
        "assert {'plan', 'train', 'open', 'InputError'} <= set(dir(lte))\n"
        "lte.plan('gtx1080ti_x8', model='gpt2', tokens='1M', method='ddp')\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ltecli.nothing


@pytest.mark.usefixtures("two_batches")
def test_a_plan_is_what_the_command_prints_and_writes(here: Path, lte: Lte) -> None:
    options = ("--profile", PROFILE, "--model", "gpt", "--tokens", "400k", "--set", "train.seed=7", "--rank", "8")
    plan = ltecli.plan(PROFILE, model="gpt", tokens="400k", rank=8, seed=7)
    assert lte("plan", *options, "-o", "run.toml").stdout == f"{plan}\n"
    assert (here / "run.toml").read_text() == plan.run_toml()
    assert lte("plan", *options, "--all").stdout == f"{plan.details()}\n"
    assert json.loads(lte("plan", *options, "--json").stdout) == {**plan.to_dict(), "why": None, "timeline": None}
    assert plan.chosen in plan.candidates
    for text in (plan.verdict.title, *(answer.answer for answer in plan.verdict.answers)):
        assert text.replace(">", "&gt;") in plan._repr_html_()
    assert plan.verdict.title in repr(plan)


def test_a_run_is_what_the_command_trains(here: Path, run_toml: Path, lte: Lte) -> None:
    assert lte("train", run_toml, "--out", "one", "--set", "train.steps=6").code == 0
    run = ltecli.train(run_toml, out="two", steps=6)
    assert same_numbers(run.events) == same_numbers(ltecli.open("one").events)
    assert run.is_finished
    assert run.config.train.steps == 6
    outcome = lte("report", "two")
    assert outcome.stdout == f"{run.report()}\n"
    assert json.loads(lte("report", "two", "--json").stdout) == json.loads(json.dumps(run.report()))


def test_nothing_is_printed(here: Path, run_toml: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ltecli.train(run_toml, out="quiet", steps=3)
    assert capfd.readouterr() == ("", "")
    ltecli.train(run_toml, out="said", steps=3, quiet=False)
    out, err = capfd.readouterr()
    assert out == ""
    assert "derived:" in err


def test_folders_of_plans_are_numbered(here: Path) -> None:
    plan = ltecli.plan(PROFILE, model="gpt", devices=1, method="ddp", set=SMALL, micro_batch=1, steps=1)
    paths = [plan.train(evaluate_samples=1).path for _ in range(2)]
    assert paths == [Path("runs/gpt"), Path("runs/gpt-2")]
    assert ltecli.train(ltecli.open(paths[0])).path == Path("runs/gpt-3")


def test_a_plan_in_which_nothing_fits_trains_nothing(here: Path) -> None:
    plan = ltecli.plan("gtx1080ti_x8", model="llama_7b", method="ddp")
    assert plan.chosen is None
    assert plan.verdict.answers[0].answer == "no"
    for ask in (plan.run_toml, plan.train):
        with pytest.raises(ltecli.NothingFeasibleError, match="nothing fits profile gtx1080ti_x8"):
            ask()
    assert not tree(here)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ltecli.plan(learning_rat=1), "learning_rat is no option, and no key of"),
        (lambda: ltecli.plan(device=2), "device is no option, and no key of [train]: did you mean 'devices'?"),
        (lambda: ltecli.train(callback=print), "did you mean 'on_event'?"),
        (lambda: ltecli.plan(tokens="many"), "tokens = 'many'"),
        (lambda: ltecli.plan(set={"train.seed": {}}), "a run.toml holds numbers, texts"),
        (lambda: ltecli.plan(model=Net), "a torch.nn.Module, or a name from docs/models.md"),
        (lambda: ltecli.plan(loss=huber), "loss is for networks of your own"),
        (lambda: ltecli.plan(model=Net(), loss=nn.Bilinear(2, 2, 1)), "it has parameters, which would not be trained"),
        (lambda: ltecli.plan(model=Net(), data=3), "data = int: a path, a data set of samples"),
        (lambda: ltecli.plan(validation=[(1, 2)]), "belong to data that is an object"),
        (lambda: ltecli.open("nowhere"), "nowhere is no run folder"),
        (lambda: ltecli.train("nowhere.toml"), "nowhere.toml"),
        (lambda: ltecli.train(processes=99), "--processes 99 are more than cluster.devices"),
    ],
    ids=[
        "keyword",
        "keyword for devices",
        "keyword for events",
        "count",
        "value",
        "class",
        "loss",
        "trained loss",
        "data",
        "validation",
        "folder",
        "file",
        "processes",
    ],
)
def test_mistakes_are_exceptions_of_one_line(call: Any, words: str, here: Path) -> None:
    with pytest.raises(ltecli.InputError) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not tree(here)


# Events.


def test_a_function_gets_every_event_as_the_file_has_it(here: Path, run_toml: Path) -> None:
    seen: list[Event] = []
    run = ltecli.train(run_toml, out="run", on_event=seen.append)
    assert [{"version": 1, **event} for event in seen] == run.events


@pytest.mark.parametrize("at", [1, 4, 8])
def test_what_the_function_raises_ends_the_run_with_a_checkpoint(at: int, here: Path, run_toml: Path) -> None:
    def fail(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == at:
            raise OSError("enough")

    whole = ltecli.train(run_toml, out="whole")
    with pytest.raises(OSError, match=r"^enough$"):
        ltecli.train(run_toml, out="run", on_event=fail)
    run = ltecli.open("run")
    assert run.events[-1]["kind"] == ("end" if at == 8 else "interrupt")
    run.resume()
    assert same_numbers(run.events) == same_numbers(whole.events)


def test_ctrl_c_saves_and_raises_and_another_thread_trains_too(here: Path, run_toml: Path) -> None:
    def interrupt(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"lte\.open"):
        ltecli.train(run_toml, out="run", on_event=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    thread = threading.Thread(target=lambda: ltecli.open("run").resume())
    thread.start()
    thread.join()
    assert ltecli.open("run").is_finished


# Results.


def test_metrics_are_a_table_or_a_list(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = ltecli.open(trained).metrics
    assert list(table["step"]) == list(range(1, 9))
    assert list(table["val_loss"].notna()) == [step in (6, 8) for step in range(1, 9)]
    monkeypatch.setitem(sys.modules, "pandas", None)
    rows = ltecli.open(trained).metrics
    assert [row["train_loss"] for row in rows] == list(table["train_loss"])
    assert rows[0]["val_loss"] is None


def test_a_plot_has_the_run_s_points(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ltecli.open(trained)
    figure = run.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    lines = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [
        [event[key] for event in run.events if key in event] for key in ("train_loss", "val_loss")
    ]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ltecli.InputError, match="pip install matplotlib"):
        run.plot()


def test_the_weights_are_those_that_export_writes(trained: Path, lte: Lte) -> None:
    assert lte("export", trained).code == 0
    weights, exported = ltecli.open(trained).state_dict(), load_file(trained / "export" / "model.safetensors")
    assert weights.keys() == exported.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, exported[name], rtol=0, atol=0)


# Objects.


def plain_weights(net: Net, run: ltecli.Run, data: Samples, loss: Any) -> tuple[dict[str, Tensor], list[float]]:
    """Return the weights and losses of a loop of plain PyTorch on the batches of the run's one device."""
    train, batches = run.config.train, SampleBatches(run.config, data)
    model = copy.deepcopy(net).double()
    optimizer = adamw(train, [(list(model.parameters()), train.learning_rate)])
    losses = []
    for step in range(train.steps):
        mean = loss(model(batches.batch(step, range(1))[0]), batches.batch(step, range(1))[1])
        gradients = dict(zip(model.parameters(), torch.autograd.grad(mean, list(model.parameters())), strict=True))
        take_step(optimizer, gradients, train, step)
        losses.append(float(mean.detach()))
    return model.state_dict(), losses


@pytest.mark.parametrize("loss", [huber, None], ids=["own loss", "cross-entropy"])
def test_one_dense_device_trains_as_a_plain_loop_does(
    loss: Any, here: Path, net: Net, xy: tuple[Tensor, Tensor], classes: tuple[Tensor, Tensor]
) -> None:
    data = xy if loss else classes
    before = copy.deepcopy(net.state_dict())
    plan = plan_of(net, Pairs(*data), devices=1, method="ddp", loss=loss, train={"seed": 11, "optimizer": "adamw"})
    run = plan.train()
    weights, losses = plain_weights(net, run, read_samples(data), loss or cross_entropy)
    for name, weight in run.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(run.metrics["train_loss"], losses, rtol=1e-12)
    assert ("val_accuracy" in run.metrics) == (loss is None)
    # The network stays as it was, and takes what was trained.
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    net.load_state_dict(run.state_dict())
    assert "starts from the weights that the network had" in " ".join(str(plan).split())


def test_heads_and_passes_have_means_of_their_own(here: Path, net: Net, classes: tuple[Tensor, Tensor]) -> None:
    """Cross-entropy as a function of the user's trains as ours does, whatever is divided."""
    runs = [
        plan_of(
            net, classes, heads_per_device=2, set={"train.accumulate": 2}, loss=loss, train={"diagnostics_every": 3}
        ).train()
        for loss in (None, nn.CrossEntropyLoss(reduction="none"))
    ]
    ours, own = (run.metrics for run in runs)
    np.testing.assert_allclose(own["train_loss"], ours["train_loss"], rtol=1e-12)
    np.testing.assert_allclose(own["val_loss"].dropna(), ours["val_loss"].dropna(), rtol=1e-12)
    for name, weight in runs[0].state_dict().items():
        torch.testing.assert_close(runs[1].state_dict()[name], weight, rtol=1e-10, atol=1e-12)
    assert "guessing" not in str(runs[1].report())


def test_a_run_of_objects_resumes_bit_for_bit_with_equal_ones_alone(
    here: Path, net: Net, xy: tuple[Tensor, Tensor]
) -> None:
    def stop(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 4:
            raise RuntimeError

    plan = plan_of(net, xy, loss=huber)
    whole = plan.train(out="whole")
    with pytest.raises(RuntimeError):
        plan.train(out="run", on_event=stop)
    expected = same_numbers(whole.events)
    del plan, whole
    gc.collect()
    with pytest.raises(ltecli.InputError, match=r"does not have it; give it again by lte\.open"):
        ltecli.open("run").resume()
    other = copy.deepcopy(net)
    nn.init.zeros_(other.head.bias)
    objects: dict[str, Any] = {"model": net, "data": xy, "loss": huber}
    for key, wrong in (("model", other), ("data", (xy[0], xy[1] + 1)), ("loss", nn.functional.mse_loss)):
        with pytest.raises(ltecli.InputError, match="differ, so that the run could not go on as it began"):
            ltecli.open("run", **{**objects, key: wrong})
    run = ltecli.open("run", model=copy.deepcopy(net), data=tuple(t.clone() for t in xy), loss=huber)
    run.resume()
    assert same_numbers(run.events) == expected


def test_objects_are_not_launched(here: Path, net: Net, classes: tuple[Tensor, Tensor]) -> None:
    plan = plan_of(net, classes)
    with pytest.raises(
        ltecli.InputError, match=r"object of this Python process, and a launch.*module:factory"
    ) as refusal:
        plan.train(launch=True)
    assert "\n" not in str(refusal.value)
    assert not tree(here)


class Dim(Net):
    """The same weights, and other code."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def test_names_tell_weights_settings_and_code_apart(net: Net) -> None:
    from simulate.models.live import register_loss, register_network

    other, halved, frozen = copy.deepcopy(net), Dim(), copy.deepcopy(net)
    halved.load_state_dict(net.state_dict())
    frozen.head.weight.requires_grad_(False)
    other.layers[1] = nn.Sigmoid()
    held = [register_network(each) for each in (net, copy.deepcopy(net), other, halved, frozen)]
    names = [name for name, _ in held]
    assert names[0] == names[1]
    assert len(set(names)) == 4
    losses = [register_loss(loss)[0] for loss in (huber, lambda o, t: o.mean(), lambda o, t: o.sum())]
    assert len(set(losses)) == 3


def random_pairs() -> Dataset[Any]:
    class Random(Pairs):
        def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
            return torch.randn(6), self.y[number]

    return Random(torch.zeros(8, 6), torch.zeros(8))


def endless() -> Iterator[tuple[Tensor, int]]:
    while True:
        yield torch.zeros(100), 0


X, Y = torch.arange(60.0).view(10, 6), torch.arange(10) % 2


def test_all_kinds_of_data_give_the_same_samples() -> None:
    kinds: list[tuple[Any, bool]] = [
        ((X, Y), False),
        ((X.numpy(), Y.numpy()), False),
        (Pairs(X, Y), False),
        (TensorDataset(X, Y), False),
        ([(x, int(y)) for x, y in zip(X, Y, strict=True)], False),
        (zip(X, Y, strict=True), False),
        (DataLoader(Pairs(X, Y), batch_size=4), False),
        (DataLoader(Pairs(X, Y), batch_size=None), False),
        (zip(X.split(3), Y.split(3), strict=True), True),
    ]
    digests = {read_samples(data, batched=batched).fingerprint for data, batched in kinds}
    assert len(digests) == 1
    given = read_samples((X, Y), validation=(X[:2], Y[:2]))
    assert (len(given.train), list(given.validation)) == (10, [10, 11])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (random_pairs(), "sample 0 is another one whenever it is read"),
        (endless(), "more than 10 kB after"),
        ([(X, 1), (X[:2], 1)], "sample 1: its input is"),
        ([{"x": 1}], "sample 0 is a dict"),
        ((X, Y[:3]), "10 inputs and 3 targets"),
        ([], "has no samples"),
        ([(X, 1)], "1 sample; two at least"),
        ([(X.bfloat16(), 1)], "is no array of numbers"),
        ([(X, "a")], "cannot be trained on"),
    ],
    ids=["random", "endless", "shapes", "dict", "lengths", "empty", "one", "bf16", "text"],
)
def test_data_that_cannot_be_trained_on_is_refused(data: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "MOST_BYTES", 10_000)
    with pytest.raises(ltecli.InputError) as caught:
        read_samples(data)
    assert words in str(caught.value)


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, targets, reduction="sum")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": summed}, "as the mean of their halves'"),
        ({"loss": lambda o, t: o.detach().mean()}, "has no gradient with respect to the outputs"),
        ({"loss": lambda o, t: (o - t)[:3]}, "gave (3, 2) for 8 samples"),
        ({"loss": lambda o, t: o @ t}, "raised RuntimeError on outputs (8, 2) and targets (8, 2)"),
        ({}, "targets 'shift'"),
        ({"devices": 60, "loss": huber}, "gets none"),
        ({"loss": huber, "set": {"data.mixup": 0.2}}, "has no effect on a data set that is an object"),
    ],
    ids=["sum", "detached", "shape", "error", "shares", "devices", "keys"],
)
def test_what_does_not_fit_the_data_is_refused(
    options: dict[str, Any], words: str, net: Net, xy: tuple[Tensor, Tensor], here: Path
) -> None:
    data = xy
    if words == "targets 'shift'":  # classes beyond the outputs
        data, words = (xy[0], torch.arange(60) % 3), "targets of arrays go from 0 to 2"
    with pytest.raises(ltecli.InputError) as caught:
        plan_of(net, data, **options).train()
    assert words in str(caught.value)
    assert not tree(here)


def test_a_network_of_the_user_gets_the_sizes_of_images_in_files(here: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(24):
        path = here / "images" / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (8, 8, 3), np.uint8)).save(path)
    plan = plan_of(Convolutional(8, 3, 3), here / "images", devices=1, method="ddp")
    assert any("model.image = 8, model.colours = 3, model.classes = 3 are those of" in note for note in plan.notes)
    assert plan.train(steps=2, dtype="fp32").is_finished


def test_a_named_network_takes_an_object_of_its_sizes(here: Path) -> None:
    tokens = torch.randint(0, 256, (20, 9), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"devices": 1, "method": "ddp", "set": SMALL, "steps": 2, "micro_batch": 2}
    data = tokens[:, :-1], tokens[:, 1:]
    run = ltecli.plan(PROFILE, model="gpt", data=data, **options).train(evaluate_samples=2)
    assert run.is_finished
    with pytest.raises(ltecli.InputError, match="the inputs of arrays are 7"):
        ltecli.plan(PROFILE, model="gpt", data=(tokens[:, :7], tokens[:, 1:8]), **options)


OWN = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Embedding(256, 4), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 256))

def loss(outputs, targets):
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
"""


def test_an_own_loss_of_a_module_trains_from_the_command_line(here: Path, lte: Lte) -> None:
    (here / "own_of_test_api.py").write_text(OWN)
    model = {"name": "own_of_test_api:Net", "context": 8}
    for name, keys in (("ours", {}), ("own", {"loss": "own_of_test_api:loss"})):
        run = write_run(here / f"{name}.toml", model={**model, **keys}, train={"dtype": "fp64"})
        assert lte("train", run, "--out", name, "--quiet").code == 0
    ours, own = (ltecli.open(name).metrics["train_loss"] for name in ("ours", "own"))
    np.testing.assert_allclose(own, ours, rtol=1e-9)
