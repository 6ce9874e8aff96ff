"""Data, label corruption, parameters as one vector, the samples of a trajectory and their PCA."""

import argparse
import atexit
import contextlib
import math
import multiprocessing
import os
import re
import signal
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms

from distributed import (
    RUNNING_STATISTICS,
    all_reduce,
    broadcast,
    in_turn,
    local_columns,
    print0,
    progress_bar,
    rank,
    world_size,
)
from errors import SIGNALS, InputError, blame

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


def rng(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """Random numbers that depend on (seed, purpose, index) only, the same on every device."""
    # Purposes count from 1: numpy takes [seed] and [seed, 0] for the same seed.
    purposes = {"corrupt": 1, "subset": 2, "epoch": 3, "network": 4, "report": 5, "statistics": 6}
    return np.random.default_rng([seed, purposes[purpose], index])


def corrupt_labels(labels: Tensor, fraction: float, num_classes: int, seed: int) -> Tensor:
    """A copy of `labels` (N,) with ⌊fraction · N⌋ of them drawn uniformly over all classes.

    Which ones, and what they become, depends on `seed` alone; by chance some keep their label.
    """
    random = rng(seed, "corrupt")
    positions = random.permutation(len(labels))[: int(fraction * len(labels))]
    new = random.integers(num_classes, size=len(positions))
    corrupted = labels.clone()
    corrupted[positions] = torch.from_numpy(new).to(labels)
    return corrupted


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
        self, split: Split, dataset: Dataset, batch_size: int, device: str, seed: int | None = None,
        *, layout: torch.memory_format = torch.contiguous_format
    ) -> None:  # fmt: skip
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
        self, split: Split, dataset: Dataset, batch_size: int, device: str, seed: int | None = None,
        *, layout: torch.memory_format = torch.contiguous_format, size: int, workers: int
    ) -> None:  # fmt: skip
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
        with torch.random.fork_rng(
            devices=[]
        ):  # without workers the network uses this generator, too
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
            line = str(error).splitlines()[-1].removeprefix("ValueError: ")
            raise InputError(f"--data-dir: {line}") from error


def ignore_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach workers, too, but the main process ends them."""
    for number in SIGNALS:
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
        if image.mode in ("I", "F"):
            raise ValueError(f"{file}: 32-bit pixels have no known range; save 8 or 16 bits")
        return image.convert("RGB")
    except Exception as error:  # each format has its own ways to be broken
        if str(error).startswith(f"{file}: "):
            raise
        raise ValueError(f"{file}: not a readable image") from error


def decode(split: Split, size: int, workers: int) -> Split:
    """The split with its files read: shorter side scaled to `size`, the middle cut out."""
    cut = [transforms.Resize(size), transforms.CenterCrop(size)]
    to_tensor = transforms.Compose([transforms.PILToTensor(), *cut])
    images = torch.empty(len(split.images), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor(max(workers, 1)) as pool, blame("--data-dir"):
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
        raise InputError(
            f"--datasets {name}: not in --data-dir {root}, and not downloaded ({error}); "
            "name the directory that has it with --data-dir, or take --datasets digits"
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
        raise InputError(f"--data-dir {args.data_dir}: has no directory {names}")
    with blame("--data-dir"):
        dataset = torchvision.datasets.ImageFolder(folder)
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
    given = {name: getattr(args, name, None) for name in PREPROCESSING}  # earlier versions had none
    changed = {name: given[name] for name in ("mean", "std") if given[name]}
    if given["no_flip"] or given["no_augment"]:
        changed["flip"] = False
    if given["no_augment"]:
        changed["padding"] = 0
    return DATASETS[args.datasets]._replace(**changed)


def check_split(args: argparse.Namespace, name: str, split: Split, classes: int, each: int) -> None:
    """Raise InputError unless the split is images and labels of the dataset, enough for all."""
    dataset, n = DATASETS[args.datasets], len(split.images)
    right_size = dataset.read is read_folder or split.images.shape[-1] == dataset.image_size
    in_range = set(split.labels.tolist()) <= set(range(classes))
    if not right_size or n != len(split.labels) or not n or not in_range:
        raise InputError(
            f"--data-dir {args.data_dir}: not {args.datasets}'s {name} images and labels"
        )
    if 1 < world_size() > n / each:
        raise InputError(
            f"--nproc_per_node: {world_size()} processes in all for {n} {name} images; "
            f"allowed: at most {n // each}"
        )


def subset(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of n training images --smalldatasets keeps, and which it leaves out."""
    order = rng(seed, "subset").permutation(n)
    return order[: int(fraction * n)], order[int(fraction * n) :]


def read_splits(args: argparse.Namespace) -> tuple[Split, Split]:
    """The training images that --smalldatasets keeps, and the test images, with true labels."""
    dataset = DATASETS[args.datasets]
    if args.image_size != dataset.image_size and dataset.read is not read_folder:
        raise InputError(
            f"--image-size {args.image_size}: allowed with {args.datasets}: {dataset.image_size}"
        )
    train, test = dataset.read(args, True), dataset.read(args, False)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise InputError(
            f"--data-dir {args.data_dir}: in training or test only: {', '.join(odd[:5])}"
        )
    if args.smalldatasets:
        kept, _ = subset(len(train.labels), args.smalldatasets, args.randomseed)
        if not len(kept):
            raise InputError(
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
        batch_size = getattr(args, "test_batch_size", None) or max(1, int(TEST_BATCH / area))
    if dataset.read is read_folder:
        if size <= IN_MEMORY_PIXELS:
            with blame("--data-dir"):
                check_image_memory(split, size, dataset.padding, seed is not None, args.device)
            split = decode(split, size, args.workers)
        else:
            make = partial(FileLoader, size=size, workers=args.workers)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return make(split, dataset, batch_size, args.device, seed, layout=layout)


def check_image_memory(split: Split, size: int, padding: int, augmented: bool, device: str) -> None:
    """Print what decoded images will take; ValueError if they do not fit into memory."""
    side, n = size + 2 * padding * augmented, len(split.images)
    # As read, padded, and mirrored while the two halves are put together.
    needed = 3 * n * (size**2 + side**2 * (4 if augmented else 1))
    what = f"{n:,} images of {size} × {size} pixels"
    check_memory(needed, what, device, "a smaller --image-size or --smalldatasets")
    if needed > 2**30:
        print0(f"{what}: {size_text(needed)} of memory at most")


def load_data(args: argparse.Namespace) -> Data:
    """The data that the options name, with --corrupt of the training labels corrupted."""
    train, test = read_splits(args)
    num_classes = len(train.classes)
    labels = corrupt_labels(train.labels, args.corrupt, num_classes, args.randomseed)
    batch_size = args.batch_size * getattr(args, "accumulate", 1)
    train = train._replace(labels=labels)
    return Data(
        make_loader(train, args, batch_size, args.randomseed), make_loader(test, args), num_classes
    )


def free_memory(device: str) -> float:
    """Bytes that are still free on the device; infinite where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if torch.device(device).type != "cpu":
        return math.inf
    free = math.inf
    with contextlib.suppress(OSError, TypeError):
        found = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
        free = 1024 * int(found[1])
    with contextlib.suppress(OSError, ValueError):  # a container's own limit, where it has one
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = re.search(r"inactive_file (\d+)", (group / "memory.stat").read_text())
        free = min(free, limit - used + int(cached[1]))
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # the machine's processes share it


def check_memory(needed: float, what: str, device: str, cure: str) -> None:
    """ValueError where `what` needs more bytes than are free; `cure` says what would fit."""
    free = free_memory(device)
    if needed > free:
        raise ValueError(
            f"{what} take {size_text(needed)}, {size_text(free)} are free on {device}; "
            f"allowed: {cure}"
        )


def size_text(size: float) -> str:
    """Bytes, in the largest unit that gives at least 1."""
    power = max((power for power in range(1, 4) if size >= 1024**power), default=0)
    return f"{size / 1024**power:.1f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"


# ------------------------------------------------------------------ parameters as one vector


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """θ by name: the parameters with requires_grad; of a frozen model all that are real numbers.

    Raises ValueError for complex ones, and for those of lazy modules, which have no size yet.
    """
    for name, p in model.named_parameters():
        if p.requires_grad and p.is_complex():
            raise ValueError(f"{name} is complex; allowed: real numbers (torch.view_as_real)")
        if nn.parameter.is_lazy(p):
            raise ValueError(f"{name} is lazy; give its module a size, or a first batch")
    real = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    return {name: p for name, p in real.items() if p.requires_grad} or real


def flatten(model: nn.Module) -> Tensor:
    """The trainable parameters as one vector (n,), a copy, in `named_parameters` order."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in trainable(model).values()])


def unflatten(vector: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """The vector (n,) cut into tensors named and shaped like the trainable parameters, copies.

    Raises ValueError where the vector is not as long as the model has trainable parameters.
    """
    names, parameters = zip(*trainable(model).items(), strict=True)
    sizes = [parameter.numel() for parameter in parameters]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"a vector {tuple(vector.shape)} for {sum(sizes)} parameters")
    parts = zip(names, vector.split(sizes), parameters, strict=True)
    return {name: part.reshape(parameter.shape).clone() for name, part, parameter in parts}


@torch.no_grad()
def load_vector(vector: Tensor, model: nn.Module) -> None:
    """Write the vector (n,) into the trainable parameters: what `flatten` read, back in place."""
    for name, value in unflatten(vector, model).items():
        model.get_parameter(name).copy_(value)


# ------------------------------------------------------------------- the samples and their PCA

BLOCK = 2**24  # numbers of all samples together that PCA holds in float64 at a time


class Sample(dict):
    """A state dict in `file`, whose values are read where and when they are used."""

    file: Path


def load_state_dict(file: Path, mmap: bool = False) -> dict[str, Tensor]:
    """The state dict in a sample, checkpoint.pt, model.th or other weights file, on the CPU.

    No code in the file is run. DataParallel's prefix `module.` is dropped. With `mmap` values are
    read as they are used. Raises ValueError that names the file where it holds none.
    """
    state = read_tensors(file, mmap)
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.device.type == "cpu"
        for name, value in state.items()
    ):
        raise ValueError(f"{file}: holds no state dict")
    return {name.removeprefix("module."): value for name, value in state.items()}


def read_tensors(file: Path, mmap: bool = False) -> Any:
    """What torch.save wrote, on the CPU; only tensors and plain values are let in, no code runs.

    Raises ValueError that names the file where it is missing, truncated or corrupt.
    """
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    try:
        with warnings.catch_warnings():  # of old formats: they are read, or refused
            warnings.simplefilter("ignore")
            mmap = mmap and zipfile.is_zipfile(file)  # files of torch < 1.6 cannot be mapped
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a broken file makes torch raise any of half a dozen kinds
        why = f"truncated or corrupt ({type(error).__name__})"
        if "Unsupported" in str(error):  # what torch says of all that is not plain data
            why = "it holds code, as a pickled model does; save the model's state_dict()"
        raise ValueError(f"{file}: cannot be read, {why}") from error


def load_samples(save_dir: str | Path, start: int, end: int, stride: int = 1) -> list[Sample]:
    """The state dicts start.pt, … below end, read only where and when they are used.

    Raises FileNotFoundError that says which are missing and which are there, and ValueError for a
    file that is truncated or corrupt.
    """
    save_dir = Path(save_dir)
    numbers = range(start, end, stride)
    listed = sample_numbers(save_dir)
    there = set(listed)
    missing = list(islice((number for number in numbers if number not in there), 4))
    if missing:
        last = next(number for number in reversed(numbers) if number not in there)
        missing = [*missing[:3], last] if len(missing) > 3 else missing
        have = f"there are {abbreviate(listed)}" if there else "there are none"
        raise FileNotFoundError(f"{save_dir} lacks the samples {abbreviate(missing)}; {have}")
    samples = []
    for number in numbers:
        samples.append(Sample(load_state_dict(save_dir / f"{number}.pt", mmap=True)))
        samples[-1].file = save_dir / f"{number}.pt"
    return samples


def sample_numbers(save_dir: Path) -> list[int]:
    """The numbers of the samples that are there, the smallest first."""
    files = (file for file in save_dir.glob("*.pt") if file.stem.isdecimal() and file.is_file())
    return sorted(int(file.stem) for file in files)


def abbreviate(numbers: Sequence[int]) -> str:
    """A few numbers as they are, more by their ends."""
    return ", ".join(map(str, [*numbers[:2], "…", numbers[-1]] if len(numbers) > 3 else numbers))


def average(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of state dicts, BatchNorm's statistics included."""
    return {
        name: (sum(sample[name].double() for sample in samples) / len(samples)).to(first.dtype)
        for name, first in samples[0].items()
    }


def parameter_names(sample: Mapping[str, Tensor]) -> list[str]:
    """The entries of a state dict that may be trained: without running statistics and integers.

    Tied weights count once. Only a network can tell its other buffers apart: see `trainable`.
    """
    first: dict[tuple, str] = {}  # of the names of the same memory
    for name, value in sample.items():
        if value.is_floating_point() and name.rpartition(".")[2] not in RUNNING_STATISTICS:
            first.setdefault((value.data_ptr(), value.shape), name)
    return list(first.values())


def with_names(samples: Any, names: Iterable[str] | None) -> tuple[Sequence[Mapping], list[str]]:
    """The samples as state dicts, vectors too, and the names of what is taken of each.

    Raises ValueError where they differ in shape.
    """
    if not isinstance(samples[0], Mapping):
        samples, names = [{"": torch.as_tensor(sample)} for sample in samples], [""]
    names = list(parameter_names(samples[0]) if names is None else names)
    if any(sample[name].shape != samples[0][name].shape for sample in samples for name in names):
        raise ValueError("the samples differ in their shapes")
    return samples, names


def centered_blocks(
    samples: Sequence[Mapping[str, Tensor]], names: Sequence[str], device: Any
) -> Iterator[tuple[slice, Tensor]]:
    """The T samples about their mean, ≤ BLOCK / T of this process's columns (and which) at a time.

    A block is good until the next one is taken: it is the same memory, since fresh pages for
    every block were measured to cost more than the arithmetic. It is filled where the samples are,
    and goes to another device in one copy.
    """
    width = max(1, BLOCK // len(samples))
    home = samples[0][names[0]].device
    block = torch.empty(len(samples), width, dtype=torch.float64, device=home)
    sizes = [samples[0][name].numel() for name in names]
    first, last = local_columns(sum(sizes))
    start = 0
    with progress_bar(None, "PCA", last - first, unit="columns", unit_scale=True) as bar:
        for name, size in zip(names, sizes, strict=True):
            for column in range(max(first, start), min(last, start + size), width):
                stop = min(column + width, last, start + size)
                filled = block[:, : stop - column]
                for row, sample in zip(filled, samples, strict=True):
                    row.copy_(sample[name].reshape(-1)[column - start : stop - start])
                columns = filled.to(device)
                columns -= columns.mean(0)
                yield slice(column, stop), columns
                bar.update(stop - column)
            start += size


def orthonormalize(basis: Tensor, sharded: bool = False) -> None:
    """Gram–Schmidt in place on linearly independent rows (k, n), from the first one on.

    With `sharded` each process holds some of the columns. Raises ValueError where the rows are
    linearly dependent, to rounding.
    """
    blocks = basis.split(max(1, BLOCK // len(basis)), dim=1)
    gram = sum(block.double() @ block.double().T for block in blocks)
    if sharded:
        all_reduce(gram)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:  # a host sync
        raise ValueError("its rows are linearly dependent")
    for block in blocks:
        block.copy_(torch.linalg.solve_triangular(factor, block.double(), upper=False))


def principal_axes(
    samples: Sequence[Mapping[str, Tensor]], names: Sequence[str], device: Any = "cpu"
) -> tuple[Tensor, Tensor]:
    """Eigenvalues (T,), the largest first, and eigenvectors (T, T) of the centered Gram matrix.

    In float64: with a matrix in float32 the basis made from it is not orthonormal (an error of
    0.24 was measured). The eigenvalues are T times the variances along the principal components.
    """
    gram = torch.zeros(len(samples), len(samples), dtype=torch.float64, device=device)
    for _, block in centered_blocks(samples, names, device):
        gram.addmm_(block, block.T)
    all_reduce(gram)
    if not gram.isfinite().all():
        for position, sample in enumerate(samples):
            if not all(sample[name].isfinite().all() for name in names):
                file = getattr(sample, "file", f"sample {position}")
                raise ValueError(f"{file}: holds values that are not finite")
        raise ValueError("the samples are too large")
    values, vectors = (part.flip(-1).contiguous() for part in torch.linalg.eigh(gram))
    # On other hardware the vectors could have other signs.
    return broadcast(values), broadcast(vectors)


def check_components(n_components: int | float, most: int, samples: int) -> None:
    """ValueError unless it is a k from 1 to `most`, or a fraction of the variance below 1."""
    fits = n_components < 1 if isinstance(n_components, float) else n_components <= most
    if most < 1 or n_components <= 0 or not fits:
        allowed = f"at most {most}, or a fraction of the variance below 1"
        raise ValueError(f"{n_components} of {samples} samples; allowed: {allowed}")


def check_basis_memory(k: int, n: int, dtype: torch.dtype, device: str) -> None:
    """ValueError for a basis (k, n) that is larger than the memory there is."""
    row = n * dtype.itemsize
    what = f"{k} directions of {n:,} parameters in {dtype}"
    check_memory(k * row, what, device, f"{free_memory(device) // row:.0f} directions")


@torch.no_grad()
def pca(
    samples: Any, n_components: int | float, *, names: Iterable[str] | None = None,
    device: Any = "cpu", dtype: torch.dtype | None = None, shard: bool = False
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Principal components of T samples: basis (k, n), explained_variance_ratio (k,).

    `samples` is a matrix (T, n), a sequence of vectors (n,), as `flatten` makes them, or of state
    dicts, of which `names` are taken: `trainable(model)`, or by default all real numbers but
    BatchNorm's statistics, too many where a network has other buffers. `n_components` is k, or the
    fraction of the variance that the fewest components exceed. Rows are orthonormal, those of
    largest variance first, the entry of largest magnitude in each positive, as in scikit-learn. The
    results are on `device`, the basis in `dtype` (default: the samples'), ratios at least float32.

    T ≪ n, so the components come from the T × T Gram matrix. Several processes share the work by
    columns; with `shard` each returns those of the basis that are its own, (k, n / processes).

    Raises ValueError where k > T − 1, where the samples do not span k directions, and where they
    are not finite or of different shapes.
    """
    samples, names = with_names(samples, names)
    own = samples[0][names[0]].dtype
    own = own if own.is_floating_point else torch.float64
    n = sum(samples[0][name].numel() for name in names)
    k = n_components
    check_components(k, min(len(samples) - 1, n), len(samples))
    first, last = local_columns(n)
    settings = (last - first if shard else n, dtype or own, device)
    if not isinstance(k, float):  # what memory cannot hold is refused before the work
        check_basis_memory(k, *settings)

    variances, vectors = principal_axes(samples, names, device)
    ratios = variances.clamp(min=0) / variances.sum()
    if isinstance(k, float):
        k = min(int(torch.searchsorted(ratios.cumsum(0), k, right=True)) + 1, len(samples) - 1, n)
        check_basis_memory(k, *settings)
    spanned = int((variances > len(samples) * torch.finfo(torch.float64).eps * variances[0]).sum())
    if k > spanned:
        raise ValueError(f"{k}, but the {len(samples)} samples span only {spanned} directions")

    basis = torch.empty(k, settings[0], dtype=dtype or own, device=device)
    local = basis if shard else basis[:, first:last]
    combine(vectors[:, :k] / variances[:k].sqrt(), samples, names, local, first)
    if variances[k - 1] < 1e-8 * variances[0]:  # otherwise their rounding does not matter
        orthonormalize(local, sharded=True)
    flip_signs(local)
    if not shard:
        gather_columns(basis)
    return basis, ratios[:k].to(torch.promote_types(own, torch.float32))


def combine(
    weights: Tensor, samples: Sequence[Mapping], names: Sequence[str], basis: Tensor, first: int
) -> None:
    """Fill this process's columns of a basis, from `first` on: weightsᵀ (k, T) times samples."""
    product = torch.empty(0, dtype=torch.float64, device=basis.device)  # reused as the block is
    for columns, block in centered_blocks(samples, names, basis.device):
        place = slice(columns.start - first, columns.stop - first)
        product.resize_(len(basis), block.shape[1])
        basis[:, place] = torch.mm(weights.T, block, out=product)


def flip_signs(basis: Tensor) -> None:
    """Make the entry of largest magnitude in each row positive, over all processes' columns."""
    lows, highs = (torch.stack(e) for e in zip(*(row.aminmax() for row in basis), strict=True))
    all_reduce(lows, dist.ReduceOp.MIN)
    all_reduce(highs, dist.ReduceOp.MAX)
    for row, flip in zip(basis, (-lows > highs).tolist(), strict=True):
        if flip:
            row.neg_()


def gather_columns(basis: Tensor) -> None:
    """Fill in the columns of a basis (k, n) that the other processes have computed."""
    width = -(-basis.shape[1] // world_size())
    for number, columns in enumerate(basis.split(width, dim=1) if world_size() > 1 else ()):
        part = columns.contiguous()
        dist.broadcast(part.view(torch.uint8), number)  # as bytes: gloo does not know all types
        columns.copy_(part)
