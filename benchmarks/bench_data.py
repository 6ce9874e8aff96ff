"""Augmented training images a second: in memory, streamed, and as torchvision's PIL pipeline."""

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as T
from page import Page
from PIL import Image
from timing import DEVICE, alternate, spread, timed
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10

from utils import DATASETS, Dataset, FileLoader, Split, TensorLoader

BATCH = 128
COLUMNS = ["pipeline", "images/s", "× the first"]


def synthetic(images: int) -> Dataset:
    """Random images and labels in the place of CIFAR-10's."""

    def read(args: argparse.Namespace | None, train: bool) -> Split:
        torch.manual_seed(train)
        count = images if train else 128
        pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
        return Split(pixels, torch.randint(10, (count,)), list("0123456789"))

    return DATASETS["CIFAR10"]._replace(read=read)


def torchvision_loader(split: Split) -> DataLoader:
    """The images as torchvision's CIFAR10 hands them out, with two workers."""
    dataset = DATASETS["CIFAR10"]
    crop = [T.RandomHorizontalFlip(), T.RandomCrop(32, 4)]
    theirs = CIFAR10.__new__(CIFAR10)  # without its files
    theirs.data, theirs.targets = split.images.permute(0, 2, 3, 1).numpy(), split.labels.tolist()
    theirs.transform = T.Compose([*crop, T.ToTensor(), T.Normalize(dataset.mean, dataset.std)])
    theirs.target_transform = None
    return DataLoader(theirs, BATCH, shuffle=True, num_workers=2)


def rates(
    pipelines: Mapping[str, Callable[[], Iterable]], images: int, epochs: int
) -> Iterator[list[str]]:
    """Images a second of each pipeline, and how many times faster than the first it is."""
    calls = {
        name: partial(timed, lambda epoch=epoch: [None for _ in epoch()])
        for name, epoch in pipelines.items()
    }
    seconds = alternate(calls, epochs)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    for name, values in seconds.items():
        rate = spread([images / value for value in values])
        yield [name, rate, f"{first / medians[name]:.1f}"]


def in_memory(images: int, epochs: int) -> Iterator[list[str]]:
    """CIFAR's size, on the device as a whole, against torchvision's pipeline."""
    split = synthetic(images).read(None, True)
    theirs = torchvision_loader(split)
    ours = TensorLoader(split, DATASETS["CIFAR10"], BATCH, DEVICE, seed=1)
    pipelines = {"PIL, DataLoader, 2 workers": theirs.__iter__, "in memory, batched": ours.epoch}
    yield from rates(pipelines, images, epochs)


def streamed(images: int, epochs: int, directory: Path) -> Iterator[list[str]]:
    """ImageNet's size, from files that are written here."""
    directory.mkdir()
    files = [str(directory / f"{number}.png") for number in range(images)]
    random = np.random.default_rng(0)
    for file in files:
        Image.fromarray(random.integers(256, size=(256, 256, 3), dtype=np.uint8)).save(file)
    split = Split(files, torch.zeros(images, dtype=torch.long), [])
    options = {"seed": 1, "size": 224, "workers": 4}
    loader = FileLoader(split, DATASETS["ImageNet"], BATCH, DEVICE, **options)
    yield from rates({"224 × 224, streamed": loader.epoch}, images, epochs)


def tables(page: Page) -> None:
    """Write the table."""
    note = "Median (range) of 5 alternating epochs, 10,000 images."
    cases = {"data": partial(in_memory, 10_000, 5)}
    page.table("data: flip, pad 4, crop, normalize", note, COLUMNS, cases)
