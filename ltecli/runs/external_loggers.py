"""Weights & Biases and MLflow: the same scalars as TensorBoard's, for who keeps all runs in one place.

`train.loggers` asks for them; `lte train` checks by check_loggers that their packages are there before it writes, and
event_loggers opens them. A resumed run goes on in the same external run, whose id lies in the run folder. A store that
fails later ends no run: it is said once, and the events go on.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from simulate.common import toml_io
from simulate.common.errors import InputError, first_line
from simulate.common.events import Event
from simulate.common.run_files import LOGGERS_FILE
from simulate.config.run import Run
from simulate.launch.preflight.node_info import flat_table

PROJECT = "lte"
"""Project and experiment of all runs, where WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME name no other."""
METRICS_AT_ONCE = 500
"""Figures that MLflow gets in one request, of the 1000 that it takes; each request costs a transaction."""
PARAMS_AT_ONCE = 100
"""Most parameters that MLflow takes in one request."""
SCORES = {"val_loss": "loss/validation", "val_accuracy": "accuracy/validation"}
NAMES = {
    "train_loss": "loss/train",
    "learning_rate": "train/learning_rate",
    "tokens": "train/tokens",
    "sent_bytes": "communication/sent_bytes",
    "simulated_s": "time/simulated_s",
    "wall_s": "time/measured_s",
}
"""Names of curves, by the keys of evaluations and of steps."""


def scalars(event: Event) -> dict[str, float]:
    """Return an event's points of curves, by the curves' names."""
    if event["kind"] in ("step", "evaluate"):
        # Only the step's event gives what both have, since a curve has one value at a step.
        names = NAMES if event["kind"] == "step" else SCORES
        # A step for which all devices had stopped has no loss.
        return {name: event[key] for key, name in names.items() if event.get(key) is not None}
    if event["kind"] == "diagnostics":
        return {f"diagnostics/{key}": event[key] for key in event.keys() - {"version", "kind", "step"}}
    return {}


class ExternalLogger(ABC):
    """One external run, open from `__enter__` on."""

    name: ClassVar[str]
    cure: ClassVar[str]
    """Next move of a user whose store cannot be opened."""

    def __init__(self, path: Path, run: Run, warn: Callable[[str], None]) -> None:
        self._path, self._run, self._warn = path, run, warn
        self._failed, self._ended = False, False
        self._done_step = -1
        """Last step that the external run has: a resumed run repeats the steps after its checkpoint."""

    def __enter__(self) -> ExternalLogger:
        ids = _read_ids(self._path)
        try:
            opened = self._open(ids.get(self.name))
        except Exception as error:  # whatever an HTTP client, a database or a login may raise
            raise InputError(
                f"train.loggers: {self.name} cannot be opened ({first_line(error)}); {self.cure}, or --set "
                "train.loggers=tensorboard"
            ) from error
        toml_io.write_atomically(self._path / LOGGERS_FILE, json.dumps({**ids, self.name: opened}).encode())
        return self

    def __call__(self, event: Event) -> None:
        self._ended = self._ended or event["kind"] == "end"
        points = scalars(event)
        if points and event["step"] > self._done_step:
            self._or_warn(lambda: self._add(points, event["step"]))

    def __exit__(self, *exception: object) -> None:
        self._or_warn(lambda: self._close(self._ended))

    def _or_warn(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # a run of days must not end with a store of curves
            self._failed = True
            self._warn(f"{self.name} failed ({first_line(error)}); its curves end here, the events go on")

    @abstractmethod
    def _open(self, run_id: str | None) -> str:
        """Open a new run, or the one of the id; returns the id."""

    @abstractmethod
    def _add(self, points: dict[str, float], step: int) -> None: ...

    @abstractmethod
    def _close(self, ended: bool) -> None:
        """Close the run; `ended` says whether its last step was done."""


class WandB(ExternalLogger):
    """Weights & Biases; WANDB_MODE=offline keeps its files in the run folder, for `wandb sync`."""

    name, cure = "wandb", "log in by wandb login, or export WANDB_MODE=offline"

    def _open(self, run_id: str | None) -> str:
        import wandb

        self._external = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run_id or uuid.uuid4().hex[:12],
            resume="allow",
            name=self._path.name,
            dir=str(self._path),
            config=self._run.model_dump(),
            settings=wandb.Settings(silent=True, console="off"),  # this program prints what people need
        )
        # The step that it would give a point next; 0 in a new run, and in any without a connection.
        self._done_step = int(self._external.step) - 1
        return str(self._external.id)

    def _add(self, points: dict[str, float], step: int) -> None:
        self._external.log(points, step=step)

    def _close(self, ended: bool) -> None:
        self._external.finish(exit_code=0 if ended else 1)


class MLflow(ExternalLogger):
    """MLflow, at MLFLOW_TRACKING_URI, or else in mlflow.db in the run folder."""

    name, cure = "mlflow", "check MLFLOW_TRACKING_URI"

    def _open(self, run_id: str | None) -> str:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        for chatty in ("mlflow", "alembic"):  # their import sets the levels
            logging.getLogger(chatty).setLevel(logging.WARNING)
        self._metric, self._pending = Metric, list[Any]()
        given = os.environ.get("MLFLOW_TRACKING_URI")
        client = self._client = MlflowClient(tracking_uri=given or f"sqlite:///{self._path.resolve() / 'mlflow.db'}")
        if run_id is not None:
            client.update_run(run_id, status="RUNNING")
            self._id = run_id
            history = client.get_metric_history(run_id, NAMES["tokens"])
            self._done_step = max((point.step for point in history), default=-1)
            return run_id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(name)
        # Without a place of their own, artifacts' folder would be the current one.
        place = None if given else (self._path.resolve() / "mlflow").as_uri()
        number = experiment.experiment_id if experiment else client.create_experiment(name, artifact_location=place)
        self._id = client.create_run(number, run_name=self._path.name).info.run_id
        params = [Param(key, str(value)) for key, value in flat_table(self._run.model_dump()).items()]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            client.log_batch(self._id, params=params[start : start + PARAMS_AT_ONCE])
        return str(self._id)

    def _add(self, points: dict[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        self._pending += [self._metric(name, float(value), now_ms, step) for name, value in points.items()]
        if len(self._pending) >= METRICS_AT_ONCE or SCORES["val_loss"] in points:
            self._flush()

    def _close(self, ended: bool) -> None:
        self._flush()
        self._client.set_terminated(self._id, "FINISHED" if ended else "KILLED")

    def _flush(self) -> None:
        self._client.log_batch(self._id, metrics=self._pending)
        self._pending = []


EXTERNAL: dict[str, type[ExternalLogger]] = {"wandb": WandB, "mlflow": MLflow}
"""External loggers, by their names in train.loggers, which are their packages' names, too."""


def check_loggers(run: Run) -> None:
    """Raise InputError where the package of a logger is missing."""
    for name in run.train.loggers:
        if name in EXTERNAL and find_spec(name) is None:
            raise InputError(
                f"train.loggers has {name!r}, whose package is missing: pip install 'lte[{name}]', or --set "
                "train.loggers=tensorboard"
            )


def _read_ids(path: Path) -> dict[str, str]:
    """Return the external runs of a run folder, by the loggers' names; raises InputError for a damaged file."""
    file = path / LOGGERS_FILE
    try:
        return dict(json.loads(toml_io.read(file))) if file.exists() else {}
    except (ValueError, TypeError):
        raise InputError(f"{file}: does not name external runs; restore it, or remove it to begin new ones") from None
