"""Training on images from batch to event: a Vision Transformer under the loop, evaluated, saved and resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from simulate.comm.virtual import VirtualCommunicator
from simulate.common.errors import InputError
from simulate.common.events import Event
from simulate.config.profiles import load_profile
from simulate.config.run import Run, build_run
from simulate.data.batches import build_batches
from simulate.data.digits import digits_source
from simulate.data.images import Images, load_images
from simulate.methods.registry import build_method
from simulate.models.families.vit import VitModel
from simulate.models.vit import Vit
from simulate.training.loop import Session, restore, train
from simulate.training.simulated_clock import SimulatedClock
from tests.selection import others_slow

SIZE = VitModel(layers=1, width=16, attention_heads=2, patch=4, image=8, classes=10, colours=1)
CPU = torch.device("cpu")
METHODS: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "diloco": {"name": "diloco", "merge_every": 5},
    "lte": {"name": "lte", "rank": 4, "merge_every": 5, "heads_per_device": 2, "reset": "b"},
}


def digits() -> Images:
    source = digits_source()
    return load_images(source, source.frame(None, None, False))


def image_run(method: str, steps: int = 20, **data: Any) -> Run:
    return build_run(
        {
            "model": SIZE.model_dump(),
            "data": {"name": "digits", **data},
            "method": METHODS[method],
            "train": {
                "steps": steps, "micro_batch": 8, "learning_rate": 0.004, "evaluate_every": 10,
                "evaluate_samples": 1000, "checkpoint_every": 10,
            },
            "cluster": {"devices": 2, "profile": "gtx1080ti_x8"},
        }
    )  # fmt: skip


def session(run: Run, images: Images, folder: Path, stop_at: int | None = None) -> tuple[Session, list[Event]]:
    torch.manual_seed(0)
    profile, events = load_profile(run.cluster.profile), []
    communicator = VirtualCommunicator(run.cluster.devices)
    made = Session(
        run=run,
        method=build_method(run, communicator, CPU),
        batches=build_batches(run, images),
        communicator=communicator,
        clock=SimulatedClock(run, profile.devices(run.cluster.devices), profile.link),
        emit=events.append,
        checkpoints=folder,
        device=CPU,
    )
    made.stop = lambda: made.step == stop_at
    return made, events


def of(events: list[Event], kind: str, key: str) -> list[Any]:
    return [event[key] for event in events if event["kind"] == kind]


@pytest.mark.parametrize("method", others_slow(METHODS, ["lte"]))
@pytest.mark.parametrize("data", [{}, {"augment": ["crop", "flip"], "mixup": 0.2, "skew": 0.5}], ids=["plain", "all"])
def test_a_network_learns_digits_and_is_scored(method: str, data: dict[str, Any], tmp_path: Path) -> None:
    run, images = image_run(method, 100, **data), digits()
    trained, events = session(run, images, tmp_path)
    assert train(trained)
    losses, accuracies = (of(events, "evaluate", key) for key in ("val_loss", "val_accuracy"))
    if not data:  # what turns and mixes digits makes them harder to learn than a hundred steps do
        assert losses[-1] < 0.95 * losses[0] and accuracies[-1] > accuracies[0] + 0.05
    model = Vit(SIZE)
    model.load_state_dict(trained.method.merged_state())
    pixels = torch.from_numpy(images.pixels[images.validation]) / 255
    outputs = model((pixels - images.mean[0]) / images.std[0])
    labels = torch.from_numpy(images.labels[images.validation])
    assert accuracies[-1] == pytest.approx((outputs.argmax(1) == labels).double().mean().item(), abs=1e-9)
    assert losses[-1] == pytest.approx(torch.nn.functional.cross_entropy(outputs, labels).item(), rel=1e-5)


def test_a_resumed_run_is_an_unbroken_one(tmp_path: Path) -> None:
    run, images = image_run("lte", 20, augment=["crop", "flip"], mixup=0.2), digits()
    unbroken, expected = session(run, images, tmp_path / "a")
    train(unbroken)
    first, before = session(run, images, tmp_path / "b", stop_at=13)
    assert not train(first)
    second, after = session(run, images, tmp_path / "b")
    restore(second, tmp_path / "b" / "step-00000013")
    assert train(second)
    assert of(before + after, "step", "train_loss") == of(expected, "step", "train_loss")
    assert of(before + after, "evaluate", "val_accuracy") == of(expected, "evaluate", "val_accuracy")


def test_a_data_set_that_changed_since_the_checkpoint_is_refused(tmp_path: Path) -> None:
    run, images = image_run("ddp", 10), digits()
    trained, _ = session(run, images, tmp_path)
    train(trained)
    other, _ = session(run, replace(images, fingerprint="other"), tmp_path)
    with pytest.raises(InputError, match="trained on other data: it has changed since"):
        restore(other, tmp_path / "step-00000010")
