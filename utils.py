"""Data and label corruption; and, from dldr, parameter vectors, snapshots and their PCA.

Nothing here knows of options' parsers, of runs or of their files. What is wrong with the input is
a ValueError whose message names the option or the file.
"""

import argparse
import atexit
import contextlib
import multiprocessing
import os
import random as python_random
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2 as transforms

from dldr import average, flatten, load_vector, pca, trainable, unflatten  # noqa: F401
from dldr.distributed import in_turn, print0, progress_bar, rank, world_size
from dldr.trajectory import load_samples  # noqa: F401

# -------------------------------------------------------------------------------------- data

IN_MEMORY_PIXELS = 64  # image files up to this side are decoded once and kept, above streamed
TEST_BATCH = 500  # images up to IN_MEMORY_PIXELS; fewer above, the larger their area


class Split(NamedTuple):
    """The training or the test images of a dataset as they were read."""

    images: Any  # uint8 (N, 3, side, side), or N paths
    labels: Tensor
    classes: list[str]


class Dataset(NamedTuple):
    """One row of DATASETS; mean and std are of pixels scaled to [0, 1]."""

    read: Callable[[argparse.Namespace, bool], Split]
    mean: Sequence[float]
    std: Sequence[float]
    image_size: int
    padding: int = 4  # zeros around the raw image, before a random crop to its size; 0: no crop
    flip: bool = True


# The options that change mean, std, padding and flip.
PREPROCESSING = ("mean", "std", "no_augment", "no_flip")


class Data(NamedTuple):
    """What a script trains and tests on."""

    train: "TensorLoader | FileLoader"
    test: "TensorLoader | FileLoader"
    num_classes: int
    wrong_labels: int = 0  # of the training images


# CIFAR-10's asymmetric noise: classes that are taken for others (Patrini et al., CVPR 2017).
SIMILAR = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
LABEL_FILE = re.compile(r"(.+\.(?:npy|pt))(?::(.+))?")  # of --noise: FILE or FILE:KEY
# What numpy writes into a pickle of an array, before its version 2 and since.
NUMPY_ARRAYS = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("int8", "uint8", "int16", "int32", "int64")),
    (np.empty(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    (np.empty(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
]


def rng(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """Random numbers that depend on (seed, purpose, index) only, the same on every device."""
    # Purposes count from 1: numpy takes [seed] and [seed, 0] for the same seed.
    names = "corrupt", "subset", "epoch", "network", "report", "statistics", "basis", "walk"
    return np.random.default_rng([seed, 1 + names.index(purpose), index])


def seed_all(seed: int) -> None:
    """Seed torch's random numbers, and those of random and numpy, which some networks draw."""
    torch.manual_seed(seed)
    python_random.seed(seed)
    np.random.seed(seed % 2**32)


def share(fraction: float, n: int) -> int:
    """⌊fraction · n⌋ of the decimal number: as a binary one, 0.29 · 100 is 28.999…"""
    return int(Fraction(str(fraction)) * n)


def corrupt_labels(
    labels: Tensor,
    fraction: float,
    num_classes: int,
    seed: int,
    noise: str = "symmetric",
    similar: Sequence[int] = (),
) -> Tensor:
    """A copy of `labels` (N,) with ⌊fraction · N⌋ of them replaced; `seed` alone decides which.

    They become what `noise` says. "symmetric": drawn uniformly over all classes, so that by chance
    some keep their label; "symmetric-other": over the other classes; "pair": the next class, and
    the first one after the last; "asymmetric": `similar[c]` of class c.
    """
    random = rng(seed, "corrupt")
    positions = random.permutation(len(labels))[: share(fraction, len(labels))]
    old, size = labels.cpu().numpy()[positions], len(positions)
    if noise == "symmetric":
        new = random.integers(num_classes, size=size)
    elif noise == "symmetric-other":
        new = (old + random.integers(1, max(2, num_classes), size=size)) % num_classes
    elif noise == "pair":
        new = (old + 1) % num_classes
    else:
        new = np.array(similar, dtype=np.int64)[old]
    corrupted = labels.clone()
    corrupted[positions] = torch.from_numpy(new).to(labels)
    return corrupted


def similar_classes(classes: Sequence[str]) -> list[int]:
    """What --noise asymmetric makes of each of CIFAR-10's classes; ValueError for others."""
    if not SIMILAR.keys() <= set(classes):
        raise ValueError("--noise asymmetric: allowed with the classes of CIFAR-10")
    return [list(classes).index(SIMILAR.get(name, name)) for name in classes]


def noisy_labels(args: argparse.Namespace, train: Split) -> Tensor:
    """The training labels as --corrupt and --noise make them."""
    noise, classes = args.noise, len(train.classes)
    if LABEL_FILE.fullmatch(noise):
        return labels_in_file(args, train)
    similar = similar_classes(train.classes) if noise == "asymmetric" else ()
    return corrupt_labels(
        train.labels, args.corrupt, classes, args.randomseed, noise=noise, similar=similar
    )


def labels_in_file(args: argparse.Namespace, train: Split) -> Tensor:
    """The labels in --noise FILE, which has those of all images, also where not all are kept.

    Raises ValueError where they are not those of this training set.
    """
    labels, clean = read_labels(args.noise)
    if not labels.is_floating_point():
        labels = labels.long()  # torch lacks the minimum of unsigned ones
    kept = np.arange(labels.numel())
    if args.smalldatasets:
        kept, _ = subset(labels.numel(), args.smalldatasets, args.randomseed)
    classes = len(train.classes)
    whole = labels.dim() == 1 and len(kept) == len(train.labels) and not labels.is_floating_point()
    if not whole or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"--noise {args.noise}: allowed: a whole number from 0 to {classes - 1} for each of "
            f"{args.datasets}'s training images"
        )
    if clean is not None and not torch.equal(clean[kept].to(train.labels), train.labels):
        raise ValueError(
            f"--noise {args.noise}: its clean_label are not {args.datasets}'s labels in this order"
        )
    return labels[kept].to(train.labels)


def read_labels(source: str) -> tuple[Tensor, Tensor | None]:
    """The labels in FILE.npy, FILE.pt or FILE.pt:KEY, and the right ones where it has these.

    CIFAR-10N's file calls them clean_label. No code in the file is run. Raises ValueError.
    """
    file, key = LABEL_FILE.fullmatch(source).groups()
    try:
        if file.endswith(".npy"):
            return torch.as_tensor(np.load(file)), None
        with torch.serialization.safe_globals(NUMPY_ARRAYS):
            held = torch.load(file, "cpu", weights_only=True)
        if not isinstance(held, Mapping):
            return torch.as_tensor(held), None
        labels = {str(name): torch.as_tensor(values) for name, values in held.items()}
    except Exception as error:  # numpy and torch raise any of half a dozen kinds
        raise ValueError(f"--noise {file}: not readable as labels, {error}") from error
    if key not in labels:
        raise ValueError(f"--noise {file}: name the labels, {file}:KEY; it has {', '.join(labels)}")
    return labels[key], labels.get("clean_label")


def batch_sizes(n: int, size: int) -> list[int]:
    """The sizes of the batches of n images, over all processes.

    A rest of fewer than two per process joins the last batch: BatchNorm needs two.
    """
    sizes = [size] * (n // size) + [n % size] * (n % size > 0)
    few = len(sizes) > 1 and sizes[-1] < 2 * world_size() <= size
    return [*sizes[:-2], size + sizes[-1]] if few else sizes


def local_batches(draws: Tensor, size: int) -> list[Tensor]:
    """This process's part of each batch of the draws for n images, (…, n)."""
    batches = draws.split(batch_sizes(draws.shape[1], size), dim=1)
    return [batch.tensor_split(world_size(), dim=1)[rank()] for batch in batches]


class TensorLoader:
    """Labeled images on the device, in batches: in order, or with a seed shuffled and augmented.

    Order and augmentation of an epoch are a function of (seed, epoch), the same on every device.
    Each of several processes gets its part of every batch.
    """

    def __init__(
        self,
        split: Split,
        dataset: Dataset,
        batch_size: int,
        device: str,
        seed: int | None = None,
        *,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.size, self.layout = split.images.shape[-1], layout
        self.padding = dataset.padding if seed is not None else 0
        self.flip = dataset.flip and seed is not None
        self.images = F.pad(split.images.to(device), [self.padding] * 4)
        if self.flip:  # twice the memory for two thirds of the time of mirroring batch by batch
            self.images = torch.cat([self.images, self.images.flip(3)])
        self.labels = split.labels.to(device)
        self.batch_size = batch_size
        self.seed = seed
        std = torch.tensor(dataset.std, device=device).view(3, 1, 1)
        self.scale = 1 / (255 * std)
        self.shift = -torch.tensor(dataset.mean, device=device).view(3, 1, 1) / std

    def __len__(self) -> int:
        return len(self.labels)

    def epoch(self, epoch: int = 0, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches, from the `first`, of float32 images (B, 3, side, side) and labels (B,)."""
        n, random = len(self), rng(self.seed or 0, "epoch", epoch)
        order = np.arange(n) if self.seed is None else random.permutation(n)
        top, left = random.integers(2 * self.padding + 1, size=(2, n))
        flip = random.integers(2, size=n) * self.flip
        # The epoch's one transfer to the device.
        draws = torch.from_numpy(np.stack([order, order + n * flip, top, left]))
        draws = draws.to(self.labels.device)
        # One index into a view of all windows: a batch is one gather, wherever each image is cut.
        windows = self.images.unfold(2, self.size, 1).unfold(3, self.size, 1)
        for which, image, top, left in local_batches(draws, self.batch_size)[first:]:
            images = windows[image, :, top, left].to(torch.float32, memory_format=self.layout)
            yield images.mul_(self.scale).add_(self.shift), self.labels[which]


class FileLoader:
    """Labeled image files, decoded by worker processes when needed; else like `TensorLoader`."""

    def __init__(
        self,
        split: Split,
        dataset: Dataset,
        batch_size: int,
        device: str,
        seed: int | None = None,
        *,
        layout: torch.memory_format = torch.contiguous_format,
        size: int,
        workers: int,
    ) -> None:
        self.files, self.labels, self.batch_size = split.images, split.labels, batch_size
        self.device, self.seed, self.layout = device, seed, layout
        # A scheduler may allow fewer cores than there are; macOS cannot tell.
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        self.workers = min(workers, len(allowed) or os.cpu_count() or 1)
        if self.workers:
            atexit.register(kill_workers)
        cut = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]  # 256 for 224
        if dataset.padding and seed is not None:
            cut = [transforms.RandomResizedCrop(size)]
        if dataset.flip and seed is not None:
            cut.append(transforms.RandomHorizontalFlip())
        to_float = transforms.ToDtype(torch.float32, scale=True)
        normalize = transforms.Normalize(dataset.mean, dataset.std)
        self.transform = transforms.Compose([transforms.PILToTensor(), *cut, to_float, normalize])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, draw: tuple[int, int]) -> tuple[Tensor, Tensor]:
        position, seed = draw
        with torch.random.fork_rng(devices=[]):  # without workers it is the network's, too
            torch.default_generator.manual_seed(seed)
            return self.transform(open_image(self.files[position])), self.labels[position]

    def epoch(self, epoch: int = 0, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches, from the `first`, of float32 images (B, 3, side, side) and labels (B,)."""
        random = rng(self.seed or 0, "epoch", epoch)
        n = len(self)
        order = np.arange(n) if self.seed is None else random.permutation(n)
        draws = torch.from_numpy(np.stack([order, random.integers(2**63, size=n)]))
        parts = local_batches(draws, self.batch_size)[first:]
        loader = torch.utils.data.DataLoader(
            self,
            batch_sampler=[part.T.tolist() for part in parts],
            num_workers=self.workers,
            worker_init_fn=ignore_signals,
            pin_memory=self.device == "cuda",
        )
        try:
            for batch in loader:
                images, labels = (part.to(self.device, non_blocking=True) for part in batch)
                yield images.contiguous(memory_format=self.layout), labels
        except ValueError as error:  # a worker's has its traceback; the message is the last line
            raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from error


def ignore_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach workers, too, but the main process ends them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def kill_workers() -> None:
    """End, at exit, the workers that an error's traceback has kept alive.

    Python itself would send the SIGTERM that they ignore, and wait for ever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise an error for each
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def open_image(file: str) -> Image.Image:
    """The image in `file` as RGB; raises ValueError that names a file that has none."""
    try:
        image = Image.open(file)
        if image.mode.startswith("I;16"):  # `convert` would clip it to 0 … 255
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        known_range = image.mode not in ("I", "F")
        image = image.convert("RGB")
    except Exception as error:  # each format has its own ways to be broken
        raise ValueError(f"--data-dir: {file}: not a readable image") from error
    if not known_range:
        raise ValueError(f"--data-dir: {file}: 32-bit pixels; save it with 8 or 16 bits")
    return image


def decode(split: Split, size: int, workers: int) -> Split:
    """The split with its files read: shorter side scaled to `size`, the middle cut out."""
    cut = [transforms.Resize(size), transforms.CenterCrop(size)]
    to_tensor = transforms.Compose([transforms.PILToTensor(), *cut])
    images = torch.empty(len(split.images), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        decoded = pool.map(lambda file: to_tensor(open_image(file)), split.images)
        bar = progress_bar(decoded, "decoding", len(split.images), unit="image")
        for position, image in enumerate(bar):
            images[position] = image
    return split._replace(images=images)


def gray_to_rgb(images: Tensor) -> Tensor:
    """(N, H, W) as (N, 3, H, W)."""
    return images[:, None].expand(-1, 3, -1, -1)


def read_digits(args: argparse.Namespace, train: bool) -> Split:
    """scikit-learn's 1,797 8 × 8 digits; the first 80 % of a fixed permutation train."""
    from sklearn.datasets import load_digits  # half a second that the other datasets need not wait

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    order = np.split(order, [int(0.8 * len(order))])[0 if train else 1]
    gray = torch.from_numpy(digits.images[order] * 15).to(torch.uint8)  # 0 … 16 to 0 … 240
    labels = torch.from_numpy(digits.target[order])
    return Split(gray_to_rgb(gray), labels, [str(name) for name in digits.target_names])


# Where torchvision looks in --data-dir.
FOLDERS = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python", "MNIST": "MNIST/raw"}


def read_torchvision(name: str, args: argparse.Namespace, train: bool) -> Split:
    """CIFAR10, CIFAR100 or MNIST from --data-dir, downloaded there on first use."""
    root = args.data_dir
    was_there = root.exists()
    try:
        read = partial(getattr(torchvision.datasets, name), root, train=train, download=True)
        dataset = in_turn(read)  # the first may download
    except Exception as error:  # network, disk or archive: the remedy is the same
        if not was_there:
            with contextlib.suppress(OSError):  # empty folders only
                for folder in sorted([root, *root.rglob("*")], reverse=True):
                    folder.rmdir()
        expected = FOLDERS.get(name, name)
        raise ValueError(
            f"--datasets {name}: not in --data-dir {root}, as {expected}, and not downloaded "
            f"({error}); name the directory that has {expected} with --data-dir, or take "
            "--datasets digits"
        ) from error
    if train and not was_there:
        print0(f"{name}: downloaded to {root}")
    images = torch.as_tensor(dataset.data)
    images = images.permute(0, 3, 1, 2) if images.dim() == 4 else gray_to_rgb(images)
    return Split(images, torch.as_tensor(dataset.targets), dataset.classes)


def read_folder(args: argparse.Namespace, train: bool) -> Split:
    """--data-dir/train, or --data-dir/test or val, with one folder of images a class."""
    folders = [args.data_dir / name for name in (["train"] if train else ["test", "val"])]
    folder = next(filter(Path.is_dir, folders), None)
    if folder is None:
        names = " or ".join(map(str, folders))
        raise ValueError(f"--data-dir {args.data_dir}: has no directory {names}")
    try:
        dataset = torchvision.datasets.ImageFolder(folder)
    except FileNotFoundError as error:
        raise ValueError(f"--data-dir: {error}") from error
    files, labels = zip(*dataset.samples, strict=True)
    return Split(np.array(files, dtype=object), torch.tensor(labels), dataset.classes)


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR100 = {
    "mean": (0.50707516, 0.48654887, 0.44091784),
    "std": (0.26733429, 0.25643846, 0.27615047),
}
# The digits' own, of the training images as read_digits scales them; MNIST's, as everywhere.
DIGITS = {"mean": (0.2873,) * 3, "std": (0.3540,) * 3, "flip": False}
MNIST = {"mean": (0.1307,) * 3, "std": (0.3081,) * 3, "flip": False}

DATASETS = {
    "digits": Dataset(read_digits, **DIGITS, image_size=8, padding=1),
    "CIFAR10": Dataset(partial(read_torchvision, "CIFAR10"), **IMAGENET, image_size=32),
    "CIFAR100": Dataset(partial(read_torchvision, "CIFAR100"), **CIFAR100, image_size=32),
    "MNIST": Dataset(partial(read_torchvision, "MNIST"), **MNIST, image_size=28, padding=0),
    "ImageFolder": Dataset(read_folder, **IMAGENET, image_size=32),
    "ImageNet": Dataset(read_folder, **IMAGENET, image_size=224),
}


def dataset_of(args: argparse.Namespace) -> Dataset:
    """The row of DATASETS that the options name, with what they change of it."""
    given = {name: vars(args)[name] for name in PREPROCESSING}
    changed = {name: given[name] for name in ("mean", "std") if given[name]}
    if given["no_flip"] or given["no_augment"]:
        changed["flip"] = False
    if given["no_augment"]:
        changed["padding"] = 0
    return DATASETS[args.datasets]._replace(**changed)


def check_split(args: argparse.Namespace, name: str, split: Split, classes: int, each: int) -> None:
    """Raise ValueError unless the split is images and labels of the dataset, enough for all."""
    dataset, n = DATASETS[args.datasets], len(split.images)
    right_size = dataset.read is read_folder or split.images.shape[-1] == dataset.image_size
    if classes < 2:
        raise ValueError(f"--data-dir {args.data_dir}: one class; allowed: at least two")
    in_range = set(split.labels.tolist()) <= set(range(classes))
    if not right_size or n != len(split.labels) or not n or not in_range:
        raise ValueError(
            f"--data-dir {args.data_dir}: not {args.datasets}'s {name} images and labels"
        )
    if 1 < world_size() > n / each:
        raise ValueError(
            f"--nproc_per_node: {world_size()} processes in all for {n} {name} images; "
            f"allowed: at most {n // each}"
        )


def subset(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of n training images --smalldatasets keeps, and which it leaves out."""
    order, kept = rng(seed, "subset").permutation(n), share(fraction, n)
    return order[:kept], order[kept:]


def read_splits(args: argparse.Namespace) -> tuple[Split, Split]:
    """The training images that --smalldatasets keeps, and the test images, with true labels."""
    dataset = DATASETS[args.datasets]
    if args.image_size != dataset.image_size and dataset.read is not read_folder:
        raise ValueError(
            f"--image-size {args.image_size}: allowed with {args.datasets}: {dataset.image_size}"
        )
    train, test = dataset.read(args, True), dataset.read(args, False)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"--data-dir {args.data_dir}: in training or test only: {', '.join(odd[:5])}"
        )
    if args.smalldatasets:
        kept, _ = subset(len(train.labels), args.smalldatasets, args.randomseed)
        if not len(kept):
            raise ValueError(
                f"--smalldatasets {args.smalldatasets}: keeps none of {len(train.labels)} images"
            )
        train = train._replace(images=train.images[kept], labels=train.labels[kept])
    check_split(args, "training", train, len(train.classes), 2)  # BatchNorm needs two
    check_split(args, "test", test, len(train.classes), 1)
    return train, test


def make_loader(
    split: Split, args: argparse.Namespace, batch_size: int | None = None, seed: int | None = None
) -> TensorLoader | FileLoader:
    """The images on the device, or as files to stream: in order, or with a seed as in training.

    The default `batch_size` is that of a test.
    """
    dataset, make, size = dataset_of(args), TensorLoader, args.image_size
    if batch_size is None:
        area = max(1.0, (size / IN_MEMORY_PIXELS) ** 2)
        batch_size = args.test_batch_size or max(1, int(TEST_BATCH / area))
        if world_size() > 1:
            batch_size = max(batch_size, 2 * world_size())  # so that each process has some of it
    if dataset.read is read_folder:
        if size <= IN_MEMORY_PIXELS:
            split = decode(split, size, args.workers)
        else:
            make = partial(FileLoader, size=size, workers=args.workers)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return make(split, dataset, batch_size, args.device, seed, layout=layout)


def load_data(args: argparse.Namespace) -> Data:
    """The data that the options name, with training labels as --corrupt and --noise make them."""
    train, test = read_splits(args)
    num_classes = len(train.classes)
    labels = noisy_labels(args, train)
    wrong = int((labels != train.labels).sum())
    batch_size = args.batch_size * args.accumulate
    seed = args.randomseed if args.train_seed is None else args.train_seed
    train = make_loader(train._replace(labels=labels), args, batch_size, seed)
    return Data(train, make_loader(test, args), num_classes, wrong)
