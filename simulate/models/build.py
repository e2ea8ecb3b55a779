"""From run.toml to a network: the same weights for the same seed, whoever builds it."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor, nn

from simulate.config import Run
from simulate.models.options import GptModel, LlamaModel, MixerModel, ModelOptions, VitModel
from simulate.randomness import address

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
_CLASSES = {
    "gpt": "simulate.models.gpt:Gpt",
    "llama": "simulate.models.llama:Llama",
    "vit": "simulate.models.vit:Vit",
    "mixer": "simulate.models.mixer:Mixer",
}


def build_model(run: Run) -> nn.Module:
    """Return the plain network with its start weights, drawn in float32 from (seed, "weights"), in the run's dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(address(run.train.seed, "weights"))
        model = _network(run)
    return model.to(DTYPES[run.train.dtype])


def empty_model(run: Run) -> nn.Module:
    """Return the plain network without storage, to be called with somebody else's weights."""
    with torch.device("meta"):
        return _network(run).to(DTYPES[run.train.dtype]).eval()


def example_batch(model: ModelOptions, samples: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a network's shapes, the same ones every time; what they show means nothing."""
    if isinstance(model, VitModel | MixerModel):
        images = torch.linspace(-1, 1, samples * model.colours * model.image**2)
        return images.view(samples, model.colours, model.image, model.image), torch.arange(samples) % model.classes
    assert isinstance(model, GptModel | LlamaModel)
    tokens = torch.arange(samples * model.context).view(samples, model.context) % model.vocab
    return tokens, tokens


def _network(run: Run) -> nn.Module:
    module, _, name = _CLASSES[run.model.family].partition(":")
    network: nn.Module = getattr(import_module(module), name)(run.model, run.train.activation_checkpointing)
    return network
