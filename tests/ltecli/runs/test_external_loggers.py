"""Weights & Biases and MLflow get TensorBoard's curves, and a resumed run goes on in the same external run.

Each test takes the real package where it is installed, without a network, and else a stand-in of the calls made.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import defaultdict
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ltecli.runs import external_loggers
from tests.ltecli.command import Lte, Refused, events_of, write_run

CURVES = {"loss/train", "loss/validation", "train/tokens", "communication/sent_bytes"}
Points = dict[str, dict[int, float]]
"""Values of curves, by name and step."""


class WandbStore:
    """What a stand-in of wandb was told, as its server keeps it: of a step only the first points count."""

    def __init__(self) -> None:
        self.points: dict[str, Points] = defaultdict(lambda: defaultdict(dict))
        self.inits: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []

    def module(self) -> ModuleType:
        module = ModuleType("wandb")
        module.__spec__ = ModuleSpec("wandb", None)
        module.init, module.Settings = self._init, dict  # type: ignore[attr-defined]
        return module

    def _init(self, **options: Any) -> SimpleNamespace:
        self.inits.append(options)
        points = self.points[options["id"]]

        def log(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                assert step not in points[name], f"{name} has two values at step {step}"
                points[name][step] = value

        steps = [step for curve in points.values() for step in curve]
        return SimpleNamespace(
            id=options["id"], step=max(steps) + 1 if steps else 0, log=log,
            finish=lambda exit_code: self.exit_codes.append(exit_code),
        )  # fmt: skip


@pytest.fixture
def wandb_store(monkeypatch: pytest.MonkeyPatch) -> WandbStore:
    """The stand-in of wandb, in its place."""
    store = WandbStore()
    monkeypatch.setitem(sys.modules, "wandb", store.module())
    return store


@pytest.fixture
def mlflow_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's own client where it is installed, or else a stand-in that keeps its runs in memory."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if find_spec("mlflow") is None:
        for module in _mlflow_modules():
            monkeypatch.setitem(sys.modules, module.__name__, module)


def _mlflow_modules() -> list[ModuleType]:
    runs: dict[str, SimpleNamespace] = {}

    class Client:
        def __init__(self, tracking_uri: str) -> None:
            assert tracking_uri.startswith("sqlite:////")

        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str, artifact_location: str | None) -> str:
            return "1"

        def create_run(self, number: str, run_name: str) -> SimpleNamespace:
            info = SimpleNamespace(run_id=f"run-{len(runs)}", run_name=run_name, status="RUNNING")
            runs[info.run_id] = SimpleNamespace(info=info, data=SimpleNamespace(params={}), points=[])
            return runs[info.run_id]

        def get_run(self, run_id: str) -> SimpleNamespace:
            return runs[run_id]

        def update_run(self, run_id: str, status: str) -> None:
            runs[run_id].info.status = status

        set_terminated = update_run

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            assert len(params) <= 100 and len(metrics) <= 1000, "the real one refuses more"
            runs[run_id].points += metrics
            runs[run_id].data.params |= {param.key: param.value for param in params}

        def get_metric_history(self, run_id: str, key: str) -> list[SimpleNamespace]:
            return [point for point in runs[run_id].points if point.key == key]

    def entity(*names: str) -> Any:
        return lambda *values: SimpleNamespace(**dict(zip(names, values, strict=True)))

    mlflow, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    mlflow.__spec__ = ModuleSpec("mlflow", None)
    mlflow.MlflowClient, mlflow.entities = Client, entities  # type: ignore[attr-defined]
    entities.Metric = entity("key", "value", "timestamp", "step")  # type: ignore[attr-defined]
    entities.Param = entity("key", "value")  # type: ignore[attr-defined]
    return [mlflow, entities]


def train_then_lose_the_last_checkpoint(lte: Lte, here: Path, logger: str) -> list[int]:
    """Train, go back to the checkpoint before the last, and resume; returns the steps with events."""
    run = write_run(here / "tiny.toml", train={"loggers": [logger]})
    assert lte("train", run, "--out", "a", "--quiet").code == 0
    shutil.rmtree(here / "a/checkpoints/step-00000008")
    assert lte("train", "a", "--resume", "--quiet").code == 0
    assert not (here / "a/tensorboard").exists()
    return [event["step"] for event in events_of(here / "a", "step")]


def test_wandb_gets_each_step_once_in_one_run(lte: Lte, here: Path, wandb_store: WandbStore) -> None:
    steps = train_then_lose_the_last_checkpoint(lte, here, "wandb")
    ((run_id, points),) = wandb_store.points.items()
    assert json.loads((here / "a/loggers.json").read_text()) == {"wandb": run_id}
    assert points.keys() >= CURVES
    assert points["loss/train"] == {event["step"]: event["train_loss"] for event in events_of(here / "a", "step")}
    assert list(points["train/tokens"]) == steps == list(range(1, 9))
    assert [(init["name"], init["resume"], init["project"]) for init in wandb_store.inits] == [
        ("a", "allow", "lte")
    ] * 2
    assert wandb_store.inits[0]["config"]["method"]["rank"] == 2
    assert wandb_store.exit_codes == [0, 0]


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_wandb_writes_offline(lte: Lte, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_then_lose_the_last_checkpoint(lte, here, "wandb")
    run_id = json.loads((here / "a/loggers.json").read_text())["wandb"]
    written = [path.name for path in (here / "a/wandb").glob("offline-run-*")]
    assert written and all(name.endswith(run_id) for name in written)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SQLAlchemy, in MLflow's own store
def test_mlflow_gets_each_step_once_in_one_run(lte: Lte, here: Path, mlflow_here: None) -> None:
    steps = train_then_lose_the_last_checkpoint(lte, here, "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{here.resolve() / 'a/mlflow.db'}")
    run_id = json.loads((here / "a/loggers.json").read_text())["mlflow"]
    history = {name: client.get_metric_history(run_id, name) for name in CURVES}
    assert all(history.values())
    assert [point.step for point in history["train/tokens"]] == steps == list(range(1, 9))
    losses = [event["train_loss"] for event in events_of(here / "a", "step")]
    assert [point.value for point in history["loss/train"]] == losses
    found = client.get_run(run_id)
    assert (found.info.run_name, found.info.status) == ("a", "FINISHED")
    assert found.data.params["method.rank"] == "2"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_told_before_anything_is_written(
    refused: Refused, run_toml: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_loggers, "find_spec", lambda package: None)
    words = (f"pip install 'lte[{name}]'", "--set train.loggers=tensorboard")
    refused("train", run_toml, "--set", f"train.loggers=tensorboard,{name}", words=words)


def test_a_store_that_cannot_be_opened_leaves_no_folder(
    lte: Lte, here: Path, run_toml: Path, wandb_store: WandbStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise RuntimeError("No API key configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    outcome = lte("train", run_toml, "--out", "a", "--set", "train.loggers=wandb", "--quiet")
    assert outcome.code == 2 and "wandb cannot be opened (No API key configured); log in" in outcome.stderr
    assert not (here / "a").exists()


def test_a_store_that_fails_later_ends_no_run(lte: Lte, here: Path, wandb_store: WandbStore) -> None:
    run = write_run(here / "tiny.toml", train={"loggers": "wandb"})

    def full(values: dict[str, float], step: int) -> None:
        raise OSError("the line is dead")

    init = wandb_store._init
    sys.modules["wandb"].init = lambda **options: SimpleNamespace(**{**vars(init(**options)), "log": full})  # type: ignore[attr-defined]
    outcome = lte("train", run, "--out", "a", "--quiet")
    assert outcome.code == 0
    assert outcome.stderr.count("lte: wandb failed (the line is dead); its curves end here, the events go on") == 1
    assert len(events_of(here / "a", "step")) == 8


def test_an_unknown_logger_is_refused(refused: Refused, run_toml: Path) -> None:
    refused("train", run_toml, "--set", "train.loggers=wandbb", words=("train.loggers", "wandb"))
