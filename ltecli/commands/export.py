"""lte export: the newest checkpoint's merged model, for other programs."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltecli.console import Output
from ltecli.runs.run_folder import CHECKPOINTS, RUN_FILE
from simulate.common.errors import InputError
from simulate.common.units import bytes_text
from simulate.config.run import Run, dump_run, load_run
from simulate.models.schema import GptModel, HuggingfaceModel, LlamaModel
from simulate.training.checkpoints import has_shared, list_checkpoints, saved_devices

if TYPE_CHECKING:
    from torch import Tensor

EXPORT, TENSORS, CONFIG = "export", "model.safetensors", "config.json"


def export_command(path: Path, form: str, out: Path | None, as_json: bool) -> int:
    """Write the merged model of a run's newest checkpoint; returns the exit code."""
    output = Output(as_json)
    run, checkpoint = _run_and_checkpoint(path)
    if form == "hf" and not isinstance(run.model, GptModel | LlamaModel | HuggingfaceModel):
        raise InputError(
            f"--format hf has no form for {run.model.name}; it has for gpt, llama and hf: models; "
            "use --format safetensors"
        )
    target = out or path / EXPORT
    if target.exists():
        raise InputError(f"--out {target} exists; choose another folder, or remove it")
    step, state, merged_now = _merged(run, checkpoint)
    files = _written(run, state, form, target, step)
    if merged_now:
        output.hint(f"step {step} lies inside a round: its devices were merged for this export")
    size = sum((target / name).stat().st_size for name in files)
    output.json({"version": 1, "run": str(path), "format": form, "step": step, "out": str(target), "files": files})
    output.text(f"wrote {target}: {', '.join(files)} ({bytes_text(size)}), merged after step {step:,}")
    return 0


def _run_and_checkpoint(path: Path) -> tuple[Run, Path]:
    if not (path / RUN_FILE).is_file():
        raise InputError(
            f"{path} is no run folder (it has no {RUN_FILE}); name one that lte train made, as in runs/demo"
        )
    run = load_run(path / RUN_FILE)
    whole = list_checkpoints(path / CHECKPOINTS, run.cluster.devices)
    # On one of several machines there are this node's devices alone; after a merge they stand for all.
    partial = [p for p in sorted((path / CHECKPOINTS).glob("step-*")) if has_shared(p) and saved_devices(p)]
    checkpoints = whole or [p for p in partial if not _is_inside_round(run, int(p.name.removeprefix("step-")))]
    if not checkpoints:
        raise InputError(f"{path} has no checkpoint yet; let lte train {path} --resume save one")
    return run, checkpoints[-1]


def _is_inside_round(run: Run, step: int) -> bool:
    """Whether devices differ after a step: within a round, and as long as layers merge one group after the other."""
    staggered = run.method.merges_per_round > 1
    return step != run.train.steps and (staggered or step % run.method.round_steps != 0)


def _merged(run: Run, checkpoint: Path) -> tuple[int, dict[str, Tensor], bool]:
    """Return the steps done, the one model's weights, and whether devices had to be merged for that."""
    import torch

    from simulate.comm.virtual import VirtualCommunicator
    from simulate.methods.registry import build_method
    from simulate.training.checkpoints import data_of, load_checkpoint

    devices = range(run.cluster.devices)
    progress, state = load_checkpoint(checkpoint, run, data_of(checkpoint), devices)
    assert progress is not None, "a checkpoint that is listed has what all devices share"
    for device in set(devices) - set(state.of_devices):
        state.of_devices[device] = state.of_devices[min(state.of_devices)]
    method = build_method(run, VirtualCommunicator(run.cluster.devices), torch.device("cpu"))
    method.state.load_sharded(state)
    inside = _is_inside_round(run, progress.step)
    if inside:
        method.merge(run.train.steps - 1)  # of all groups of layers
    return progress.step, method.weights_in_use(), inside


def _written(run: Run, state: dict[str, Tensor], form: str, target: Path, step: int) -> list[str]:
    """Write the folder whole, or not at all; returns the names of its files."""
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        scratch.chmod(0o755)
        if form == "safetensors":
            _save(state, scratch / TENSORS, {"step": str(step), "model": run.model.name})
            (scratch / RUN_FILE).write_text(dump_run(run), encoding="utf-8")
        else:
            _write_transformers(run, state, scratch, step)
        scratch.rename(target)
    except OSError as error:
        raise InputError(f"--out {target} cannot be written ({error.strerror}); choose another folder") from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return sorted(file.name for file in target.iterdir())


def _write_transformers(run: Run, state: dict[str, Tensor], folder: Path, step: int) -> None:
    if isinstance(run.model, HuggingfaceModel):
        from simulate.models.huggingface import build_huggingface

        network = build_huggingface(run.model)
        network.load_state_dict(state)
        network.model.save_pretrained(folder)  # type: ignore[operator, union-attr]
        return
    from simulate.models.transformers_names import to_transformers

    config, named = to_transformers(run.model, state)
    dtype = {"fp32": "float32", "fp64": "float64"}[run.train.dtype]
    (folder / CONFIG).write_text(json.dumps({**config, "dtype": dtype}, indent=1), encoding="utf-8")
    _save(named, folder / TENSORS, {"step": str(step), "model": run.model.name})


def _save(state: dict[str, Tensor], path: Path, metadata: dict[str, Any]) -> None:
    from simulate.common.safetensors_writer import write_tensors

    with path.open("wb") as file:  # a tied parameter is stored under each of its names
        write_tensors(file, state, {"format": "pt", **metadata})
