"""lte sample and lte eval: use a run's newest weights, for text and for scores on other data.

A loss says little to most people, and a text says something; whoever wants to know how good a network is asks it on
data that it never saw. Both merge the newest checkpoint as `lte export` does, and compute on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ltecli.commands.export import merged_weights, newest_checkpoint
from ltecli.console import Output
from simulate.common.errors import InputError
from simulate.common.progress import reported_by
from simulate.config.run import Run, build_run
from simulate.data.images import Images
from simulate.data.load import kept_tokenizer, load_data
from simulate.data.text import Text, has_fields
from simulate.models.schema import text_sizes
from simulate.training.checkpoints import data_of

if TYPE_CHECKING:
    from torch import Tensor

    from simulate.data.batches import Batches

    Network = Callable[[Tensor], Tensor]

SAMPLES_AT_ONCE = 16


def sample_command(path: Path, prompt: str, length: int, temperature: float, seed: int, as_json: bool) -> int:
    """Print a text that goes on from a prompt; raises InputError for networks of images and unusable prompts."""
    run, checkpoint = newest_checkpoint(path)
    if run.model.unit != "tokens":
        raise InputError(f"{path}: {run.model.name} reads images; lte sample is for networks of text")
    encode, decode = _tokenizer(path)
    given = encode(prompt)
    if not given:
        raise InputError("--prompt is empty; give it at least one character")
    if (largest := max(given)) >= text_sizes(run.model).vocab:
        raise InputError(f"--prompt has token {largest}, and model.vocab = {text_sizes(run.model).vocab}")
    step, network = _network(run, checkpoint)
    tokens = _continued(network, given, length, text_sizes(run.model).context, temperature, seed)
    output = Output(as_json)
    output.json({"version": 1, "run": str(path), "step": step, "prompt": prompt, "text": decode(tokens)})
    output.text(decode(tokens))
    output.hint(f"{len(tokens) - len(given)} tokens after step {step:,}, temperature {temperature:g}, seed {seed}")
    return 0


def eval_command(path: Path, data: str, field: str | None, as_json: bool) -> int:
    """Print loss, and perplexity or accuracy, on other data; raises InputError where it does not fit the network."""
    import torch

    from simulate.models.losses import row_losses_of

    run, checkpoint = newest_checkpoint(path)
    output = Output(as_json, as_json)
    keys = _data_keys(run, data, field)
    try:
        with reported_by(output.progress):
            batches, samples = _scored_batches(run, keys, kept_tokenizer(path), data_of(checkpoint))
    except InputError as error:
        # The keys of run.toml are those of the run's own data; here an option names the field.
        text = str(error).replace("--set data.field=", "--field ").replace("; remove the key", "; leave it out")
        raise InputError(text.replace(f"data.field = {field!r}", f"--field {field}")) from None
    step, network = _network(run, checkpoint)
    row_losses = row_losses_of(run.model)
    names, sums, count = ("loss", *batches.score_names), [0.0] * (1 + len(batches.score_names)), 0
    with torch.no_grad():
        for inputs, targets in batches.validation(samples, SAMPLES_AT_ONCE):
            outputs = network(inputs)
            scores = [row_losses(outputs, targets), *batches.scores(outputs, targets)]
            count += scores[0].numel()
            sums = [total + float(score.double().sum()) for total, score in zip(sums, scores, strict=True)]
    figures = {name: total / count for name, total in zip(names, sums, strict=True)}
    if run.model.unit == "tokens":
        figures["perplexity"] = math.exp(min(figures["loss"], 700.0))  # e^710 is no float
    output.json({"version": 1, "run": str(path), "step": step, "data": data, "samples": samples, **figures})
    text = ", ".join(f"{name.removeprefix('val_')} {value:.4f}" for name, value in figures.items())
    output.text(f"{data}: {text} ({samples:,} samples, {path} after step {step:,})")
    return 0


def _data_keys(run: Run, data: str, field: str | None) -> dict[str, str]:
    """Return the [data] table of other data: records are read by the run's own field where none is given."""
    if run.model.unit != "tokens":
        if field is not None:
            raise InputError(f"--field {field} is of records of text, and {run.model.name} reads images; leave it out")
        return {"path": data}
    if field is None and run.data.field is not None and has_fields(data):
        field = run.data.field
    return {"path": data, "tokenizer": run.data.tokenizer, **({} if field is None else {"field": field})}


def _scored_batches(run: Run, keys: dict[str, str], tokenizer: Path | None, fingerprint: str) -> tuple[Batches, int]:
    """Return the batches of other data, and how many samples count: all of a text, of images the held-out ones.

    `fingerprint` is of the data that the run was trained on.
    """
    from simulate.data.batches import TextBatches, build_batches

    if "data.name" in run.live_keys:
        raise InputError(
            f"{run.model.name} was trained on {run.data.name} of Python; score it there, with the "
            "weights of run.state_dict()"
        )
    # One device and no shards, since the data is not divided to be scored.
    table = run.model_dump(exclude_none=True)
    other = build_run({**table, "data": keys, "cluster": {**table["cluster"], "devices": 1}})
    dataset = load_data(other, tokenizer)
    if isinstance(dataset, Text):  # nothing of it was trained on
        whole = Text(dataset.tokens, dataset.source, dataset.vocabulary, held_out_from=0)
        context = text_sizes(run.model).context
        return TextBatches(whole, context, SAMPLES_AT_ONCE, 1, run.train.seed), len(whole.tokens) // (context + 1)
    trained = load_data(run)
    assert isinstance(trained, Images)
    assert isinstance(dataset, Images)
    if trained.fingerprint != fingerprint:
        raise InputError(
            f"{run.data.path or run.data.name} is not what it was in training, and the network knows pixels as its own "
            "data's mean and deviation made them; bring that data back"
        )
    if dataset.classes != trained.classes:
        raise InputError(
            f"--data {keys['path']} has the classes {', '.join(dataset.classes)}, and the network learned "
            f"{', '.join(trained.classes)}; name images of the same classes"
        )
    alike = replace(dataset, mean=trained.mean, std=trained.std)
    return build_batches(other, alike), len(alike.validation)


def _network(run: Run, checkpoint: Path) -> tuple[int, Network]:
    """Return the steps done, and the plain network with the merged weights, in evaluation."""
    from simulate.layers.convert import call_with_weights
    from simulate.methods.build_network import empty_model

    step, weights, _ = merged_weights(run, checkpoint)
    model = empty_model(run)
    return step, lambda inputs: call_with_weights(model, weights, inputs)


def _tokenizer(path: Path) -> tuple[Callable[[str], list[int]], Callable[[Sequence[int]], str]]:
    """Return how a run's text becomes tokens, and tokens text."""
    kept = kept_tokenizer(path)
    if kept is None:
        return lambda text: list(text.encode()), lambda tokens: bytes(t % 256 for t in tokens).decode(errors="replace")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(kept))
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids), tokenizer.decode


def _continued(
    network: Network, given: Sequence[int], length: int, context: int, temperature: float, seed: int
) -> list[int]:
    """Return the tokens with so many more: drawn at a temperature, or the likeliest ones at 0."""
    import torch

    tokens, generator = list(given), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(length):
            logits_V = network(torch.tensor([tokens[-context:]]))[0, -1].float()
            if temperature == 0:
                tokens.append(int(logits_V.argmax()))
            else:
                shares_V = torch.softmax(logits_V / temperature, dim=0)
                tokens.append(int(torch.multinomial(shares_V, 1, generator=generator)))
    return tokens
