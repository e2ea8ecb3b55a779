"""Cost of assembling a batch beside the step that it feeds; medians over interleaved repetitions.

    python bench/studies/data.py --repetitions 10
    python bench/studies/data.py --text prose.txt           # also: a text of gigabytes, mapped from its file
    python bench/studies/data.py --archive cifar10.zip        # also: listing, decoding and mapping an archive of images

A share well below 1 on the CPU means that nothing is won by assembling ahead in a thread of its own. It is
why the loop assembles batches itself.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from simulate.comm.virtual import VirtualCommunicator
from simulate.common.cache_folder import CACHE_VARIABLE
from simulate.config.run import build_run
from simulate.config.tables import Data
from simulate.data.batches import Batches, TextBatches
from simulate.data.image_batches import ImageBatches
from simulate.data.images import Images, load_images
from simulate.data.load import image_source
from simulate.data.text import load_text
from simulate.methods.base import Method
from simulate.methods.registry import build_method
from simulate.models.families.vit import VitModel
from simulate.models.vit import Vit

DEVICES, MICRO_BATCH = 4, 8
ROWS = 4096
"""Made-up images on disk."""
SMALL = VitModel(layers=6, width=192, attention_heads=3, patch=4, image=32, classes=10)


@dataclass(frozen=True)
class Case:
    """Batches and the step that takes them."""

    name: str
    batches: Batches
    method: Method

    def seconds(self, step: int) -> tuple[float, float]:
        """Return the seconds of one batch and of its step."""
        start = time.perf_counter()
        inputs, targets = self.batches.batch(step, range(DEVICES))
        middle = time.perf_counter()
        self.method.step(inputs, targets, step)
        return middle - start, time.perf_counter() - middle


def made_up(folder: Path, pixels: int, classes: int) -> Images:
    """Return images of noise, mapped from a file."""
    shape = (ROWS, 3, pixels, pixels)
    array = np.memmap(folder / f"{pixels}.bin", np.uint8, "w+", shape=shape)
    random = np.random.default_rng(0)
    for row in range(ROWS):
        array[row] = random.integers(0, 256, shape[1:], np.uint8)
    names = tuple(map(str, range(classes)))
    labels, held_out = np.arange(ROWS) % classes, np.arange(ROWS) >= ROWS - 64
    return Images("noise", names, array, labels, held_out, (0.5,) * 3, (0.25,) * 3, "noise")


def cases(folder: Path, large_text: Path | None) -> list[Case]:
    """Return texts on the default model, and images plain and with all augmentations on Vision Transformers."""
    run = build_run({"method": {"name": "ddp"}, "train": {"micro_batch": MICRO_BATCH}, "cluster": {"devices": DEVICES}})
    communicator = VirtualCommunicator(DEVICES)
    cpu = torch.device("cpu")
    texts = {"text, gpt": run.data, f"{large_text}, gpt": Data(path=str(large_text))}
    found = [
        Case(name, TextBatches.of(run, load_text(data)), build_method(run, communicator, cpu))
        for name, data in list(texts.items())[: 1 if large_text is None else 2]
    ]
    for name, size in (("32 px, vit of 6 x 192", SMALL), ("224 px, vit_s16", VitModel(**VitModel.sizes["vit_s16"]))):
        images = made_up(folder, size.image, size.classes)
        method = build_method(run, communicator, cpu, Vit(size))
        plain = ImageBatches(images, MICRO_BATCH, DEVICES, 0)
        augmented = ImageBatches(images, MICRO_BATCH, DEVICES, 0, augment=("crop", "flip"), mixup=0.2)
        found += [Case(f"{name}, plain", plain, method), Case(f"{name}, crop, flip, mixup", augmented, method)]
    return found


def timed(name: str, call: Callable[[], object]) -> None:
    """Print how long a call takes, of the clock and of this process and its children."""
    start, before = time.perf_counter(), os.times()
    call()
    spent = sum(now - then for now, then in zip(os.times()[:4], before[:4], strict=True))
    print(f"{name}: {time.perf_counter() - start:.1f} s ({spent:.1f} s of processor time)", flush=True)


def read_archive(path: Path, folder: Path) -> None:
    """Print what an archive of images costs the first time and from the cache."""
    os.environ[CACHE_VARIABLE] = str(folder)

    def load() -> None:
        source = image_source(Data(path=str(path)))
        assert source is not None, "an archive holds images"
        load_images(source, source.frame(None, None, upscale=False))

    timed(f"{path.name}, first time", load)
    timed(f"{path.name}, cached", load)


def main() -> None:
    """Print the share of each case, then the archive's seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--archive", type=Path)
    parser.add_argument("--text", type=Path, help="a large text, which is memory-mapped")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder), arguments.text):
            # The first repetition allocates and maps the files, and is left out.
            pairs = [case.seconds(step) for step in range(arguments.repetitions + 1)][1:]
            batch_s = statistics.median(batch for batch, _ in pairs)
            share = statistics.median(batch / step for batch, step in pairs)
            print(f"{case.name}: batch {batch_s * 1e3:.2f} ms, {share:.2%} of its step", flush=True)
        if arguments.archive is not None:
            read_archive(arguments.archive, Path(folder) / "cache")


if __name__ == "__main__":
    main()
