"""Questions about accelerators, and each refusal. No GPU is needed: stand-ins answer."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from simulate.common.errors import InputError
from simulate.layers import accelerator
from simulate.layers.accelerator import Card
from tests.gpus import CURRENT, LEGACY, DeviceModule, Properties, no_gpu, stand_in

ROOT = Path(__file__).parents[3]
CUDA = torch.device("cuda", 0)


def test_without_an_accelerator_auto_is_the_cpu_and_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    assert accelerator.current() is None
    assert accelerator.count("cuda") == 0
    assert accelerator.choose("auto") == accelerator.choose("cpu") == torch.device("cpu")
    for name in ("cuda", "xpu", "mps"):
        with pytest.raises(InputError, match=rf"--device {name}: this PyTorch .* sees no {name} device.*--device cpu"):
            accelerator.choose(name)


def test_a_gpu_that_this_torch_has_kernels_for_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, DeviceModule(gpus=2))
    assert accelerator.choose("auto") == accelerator.choose("cuda") == torch.device("cuda")
    assert accelerator.count("cuda") == 2
    assert accelerator.count("xpu") == 0
    assert accelerator.choose("cpu") == torch.device("cpu")
    card = accelerator.describe(CUDA)
    assert (card.name, card.capability, card.architecture) == ("NVIDIA GeForce GTX 1080 Ti", (6, 1), "sm_61")


def test_a_gpu_without_kernels_is_refused_by_name_and_auto_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, DeviceModule(compiled=CURRENT))
    with pytest.raises(InputError, match=r"no kernels for NVIDIA GeForce GTX 1080 Ti, sm_61: it was built for sm_75"):
        accelerator.choose("cuda")
    assert accelerator.choose("auto") == torch.device("cpu")


def test_an_accelerator_without_fp64_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, DeviceModule(properties=Properties("Apple M2")), "mps", fp64=False)
    with pytest.raises(InputError, match=r"--device mps: Apple M2 has no fp64"):
        accelerator.choose("mps")
    assert accelerator.choose("auto") == torch.device("cpu")


def test_fp64_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accelerator.has_fp64(torch.device("cpu"))

    def refuse(*size: int, dtype: torch.dtype, device: torch.device) -> None:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    monkeypatch.setattr(torch, "zeros", refuse)
    assert not accelerator.has_fp64(torch.device("mps"))


def test_another_accelerator_is_chosen_where_it_can_train(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, DeviceModule(properties=Properties("Intel Arc B580"), compiled=()), "xpu")
    assert accelerator.choose("auto") == accelerator.choose("xpu") == torch.device("xpu")
    assert accelerator.describe(torch.device("xpu")).capability is None
    with pytest.raises(InputError, match=r"--device cuda: this PyTorch .* sees no cuda device"):
        accelerator.choose("cuda")


@pytest.mark.parametrize(
    ("capability", "compiled", "runs"),
    [
        ((6, 1), LEGACY, True),  # sm_60, of the same major version
        ((6, 1), CURRENT, False),
        ((7, 0), ["sm_72"], False),  # code for a later minor version
        ((8, 9), CURRENT, True),
        ((12, 0), ["sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),  # compiled when it is loaded
        ((6, 1), ["compute_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a"], False),  # code for one version alone
    ],
)
def test_code_runs_on_later_minor_versions(capability: tuple[int, int], compiled: list[str], runs: bool) -> None:
    card = Card("cuda", "a GPU", f"sm_{capability[0]}{capability[1]}", capability, None, None, None)
    assert accelerator.has_kernels(card, compiled) is runs


def test_a_gpu_of_amd_is_named_by_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    class Amd(Properties):
        gcnArchName = "gfx90a:sramecc+:xnack-"

    monkeypatch.setattr(torch.version, "hip", "6.4")
    stand_in(monkeypatch, DeviceModule(properties=Amd("AMD Instinct MI210", 9, 0), compiled=["gfx900"]))
    card = accelerator.describe(CUDA)
    assert (card.architecture, card.capability) == ("gfx90a", None)
    with pytest.raises(InputError, match="no kernels for AMD Instinct MI210, gfx90a: it was built for gfx900"):
        accelerator.choose("cuda")


def test_bf16_is_asked_without_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    module = stand_in(monkeypatch)
    assert not accelerator.has_bf16(CUDA)
    module.bf16 = True
    assert accelerator.has_bf16(CUDA)
    monkeypatch.setattr(accelerator, "_api", lambda kind: object())
    assert not accelerator.has_bf16(CUDA)


def test_a_cpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    module = stand_in(monkeypatch)
    accelerator.synchronize(torch.device("cpu"))
    assert not module.calls
    accelerator.synchronize(CUDA)
    assert module.calls == [("synchronize", CUDA)]


def names_torch_of_gpus(source: str) -> list[int]:
    """Return the lines that name torch's modules of accelerators."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in {("torch", kind) for kind in ("cuda", "xpu", "mps", "accelerator")}
    ]


def test_one_module_asks_torch_about_accelerators() -> None:
    assert names_torch_of_gpus("import torch\nif torch.cuda.is_available():\n    pass") == [2]
    places = [p for name in ("simulate", "ltecli", "bench") for p in (ROOT / name).rglob("*.py")]
    assert len(places) > 150
    asking = [path.name for path in places if names_torch_of_gpus(path.read_text(encoding="utf-8"))]
    assert asking == ["accelerator.py"]
