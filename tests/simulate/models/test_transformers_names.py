"""Tests of our networks against transformers' own on the same weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simulate.common.errors import InputError
from simulate.config.run import build_run
from simulate.layers.convert import ConversionSpec, convert, lora, merged_state
from simulate.layers.lora import AdapterSpec, LoraLinear
from simulate.layers.per_device import ReplicatedConv1d, ReplicatedModule, ReplicatedRmsNorm
from simulate.methods.build_network import build_model
from simulate.models.families.gpt import GptModel
from simulate.models.families.llama import LlamaModel
from simulate.models.families.vit import VitModel
from simulate.models.gpt import Gpt
from simulate.models.llama import Llama
from simulate.models.transformers_names import to_transformers
from simulate.models.vit import Vit

transformers = pytest.importorskip("transformers", reason="the dev extra has transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own

SIZES = {"layers": 2, "width": 24, "attention_heads": 3, "context": 9, "vocab": 50}
TOKENS = torch.arange(27).view(3, 9) * 7 % 50


def perturbed(model: nn.Module) -> nn.Module:
    """Return a network with all parameters moved from their start values."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.3)
    return model.eval()


def library_model(config: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    kind = config["architectures"][0]
    own = transformers.CONFIG_MAPPING[config["model_type"]](**{k: v for k, v in config.items() if k != "model_type"})
    model = getattr(transformers, kind)(own).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # the tied one
    model.tie_weights()
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [GptModel(**SIZES), LlamaModel(mlp_width=40, **SIZES)], ids=["gpt", "llama"])
def test_text_models_compute_what_transformers_does(options: GptModel | LlamaModel) -> None:
    model = perturbed(Gpt(options) if isinstance(options, GptModel) else Llama(options))
    theirs = library_model(*to_transformers(options, model.state_dict()))
    assert sum(p.numel() for p in theirs.parameters()) == options.shape().parameters
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)


VIT_LAYERS = {
    "norm1": "layernorm_before", "attention.project": "attention.o_proj", "norm2": "layernorm_after",
    "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
}  # fmt: skip
VIT_ENDS = {"norm": "vit.layernorm", "head": "classifier", "patch": "vit.embeddings.patch_embeddings.projection"}


def vit_state(options: VitModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a ViT's weights by the library's names: separate queries, keys and values, patches as a convolution."""
    theirs = {
        "vit.embeddings.cls_token": state["class_token.weight"][None],
        "vit.embeddings.position_embeddings": state["position.weight"][None],
    }
    for name, tensor in state.items():
        layer, _, key = name.rpartition(".")
        if layer in VIT_ENDS:
            kernel = (options.width, options.colours, options.patch, options.patch)
            theirs[f"{VIT_ENDS[layer]}.{key}"] = tensor.view(kernel) if name == "patch.weight" else tensor
        elif name.startswith("blocks."):
            _, index, layer = layer.split(".", 2)
            if layer == "attention.qkv":
                for part, x in zip("qkv", tensor.chunk(3), strict=True):
                    theirs[f"vit.layers.{index}.attention.{part}_proj.{key}"] = x
            else:
                theirs[f"vit.layers.{index}.{VIT_LAYERS[layer]}.{key}"] = tensor
    return theirs


def test_a_vit_computes_what_transformers_does() -> None:
    options = VitModel(layers=2, width=24, attention_heads=3, image=8, patch=4, colours=3, classes=5)
    model, x = perturbed(Vit(options)), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=8, patch_size=4,
        num_labels=5, layer_norm_eps=1e-6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config).eval()
    if not any(name.startswith("vit.layers.0.attention.q_proj") for name, _ in theirs.named_parameters()):
        pytest.skip("this release of transformers names a ViT's layers differently")
    theirs.load_state_dict(vit_state(options, model.state_dict()), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x).logits, rtol=1e-4, atol=1e-4)


def test_a_comparison_with_another_activation_fails() -> None:
    options = GptModel(**SIZES)
    model = perturbed(Gpt(options))
    config, state = to_transformers(options, model.state_dict())
    theirs = library_model({**config, "activation_function": "relu"}, state)
    with torch.no_grad(), pytest.raises(AssertionError):
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_conv1d_is_adapted_like_a_linear_layer_and_merged_back_the_other_way_round() -> None:
    conv = transformers.pytorch_utils.Conv1D(6, 4).double()
    plain = nn.Sequential(conv)
    x = torch.randn(6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for treatment, kind in (
        (ConversionSpec(), ReplicatedConv1d),
        (ConversionSpec(lora(AdapterSpec(2, 1.5, 1, False, 0, 0), 2)), LoraLinear),
    ):
        model = convert(copy.deepcopy(plain), 2, treatment)
        assert isinstance(model[0], kind)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
        assert all(torch.equal(merged_state(model)[name], tensor) for name, tensor in plain.state_dict().items())


def test_only_norms_that_are_llamas_are_taken_for_one() -> None:
    llama = transformers.models.llama.modeling_llama.LlamaRMSNorm(4, eps=0.1)
    gemma = transformers.models.gemma.modeling_gemma.GemmaRMSNorm(4, eps=0.1)
    plain = perturbed(nn.Sequential(llama, gemma))
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    model = convert(copy.deepcopy(plain), 2)
    assert isinstance(model[0], ReplicatedRmsNorm) and isinstance(model[1], ReplicatedModule)
    torch.testing.assert_close(model(x), plain(x))


def test_a_configuration_of_several_networks_names_the_one_of_text() -> None:
    with pytest.raises(InputError, match=r"has no vocab_size, as of several networks; name .* alone: hf:gemma3_text$"):
        build_run({"model": {"name": "hf:gemma3", "vocab": 256}})


def test_special_tokens_beyond_a_small_vocabulary_are_dropped_from_a_file(tmp_path: Path) -> None:
    """Also where the kind insists on numbers; the file names them, too."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    for kind, expected in (("cwm", 0), ("llama", None)):
        path = tmp_path / f"{kind}.json"
        table = {"model_type": kind, "bos_token_id": 128_000, "vocab_size": 128_256, **sizes}
        path.write_text(json.dumps(table), encoding="utf-8")
        run = build_run({"model": {"name": f"hf:{path}", "context": 8, "vocab": 256}, "data": {"path": "made-up"}})
        network: Any = build_model(run)
        assert network.model.config.bos_token_id == expected
