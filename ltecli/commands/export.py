"""lte export: write the merged model of a run's newest checkpoint, for other programs.

A checkpoint holds each device's adapters; other programs want one model. So export rebuilds the run's method on the
CPU, merges where devices differ, and writes the weights as safetensors, or as a folder that transformers loads.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltecli.console import Output
from ltecli.output_paths import check_absent, unwritable
from ltecli.runs.run_folder import check_run_folder
from simulate.common.errors import InputError
from simulate.common.run_files import CHECKPOINTS, PROFILE_FILE, RUN_FILE
from simulate.common.units import bytes_text
from simulate.config.hardware import Profile
from simulate.config.profiles import load_profile
from simulate.config.run import Run, dump_run, load_run
from simulate.data.load import TOKENIZER_FILE, kept_tokenizer
from simulate.models.families.gpt import GptModel
from simulate.models.families.llama import LlamaModel
from simulate.models.schema import HuggingfaceModel
from simulate.training.checkpoints import has_shared, list_checkpoints, saved_devices

if TYPE_CHECKING:
    from torch import Tensor

EXPORT, TENSORS, CONFIG = "export", "model.safetensors", "config.json"


def export_command(path: Path, form: str, out: Path | None, as_json: bool) -> int:
    """Write the merged model of a run's newest checkpoint; returns the exit code."""
    output = Output(as_json)
    run, checkpoint = newest_checkpoint(path)
    if form == "hf" and not isinstance(run.model, GptModel | LlamaModel | HuggingfaceModel):
        raise InputError(
            f"--format hf has no form for {run.model.name}, only for gpt, llama and hf: models; "
            "use --format safetensors"
        )
    target = out or path / EXPORT
    check_absent(target)
    step, state, merged_now = merged_weights(run, checkpoint)
    profile = load_profile(str(path / PROFILE_FILE))
    files = _written(run, profile, state, form, target, step, kept_tokenizer(path))
    if merged_now:
        output.hint(f"step {step} is inside a round: its devices were merged for this export")
    size = sum((target / name).stat().st_size for name in files)
    output.json({"version": 1, "run": str(path), "format": form, "step": step, "out": str(target), "files": files})
    output.text(f"wrote {target}: {', '.join(files)} ({bytes_text(size)}), merged after step {step:,}")
    return 0


def newest_checkpoint(path: Path) -> tuple[Run, Path]:
    """Return a run and its newest usable checkpoint; raises InputError where there is none."""
    check_run_folder(path)
    run = load_run(path / RUN_FILE)
    whole = list_checkpoints(path / CHECKPOINTS, run.cluster.devices)
    # A node of several saves its own devices only; right after a merge all devices are equal, so they stand for all.
    partial = [p for p in sorted((path / CHECKPOINTS).glob("step-*")) if has_shared(p) and saved_devices(p)]
    checkpoints = whole or [p for p in partial if not _is_inside_round(run, int(p.name.removeprefix("step-")))]
    if not checkpoints:
        raise InputError(f"{path} has no checkpoint yet; let lte train {path} --resume save one")
    return run, checkpoints[-1]


def _is_inside_round(run: Run, step: int) -> bool:
    """Whether devices differ after a step: within a round, and always where groups of layers merge in turn."""
    staggered = run.method.merges_per_round > 1
    return step != run.train.steps and (staggered or step % run.method.round_steps != 0)


def merged_weights(run: Run, checkpoint: Path) -> tuple[int, dict[str, Tensor], bool]:
    """Return the steps done, the merged model's weights, and whether devices had to be merged for them."""
    import torch

    from simulate.comm.virtual import VirtualCommunicator
    from simulate.methods.registry import build_method
    from simulate.training.checkpoints import data_of, load_checkpoint

    devices = range(run.cluster.devices)
    saved = saved_devices(checkpoint)
    if not set(saved) >= set(devices):
        # A node of several has its own devices alone, right after a merge: those of one class suffice.
        devices = run.cluster.class_devices[run.class_of(min(saved))]
    progress, state = load_checkpoint(checkpoint, run, data_of(checkpoint), devices)
    assert progress is not None, "listed checkpoints have the shared part"
    # Devices of other nodes: any saved device stands for them, since all are equal after a merge.
    for device in set(devices) - set(state.of_devices):
        state.of_devices[device] = state.of_devices[min(state.of_devices)]
    communicator = VirtualCommunicator(run.cluster.devices)
    communicator.local_devices = devices
    method = build_method(run, communicator, torch.device("cpu"))
    method.state.load_sharded(state)
    # Inside a round devices differ; a merge makes them one model.
    inside = _is_inside_round(run, progress.step)
    if inside:
        method.merge(run.train.steps - 1)  # the last step's merge covers all groups of layers
    return progress.step, method.weights_in_use(), inside


def _written(
    run: Run, profile: Profile, state: dict[str, Tensor], form: str, target: Path, step: int, tokenizer: Path | None
) -> list[str]:
    """Write the folder whole or not at all; returns the names of its files."""
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, since only a rename within one file system is atomic.
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        scratch.chmod(0o755)  # mkdtemp makes it private
        if form == "safetensors":
            _save(state, scratch / TENSORS, {"step": str(step), "model": run.model.name})
            (scratch / RUN_FILE).write_text(dump_run(run, profile), encoding="utf-8")
        else:
            _write_transformers(run, state, scratch, step)
        if tokenizer is not None:  # without it the tokens mean nothing to another program
            shutil.copyfile(tokenizer, scratch / TOKENIZER_FILE)
        scratch.rename(target)
    except OSError as error:
        raise unwritable(target, error) from None
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

    with path.open("wb") as file:  # the writer stores a tied parameter under each of its names
        write_tensors(file, state, {"format": "pt", **metadata})
