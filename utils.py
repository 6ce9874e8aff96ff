"""What the scripts share: options, data, parameter vectors, PCA, a run's files, the epoch loop."""

import argparse
import atexit
import contextlib
import difflib
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from signal import SIGINT, SIGTERM
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from torchvision.transforms import v2 as transforms
from tqdm import tqdm

# ------------------------------------------------------------------------------ command line


def refuse(message: str, code: int = 2) -> NoReturn:
    """End the program: one line on stderr that says what is wrong, and the exit code."""
    if number := number_under_torchrun():
        time.sleep(5)  # what process 0 refuses too it has said by then, and torchrun ends this one
        message = f"process {number}: {message}"
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def number_under_torchrun() -> int:
    """Which of the processes this is that torchrun started, also before they have met."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def restarts() -> int:
    """How often torchrun has started all processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler`."""
    earlier = {number: signal.signal(number, handler) for number in (SIGINT, SIGTERM)}
    try:
        yield
    finally:
        for number, former in earlier.items():
            signal.signal(number, former)


def program(main: Callable[[], Any]) -> None:
    """Run a script's main, in which SIGINT and SIGTERM are one line and exit code 130 or 143."""

    def stop(number: int, frame: Any) -> None:
        if number_under_torchrun():
            raise SystemExit(128 + number)
        refuse(f"stopped by {signal.Signals(number).name}", 128 + number)

    with handling(stop):
        try:
            main()
        except torch.OutOfMemoryError as error:
            refuse(f"--batch-size: too large for the memory of the GPU ({error})", 1)
        except RuntimeError as error:  # gloo has no class of its own
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            refuse(f"between processes, one of which may be gone: {error}", 1)


@contextlib.contextmanager
def refusing(what: str = "", kinds: Any = (ValueError, OSError)) -> Iterator[None]:
    """Turn what a function here raises about its arguments or files into a refusal."""
    try:
        yield
    except kinds as error:
        refuse(f"{what}: {error}" if what else str(error))


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults, and refuses in one line."""

    def add(self, *flags: str, help: str, default: Any = None, **settings: Any) -> None:
        """`add_argument`, with the default told in the help."""
        if default is not None:
            help += " (default: %(default)s)"
            settings["default"] = default
        self.add_argument(*flags, help=help, **settings)

    def error(self, message: str) -> NoReturn:
        """Refuse without the usage, which is a screenful here."""
        refuse(f"{message} (--help lists the options)")


def checked(kind: type, allowed: str, test: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type: a `kind` that passes `test`; `allowed` says in words what passes."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if test(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")

    return parse


positive = checked(int, "a whole number from 1 to 2³¹ − 1", lambda value: 0 < value < 2**31)
natural = checked(int, "a whole number from 0 to 2³¹ − 1", lambda value: 0 <= value < 2**31)
threads = checked(int, "a whole number from 1 to 1024", lambda value: 0 < value <= 1024)
fraction = checked(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
share = checked(float, "a number above 0, at most 1", lambda value: 0 < value <= 1)
amount = checked(float, "a number from 0 to 1e38", lambda value: 0 <= value <= 1e38)


def components(text: str) -> int | float:
    """An argparse type: how many components, or the fraction of variance they are to explain."""
    allowed = "a whole number from 1, or a fraction of the variance between 0 and 1"
    kind, test = (int, lambda k: k > 0) if text.isdecimal() else (float, lambda f: 0 < f < 1)
    return checked(kind, allowed, test)(text)


def sample_or_mean(text: str) -> int | str:
    """An argparse type: the number of a sample, or "mean"."""
    return text if text == "mean" else natural(text)


def folder(text: str) -> str:
    """An argparse type: a name of letters, digits, points and lines, that starts with a letter."""
    return checked(str, "a name, as psgd_random", re.compile(r"[A-Za-z][\w.-]*").fullmatch)(text)


def place(text: str) -> Path:
    """An argparse type: a path that a file system can have."""
    if not text or any(len(os.fsencode(part)) > 255 for part in Path(text).parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a path of names of 1 to 255 bytes")
    return Path(text)


def one_of(what: str, names: Sequence[str]) -> Callable[[str], str]:
    """An argparse type: one of `names`; a near miss is answered with the nearest."""

    def parse(text: str) -> str:
        if text in names:
            return text
        near = difflib.get_close_matches(text, names, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"allowed: {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"there is no {what} {text!r}; {hint}")

    return parse


def network(networks: ModuleType) -> Callable[[str], str]:
    """An argparse type: a name of `networks`, package.module:callable, or `list`: prints them."""

    def parse(text: str) -> str:
        if text == "list":
            print(networks.listing())
            raise SystemExit(0)
        own = re.fullmatch(r"[\w.]+:\w+", text)
        return text if own else one_of("network", networks.ARCHITECTURES)(text)

    return parse


# One option a row reads as the table it is.
# fmt: off
def parser(
    description: str, networks: ModuleType, arch: str, epochs: int, weight_decay: float
) -> Parser:
    """The options that the three scripts have in common, with a script's own defaults.

    `networks` is the module models: its ARCHITECTURES are allowed, its listing() prints them.
    """
    options = Parser(description=description, allow_abbrev=False)
    add = options.add
    add("-a", "--arch", type=network(networks), metavar="NAME", default=arch,
        help="a network (`--arch list` prints them all), or package.module:callable, which is "
        "called with num_classes")
    add("--datasets", type=one_of("dataset", list(DATASETS)), metavar="NAME", default="CIFAR10",
        help=", ".join(DATASETS))
    add("--data-dir", type=place, metavar="DIR", default=Path("../data"),
        help="where the dataset is, or is downloaded to")
    add("--image-size", type=positive, metavar="PIXELS",
        help="side of the images of ImageFolder and ImageNet (default: 32 and 224)")
    add("-j", "--workers", type=natural, metavar="N", default=4,
        help="threads or processes that decode image files")
    add("--epochs", type=positive, metavar="N", default=epochs, help="number of the last epoch")
    add("--start-epoch", type=natural, metavar="N", default=0,
        help="epochs taken as done at the start; --resume knows by itself")
    add("-b", "--batch-size", type=positive, metavar="N", default=128, help="images a batch")
    add("--weight-decay", "--wd", type=amount, metavar="W", default=weight_decay,
        help="L2 penalty: W / 2 times the squared norm of all parameters")
    add("-p", "--print-freq", type=positive, metavar="N", default=50,
        help="every N batches, look whether the loss is finite, and show it on a terminal")
    add("--resume", type=place, nargs="?", const=True, metavar="PATH",
        help="go on from this checkpoint (without PATH: the run's own, if there is one)")
    add("--overwrite", action="store_true", help="replace an earlier run in the same directory")
    add("-e", "--evaluate", action="store_true",
        help="only test, the weights of --pretrained or --resume, else the run's own model.th")
    add("--pretrained", type=place, nargs="?", const=True, metavar="PATH",
        help="start from these weights (without PATH: torchvision's, where it has them)")
    add("--half", action="store_true", help="run the network in bfloat16 (autocast)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto is cuda where there is one, else cpu")
    add("--channels-last", action=argparse.BooleanOptionalAction,
        help="give the network its images in channels_last memory format (default: on the CPU)")
    add("--compile", action="store_true", help="compile the network (torch.compile)")
    add("--threads", type=threads, metavar="N", help="CPU threads (default: as torch decides)")
    add("--sync-bn", action="store_true",
        help="under torchrun on CUDA, BatchNorm normalises with the batches of all processes")
    add("--tf32", action="store_true", help="on CUDA, multiply in TensorFloat-32 (10 bits)")
    add("--deterministic", action="store_true",
        help="give the same bits at every run, on CUDA too; an operation that cannot is an error")
    add("--save-dir", type=place, metavar="DIR", default=Path("save_temp"),
        help="directory of the trajectory, and of the runs in its subspaces")
    add("--save-every", type=positive, metavar="N", default=10,
        help="write checkpoint.pt and model.th every N epochs, and at the end")
    add("--randomseed", type=natural, metavar="N", default=1,
        help="seed of initialisation, label corruption, data order and augmentation")
    add("--corrupt", type=fraction, metavar="C", default=0.0,
        help="fraction of the training labels drawn anew, uniformly over all classes")
    add("--smalldatasets", type=share, metavar="P",
        help="train on a random fraction P of the training images")
    return options


def add_schedule_options(
    options: Parser, lr: float | None, lr_help: str, milestones: list[int] | None, usual: str
) -> None:
    """Add what plain SGD needs, whatever it moves: step size, momentum, schedule."""
    options.add("--lr", "--learning-rate", type=amount, metavar="LR", default=lr, help=lr_help)
    options.add("--momentum", type=fraction, metavar="M", default=0.9, help="momentum")
    options.add_argument("--milestones", type=natural, nargs="*", metavar="N", default=milestones,
        help=f"after N epochs the step size drops to a tenth (default: {usual})")


def add_subspace_options(options: Parser) -> None:
    """Add what says which samples span the subspace, and how many directions of them to keep."""
    add = options.add
    add("--n_components", "--n-components", type=components, metavar="K", default=40,
        help="directions to keep, or the fraction of the samples' variance to explain, as 0.99")
    add("--params_start", "--params-start", type=natural, metavar="N", default=0,
        help="first sample, where training in the subspace starts from")
    add("--params_end", "--params-end", type=natural, metavar="N", default=51,
        help="one past the last sample")
    add("--params_stride", "--params-stride", type=positive, metavar="N", default=1,
        help="take every N-th sample")
    add("--basis", metavar="BASIS", default="pca",
        help="pca; schmidt: all that the samples span, whatever K; random: K random directions; "
        "or a file, .npz or .npy")
    add("--start", type=sample_or_mean, metavar="N",
        help="train from this sample, or from their mean (default: --params_start)")
    add("--bn-update", action="store_true",
        help="before each test, BatchNorm's statistics anew over the training images")
    add("--run", type=folder, metavar="NAME",
        help="directory in --save-dir (default: the method's, with --basis and --start if given)")
    add("--shard-basis", action="store_true",
        help="under torchrun, each process keeps its part of the basis' columns")
    add("--basis-dtype", choices=["float32", "bfloat16"], default="float32",
        help="how the basis is kept; bfloat16 takes half the memory")
# fmt: on


def parse(options: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options given, with what they leave open (device, image size) decided."""
    args = options.parse_args(argv)
    for option, path in (("--save-dir", args.save_dir), ("--data-dir", args.data_dir)):
        with refusing(option):
            path.exists()  # OSError where one may not look
    if args.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: torch sees no CUDA device here; allowed: auto, cpu")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    join_processes(args)
    dataset = DATASETS[args.datasets]
    if args.image_size not in (None, dataset.image_size) and dataset.read is not read_folder:
        refuse(
            f"--image-size {args.image_size}: allowed with {args.datasets}: {dataset.image_size}"
        )
    args.image_size = args.image_size or dataset.image_size
    started = getattr(args, "start", None) is not None
    for one, other, both in (
        ("--overwrite", "--resume", args.overwrite and args.resume),
        ("--start", "--pretrained", started and args.pretrained),
    ):
        if both:
            refuse(f"{one}: not with {other}; allowed: one of them")
    if args.evaluate and args.resume and args.pretrained:
        refuse("--resume: not with --evaluate and --pretrained; allowed: one of them to test")
    if args.epochs <= args.start_epoch:
        refuse(f"--epochs {args.epochs}: allowed: above --start-epoch {args.start_epoch}")
    if 1 < world() > args.batch_size / 2:
        refuse(f"--batch-size {args.batch_size}: allowed: from {2 * world()}, two a process")
    if getattr(args, "shard_basis", False) and args.basis not in ("pca", "schmidt"):
        refuse(f"--shard-basis: not with --basis {args.basis}; allowed: pca, schmidt")
    if args.sync_bn and args.device == "cpu":
        refuse("--sync-bn: allowed on CUDA; on the CPU torch has no BatchNorm over processes")
    if args.channels_last is None:  # on the CPU it was never slower (benchmarks/README.md)
        args.channels_last = args.device == "cpu"
    if args.compile and args.device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        refuse("--compile: needs a C++ compiler on the CPU; install g++, or name yours in CXX")
    set_engine(args)
    return args


def set_engine(args: argparse.Namespace) -> None:
    """Make torch's settings, which are the process's, those of the options."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    # Trying cuDNN's algorithms pays since shapes repeat; which one wins varies from run to run.
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.use_deterministic_algorithms(args.deterministic)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by cuBLAS


# --------------------------------------------------------------------------------- processes


def rank() -> int:
    """The number of this process among those that train together, 0 where it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(args: argparse.Namespace) -> None:
    """Where torchrun started this process: meet the others, and take the GPU of this one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    if args.device == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            refuse(f"--nproc_per_node: allowed: at most {there}, a process for each GPU")
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        store, number, size = next(dist.rendezvous("env://"))
        # It may still know the processes that are gone.
        store = dist.PrefixStore(str(restarts()), store)
        backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=size)
        atexit.register(dist.destroy_process_group)
    if restarts() and not args.evaluate:  # the command is that of the first start
        args.resume, args.overwrite = args.resume or True, False


def say(text: str) -> None:
    """Print a line, once for all processes."""
    if rank() == 0:
        print(text, flush=True)


def progress_bar(iterable: Iterable | None, text: str, total: int, **settings: Any) -> tqdm:
    """A bar, on a terminal, of rank 0."""
    disable = True if rank() else None
    return tqdm(iterable, text, total, disable=disable, leave=False, **settings)


def parallel(module: nn.Module) -> nn.Module:
    """The module with gradients that are means over all processes, as its only traffic."""
    if world() == 1:
        return module
    # Gradients of 1 × 1 convolutions on channels_last images: copied once more, which is little.
    warnings.filterwarnings("ignore", "Grad strides do not match")
    with warnings.catch_warnings():  # the option's new name is not in torch 2.6
        warnings.simplefilter("ignore")
        # Buffers are not sent out at every step: `synchronise` does that before they are used.
        return DistributedDataParallel(module, broadcast_buffers=False)


def mean_over_processes(value: Tensor) -> Tensor:
    """`value`, changed in place to its mean over the processes."""
    return all_reduce(value).div_(world()) if world() > 1 else value


def sum_over_processes(totals: Mapping[str, Tensor | float]) -> dict[str, Tensor | float]:
    """The sum of each number over the processes, in one message; this is a host sync."""
    if world() == 1:
        return dict(totals)
    summed = torch.tensor([float(total) for total in totals.values()], dtype=torch.float64)
    return dict(zip(totals, all_reduce(summed), strict=True))


def all_reduce(value: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """`value` changed in place to its sum, or the like, over the processes."""
    if world() > 1:
        dist.all_reduce(value, operation)
    return value


def own_columns(n: int) -> tuple[int, int]:
    """Which of n columns this process holds: from the first number to before the second."""
    width = -(-n // world())
    return min(n, rank() * width), min(n, (rank() + 1) * width)


def synchronise(model: nn.Module) -> None:
    """Give all processes the mean of their BatchNorm statistics."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            mean_over_processes(buffer)


# -------------------------------------------------------------------------------------- data

IN_MEMORY_PIXELS = 64  # image files up to this side are decoded once and kept, above streamed
TEST_BATCH = 500


class Split(NamedTuple):
    """The training or the test half of a dataset as it was read."""

    images: Any  # uint8 (N, 3, side, side), or N paths
    labels: Tensor
    classes: list[str]


class Dataset(NamedTuple):
    """One row of DATASETS; mean and std are of pixels scaled to [0, 1]."""

    read: Callable[[argparse.Namespace, bool], Split]
    mean: Sequence[float]
    std: Sequence[float]
    image_size: int
    padding: int = 4  # zeros around the raw image, before a random crop to its size
    flip: bool = True


class Data(NamedTuple):
    """What a script trains and tests on."""

    train: "Images | ImageFiles"
    test: "Images | ImageFiles"
    num_classes: int
    corrupted: int  # training labels drawn anew


def random_stream(seed: int, purpose: str, number: int = 0) -> np.random.Generator:
    """Random numbers that depend on (seed, purpose, number) only, the same on every device."""
    # Purposes count from 1: numpy takes [seed] and [seed, 0] for the same seed.
    purposes = {"corrupt": 1, "subset": 2, "epoch": 3, "network": 4, "report": 5, "statistics": 6}
    return np.random.default_rng([seed, purposes[purpose], number])


def corrupt_labels(labels: Tensor, fraction: float, num_classes: int, seed: int) -> Tensor:
    """A copy of `labels` (N,) in which ⌊fraction · N⌋ are drawn anew, uniformly over all classes.

    Which ones, and what they become, depends on `seed` alone; by chance some keep their label.
    """
    random = random_stream(seed, "corrupt")
    drawn = random.permutation(len(labels))[: int(fraction * len(labels))]
    new = random.integers(num_classes, size=len(drawn))
    corrupted = labels.clone()
    corrupted[drawn] = torch.from_numpy(new).to(labels)
    return corrupted


def crop(padded: Tensor, which: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Cut padded[which[i]] to size × size at (top[i], left[i]): (N, C, H, W) to (B, C, size, size).

    One index into a view of all windows: a batch is one gather, wherever each image is cut.
    """
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)
    return windows[which, :, top, left]


def batch_sizes(n: int, size: int) -> list[int]:
    """The sizes of the batches of n images, over all processes.

    One left over joins the last batch: each process needs two to have a variance.
    """
    sizes = [size] * (n // size) + [n % size] * (n % size > 0)
    few = len(sizes) > 1 and sizes[-1] < 2 * world() <= size
    return [*sizes[:-2], size + sizes[-1]] if few else sizes


def own_parts(draws: Tensor, size: int) -> list[Tensor]:
    """This process's part of each batch of what was drawn for n images, (…, n)."""
    batches = draws.split(batch_sizes(draws.shape[1], size), dim=1)
    return [batch.tensor_split(world(), dim=1)[rank()] for batch in batches]


class Images:
    """Labelled images on the device, in batches: in order, or with a seed shuffled and augmented.

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
        if self.flip:  # twice the memory for half the time of mirroring batch by batch
            self.images = torch.cat([self.images, self.images.flip(3)])
        self.labels = split.labels.to(device)
        self.batch_size = batch_size
        self.seed = seed
        std = torch.tensor(dataset.std, device=device).view(3, 1, 1)
        self.scale = 1 / (255 * std)
        self.shift = -torch.tensor(dataset.mean, device=device).view(3, 1, 1) / std

    def __len__(self) -> int:
        return len(self.labels)

    def epoch(self, number: int = 0, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches, from the `first`, of float32 images (B, 3, side, side) and labels (B,)."""
        n = len(self)
        which, top, left, flip = np.arange(n), *np.zeros((3, n), dtype=np.int64)
        if self.seed is not None:
            random = random_stream(self.seed, "epoch", number)
            which = random.permutation(n)
            top, left = random.integers(2 * self.padding + 1, size=(2, n))
            flip = random.integers(2, size=n) * self.flip
        # The epoch's one transfer to the device.
        draws = torch.from_numpy(np.stack([which, which + n * flip, top, left]))
        draws = draws.to(self.labels.device)
        for which, *where in own_parts(draws, self.batch_size)[first:]:
            images = crop(self.images, *where, self.size)
            images = images.to(torch.float32, memory_format=self.layout)
            yield images.mul_(self.scale).add_(self.shift), self.labels[which]


class ImageFiles:
    """Labelled image files, decoded by worker processes when needed; otherwise like `Images`."""

    def __init__(
        self, split: Split, dataset: Dataset, batch_size: int, device: str, seed: int | None = None,
        *, layout: torch.memory_format = torch.contiguous_format, size: int, workers: int
    ) -> None:  # fmt: skip
        self.files, self.labels, self.batch_size = split.images, split.labels, batch_size
        self.device, self.seed, self.layout = device, seed, layout
        self.workers = min(workers, os.cpu_count() or 1)
        if seed is None:
            cut = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]  # 256 for 224
        else:
            cut = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        to_float = transforms.ToDtype(torch.float32, scale=True)
        normalise = transforms.Normalize(dataset.mean, dataset.std)
        self.transform = transforms.Compose([transforms.PILToTensor(), *cut, to_float, normalise])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, draw: tuple[int, int]) -> tuple[Tensor, Tensor]:
        position, seed = draw
        with torch.random.fork_rng(devices=[]):  # without workers the network draws here, too
            torch.default_generator.manual_seed(seed)
            return self.transform(open_image(self.files[position])), self.labels[position]

    def epoch(self, number: int = 0, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches, from the `first`, of float32 images (B, 3, side, side) and labels (B,)."""
        random = random_stream(self.seed or 0, "epoch", number)
        n = len(self)
        order = np.arange(n) if self.seed is None else random.permutation(n)
        draws = torch.from_numpy(np.stack([order, random.integers(2**63, size=n)]))
        loader = torch.utils.data.DataLoader(
            self,
            batch_sampler=[part.T.tolist() for part in own_parts(draws, self.batch_size)[first:]],
            num_workers=self.workers,
            worker_init_fn=ignore_interrupt,
            pin_memory=self.device == "cuda",
        )
        try:
            for batch in loader:
                images, labels = (part.to(self.device, non_blocking=True) for part in batch)
                yield images.contiguous(memory_format=self.layout), labels
        except ValueError as error:  # a worker's comes with its traceback, ours is the last line
            refuse(f"--data-dir: {str(error).splitlines()[-1].removeprefix('ValueError: ')}")


def ignore_interrupt(worker: int) -> None:
    """Ctrl-C goes to all processes of a terminal; the main one ends the workers."""
    signal.signal(SIGINT, signal.SIG_IGN)


def open_image(file: str) -> Image.Image:
    """The image in `file` as RGB; raises ValueError that names a file that has none."""
    try:
        return Image.open(file).convert("RGB")
    except Exception as error:  # each format has its own ways to be broken
        raise ValueError(f"{file}: not a readable image") from error


def decode(split: Split, size: int, workers: int) -> Split:
    """The split with its files read: shorter side scaled to `size`, the middle cut out."""
    cut = [transforms.Resize(size), transforms.CenterCrop(size)]
    to_tensor = transforms.Compose([transforms.PILToTensor(), *cut])
    with ThreadPoolExecutor(max(workers, 1)) as pool, refusing("--data-dir"):
        images = pool.map(lambda file: to_tensor(open_image(file)), split.images)
        bar = progress_bar(images, "decoding", len(split.images), unit="image")
        return split._replace(images=torch.stack(list(bar)))


def grey_to_rgb(images: Tensor) -> Tensor:
    """(N, H, W) as (N, 3, H, W)."""
    return images[:, None].expand(-1, 3, -1, -1)


def read_digits(args: argparse.Namespace, train: bool) -> Split:
    """scikit-learn's 1,797 8 × 8 digits; the first 80 % of a fixed permutation train."""
    from sklearn.datasets import load_digits  # half a second that the other datasets need not wait

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    order = np.split(order, [int(0.8 * len(order))])[0 if train else 1]
    grey = torch.from_numpy(digits.images[order] * 15).to(torch.uint8)  # 0 … 16 to 0 … 240
    labels = torch.from_numpy(digits.target[order])
    return Split(grey_to_rgb(grey), labels, [str(name) for name in digits.target_names])


def read_torchvision(name: str, args: argparse.Namespace, train: bool) -> Split:
    """CIFAR10, CIFAR100 or MNIST from --data-dir, downloaded there on first use."""
    root = args.data_dir
    was_there = root.exists()
    try:
        if rank():
            dist.barrier()  # process 0 first: it may download
        dataset = getattr(torchvision.datasets, name)(root, train=train, download=True)
        if world() > 1 and rank() == 0:
            dist.barrier()
    except Exception as error:  # network, disk or archive: the ways out are the same
        if not was_there:
            with contextlib.suppress(OSError):  # empty folders only
                for folder in sorted([root, *root.rglob("*")], reverse=True):
                    folder.rmdir()
        refuse(
            f"--datasets {name}: not in --data-dir {root}, and not downloaded ({error}); "
            "name the directory that has it with --data-dir, or take --datasets digits"
        )
    if train and not was_there:
        say(f"{name}: downloaded to {root}")
    images = torch.as_tensor(dataset.data)
    images = images.permute(0, 3, 1, 2) if images.dim() == 4 else grey_to_rgb(images)
    return Split(images, torch.as_tensor(dataset.targets), dataset.classes)


def read_folder(args: argparse.Namespace, train: bool) -> Split:
    """--data-dir/train, or --data-dir/test or val, with one folder of images a class."""
    folders = [args.data_dir / name for name in (["train"] if train else ["test", "val"])]
    folder = next(filter(Path.is_dir, folders), None)
    if folder is None:
        refuse(f"--data-dir {args.data_dir}: has no directory {' or '.join(map(str, folders))}")
    with refusing("--data-dir"):
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


def read_splits(args: argparse.Namespace) -> tuple[Split, Split]:
    """The training half, less what --smalldatasets drops, and the test half; true labels."""
    dataset = DATASETS[args.datasets]
    train, test = dataset.read(args, True), dataset.read(args, False)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        refuse(f"--data-dir {args.data_dir}: in training or test only: {', '.join(odd[:5])}")
    classes = set(range(len(train.classes)))
    for name, split in (("training", train), ("test", test)):
        n, labels = len(split.images), split.labels
        shape = dataset.read is read_folder or split.images.shape[-1] == dataset.image_size
        if not shape or n != len(labels) or not n or set(labels.tolist()) - classes:
            refuse(f"--data-dir {args.data_dir}: not {args.datasets}'s {name} images and labels")
    if args.smalldatasets:
        kept = random_stream(args.randomseed, "subset").permutation(len(train.labels))
        kept = kept[: int(args.smalldatasets * len(kept))]
        if not len(kept):
            refuse(
                f"--smalldatasets {args.smalldatasets}: keeps none of {len(train.labels)} images"
            )
        train = train._replace(images=train.images[kept], labels=train.labels[kept])
    return train, test


def in_batches(
    split: Split, args: argparse.Namespace, batch_size: int = TEST_BATCH, seed: int | None = None
) -> Images | ImageFiles:
    """The images on the device, or as files to stream: in order, or with a seed as in training."""
    dataset, make = DATASETS[args.datasets], Images
    if dataset.read is read_folder:
        if args.image_size <= IN_MEMORY_PIXELS:
            split = decode(split, args.image_size, args.workers)
        else:
            make = partial(ImageFiles, size=args.image_size, workers=args.workers)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return make(split, dataset, batch_size, args.device, seed, layout=layout)


def load_data(args: argparse.Namespace) -> Data:
    """The data the options name, with --corrupt of the training labels drawn anew."""
    train, test = read_splits(args)
    num_classes = len(train.classes)
    labels = corrupt_labels(train.labels, args.corrupt, num_classes, args.randomseed)
    batch_size = args.batch_size * getattr(args, "accumulate", 1)
    return Data(
        in_batches(train._replace(labels=labels), args, batch_size, args.randomseed),
        in_batches(test, args),
        num_classes,
        int(args.corrupt * len(labels)),
    )


# ------------------------------------------------------------------ parameters as one vector


def flatten(model: nn.Module) -> Tensor:
    """The parameters of `model` as one vector (n,), a copy, in `named_parameters` order."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def unflatten(vector: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """The vector (n,) cut into tensors named and shaped like the parameters of `model`, copies.

    Raises ValueError where the vector is not as long as the model has parameters.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    sizes = [parameter.numel() for parameter in parameters]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"a vector {tuple(vector.shape)} for {sum(sizes)} parameters")
    parts = zip(names, vector.split(sizes), parameters, strict=True)
    return {name: part.reshape(parameter.shape).clone() for name, part, parameter in parts}


# ------------------------------------------------------------------------ trajectory and PCA

BASES = ("pca", "schmidt", "random")
BLOCK = 2**24  # numbers of all samples together that PCA holds in float64 at a time
BATCHNORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def load_samples(save_dir: str | Path, start: int, end: int, stride: int = 1) -> list["Sample"]:
    """The state dicts start.pt, … below end, read only where and when they are used.

    Raises FileNotFoundError that says which are missing and which are there, and ValueError for a
    file that is not whole.
    """
    save_dir = Path(save_dir)
    numbers = range(start, end, stride)
    listed = sample_numbers(save_dir)
    there = set(listed)
    missing = list(islice((number for number in numbers if number not in there), 4))
    if missing:
        last = next(number for number in reversed(numbers) if number not in there)
        missing = [*missing[:3], last] if len(missing) > 3 else missing
        have = f"there are {shorten(listed)}" if there else "there are none"
        raise FileNotFoundError(f"{save_dir} lacks the samples {shorten(missing)}; {have}")
    return [Sample(save_dir / f"{number}.pt") for number in numbers]


def sample_range(arguments: Mapping[str, Any]) -> range:
    """The numbers of the samples that a run takes, by its options as config.json has them."""
    if arguments.get("average"):
        return range(*arguments["average"])
    names = ("params_start", "params_end", "params_stride")
    return range(*(arguments[name] for name in names)) if "basis" in arguments else range(0)


def sample_numbers(save_dir: Path) -> list[int]:
    """The numbers of the samples that are there, the smallest first."""
    files = (file for file in save_dir.glob("*.pt") if file.stem.isdecimal() and file.is_file())
    return sorted(int(file.stem) for file in files)


def shorten(numbers: Sequence[int]) -> str:
    """A few numbers as they are, more by their ends."""
    return ", ".join(map(str, [*numbers[:2], "…", numbers[-1]] if len(numbers) > 3 else numbers))


class Sample(Mapping):
    """A state dict in a file, of which a tensor, or a part of one, is read when it is asked for.

    `torch.load(mmap=True)` would map whole files, which count as memory used once they are touched.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.entries = state_dict_in(file, "meta")  # shapes, and where in the file the values are
        storages = (entry.untyped_storage() for entry in self.entries.values())
        if None in [getattr(storage, "_checkpoint_offset", None) for storage in storages]:
            self.entries = state_dict_in(file)  # torch does not tell where in files of torch < 1.6

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        if not entry.is_meta:
            return entry
        span = 1 + sum((n - 1) * step for n, step in zip(entry.shape, entry.stride(), strict=True))
        return self._read(entry, 0, span).as_strided(entry.shape, entry.stride())

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Like self[name].reshape(-1)[start:stop]."""
        entry = self.entries[name]
        if entry.is_meta and entry.is_contiguous():
            return self._read(entry, start, stop)
        return self[name].reshape(-1)[start:stop]

    def _read(self, entry: Tensor, start: int, stop: int) -> Tensor:
        if stop <= start:
            return torch.empty(0, dtype=entry.dtype)
        size = entry.element_size()
        place = entry.untyped_storage()._checkpoint_offset + (entry.storage_offset() + start) * size
        values = np.fromfile(self.file, np.uint8, (stop - start) * size, offset=place)
        return torch.from_numpy(values).view(entry.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def entries_of(sample: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict's tensors, without the values of those that are in a file."""
    return sample.entries if isinstance(sample, Sample) else sample


def kinds(sample: Mapping[str, Tensor]) -> dict[str, tuple]:
    """Shapes, and what else tensors have to share to be copied into each other."""
    return {
        name: (e.shape, e.layout, e.is_quantized, e.is_floating_point(), e.is_complex())
        for name, e in entries_of(sample).items()
    }


def part_of(sample: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """Some numbers of a tensor, from memory or file."""
    if isinstance(sample, Sample):
        return sample.part(name, start, stop)
    return sample[name].reshape(-1)[start:stop]


def column_blocks(
    samples: Sequence[Mapping[str, Tensor]], names: Sequence[str], device: Any
) -> Iterator[tuple[slice, Tensor]]:
    """The T samples about their mean, ≤ BLOCK / T of this process's columns (and which) at a time.

    A block is good until the next one is taken: it is the same memory, since fresh pages for
    every block were measured to cost more than the arithmetic.
    """
    width = max(1, BLOCK // len(samples))
    block = torch.empty(len(samples), width, dtype=torch.float64, device=device)
    sizes = [entries_of(samples[0])[name].numel() for name in names]
    first, last = own_columns(sum(sizes))
    start = 0
    with progress_bar(None, "PCA", last - first, unit="columns", unit_scale=True) as bar:
        for name, size in zip(names, sizes, strict=True):
            for column in range(max(first, start), min(last, start + size), width):
                stop = min(column + width, last, start + size)
                columns = block[:, : stop - column]
                for row, sample in zip(columns, samples, strict=True):
                    row.copy_(part_of(sample, name, column - start, stop - start))
                columns -= columns.mean(0)
                yield slice(column, stop), columns
                bar.update(stop - column)
            start += size


def orthonormalise(basis: Tensor, in_parts: bool = False) -> None:
    """Gram–Schmidt in place on rows (k, n) that are nearly orthonormal, from the first one on.

    `in_parts`: each process holds some of the columns.
    """
    blocks = basis.split(max(1, BLOCK // len(basis)), dim=1)
    gram = sum(block.double() @ block.double().T for block in blocks)
    if in_parts:
        all_reduce(gram)
    factor = torch.linalg.cholesky(gram)
    for block in blocks:
        block.copy_(torch.linalg.solve_triangular(factor, block.double(), upper=False))


def parameter_names(sample: Mapping[str, Tensor]) -> list[str]:
    """The entries of a state dict that are trained: all but BatchNorm's statistics."""
    return [name for name in sample if name.rpartition(".")[2] not in BATCHNORM_STATISTICS]


def principal_axes(
    samples: Sequence[Mapping[str, Tensor]], names: Sequence[str], device: Any = "cpu"
) -> tuple[Tensor, Tensor]:
    """Eigenvalues (T,), the largest first, and eigenvectors (T, T) of the centred Gram matrix.

    In float64: with a matrix in float32 the basis made from it is not orthonormal (an error of
    0.24 was measured). The eigenvalues are T times the variances along the principal components.
    """
    gram = torch.zeros(len(samples), len(samples), dtype=torch.float64, device=device)
    for _, block in column_blocks(samples, names, device):
        gram.addmm_(block, block.T)
    all_reduce(gram)
    if not gram.isfinite().all():
        for position, sample in enumerate(samples):
            if not all(sample[name].isfinite().all() for name in names):
                file = getattr(sample, "file", f"sample {position}")
                raise ValueError(f"{file}: holds values that are not finite")
        raise ValueError("the samples are too large")
    values, vectors = (part.flip(-1).contiguous() for part in torch.linalg.eigh(gram))
    if world() > 1:  # on other hardware the vectors could have other signs
        dist.broadcast(values, 0)
        dist.broadcast(vectors, 0)
    return values, vectors


def pca(
    samples: Any,
    n_components: int | float,
    *,
    names: Sequence[str] | None = None,
    device: Any = "cpu",
    dtype: torch.dtype | None = None,
    shard: bool = False,
) -> tuple[Tensor, Tensor]:
    """Principal components of T samples: basis (k, n), explained_variance_ratio (k,).

    `samples` is a matrix (T, n), a sequence of vectors (n,), or of state dicts, of which `names`
    are taken (default: all but BatchNorm statistics). `n_components` is k, or a fraction of the
    variance: as few as explain more than that. The rows of the basis are orthonormal, those of
    largest variance first, and the entry of largest magnitude in each is positive; all this is
    as in scikit-learn. The results are on `device`; the basis is rounded to `dtype`, by default to
    the samples' type.

    T ≪ n, so the components come from the T × T Gram matrix. Several processes share the work by
    columns; with `shard` each returns those of the basis that are its own, (k, n / processes).

    Raises ValueError where k > T − 1, where the samples do not span k directions, and where they
    are not finite or of different shapes.
    """
    if not isinstance(samples[0], Mapping):
        samples = [{"": torch.as_tensor(sample)} for sample in samples]
    if names is None:
        names = parameter_names(samples[0])
    first = kinds(samples[0])
    parameters = sum(entries_of(samples[0])[name].numel() for name in names)
    if any(kinds(sample) != first for sample in samples):
        raise ValueError("the samples differ in their shapes")
    most = min(len(samples) - 1, parameters)
    if not 0 < n_components <= most:
        raise ValueError(f"{n_components} of {len(samples)} samples; allowed: at most {most}")
    exact = entries_of(samples[0])[names[0]].dtype
    exact = exact if exact.is_floating_point else torch.float64
    first_column, last_column = own_columns(parameters)
    held = last_column - first_column if shard else parameters
    if isinstance(n_components, int):
        check_memory(n_components, held, dtype or exact, device)

    variances, vectors = principal_axes(samples, names, device)
    ratios = variances.clamp(min=0) / variances.sum()
    k = n_components
    if isinstance(k, float):
        k = min(int(torch.searchsorted(ratios.cumsum(0), k, right=True)) + 1, most)
        check_memory(k, held, dtype or exact, device)
    spanned = int(
        (variances > len(samples) * torch.finfo(variances.dtype).eps * variances[0]).sum()
    )
    if k > spanned:
        raise ValueError(f"{k}, but the {len(samples)} samples span only {spanned} directions")

    weights = vectors[:, :k] / variances[:k].sqrt()
    basis = torch.empty(k, held, dtype=dtype or exact, device=device)
    own = basis if shard else basis[:, first_column:last_column]
    product = torch.empty(0, dtype=torch.float64, device=device)
    for columns, block in column_blocks(samples, names, device):
        place = slice(columns.start - first_column, columns.stop - first_column)
        own[:, place] = torch.mm(weights.T, block, out=product.resize_(k, block.shape[1]))
    if variances[k - 1] < 1e-8 * variances[0]:  # else the rounding of the variances does not show
        orthonormalise(own, in_parts=True)
    lows, highs = (torch.stack(ends) for ends in zip(*(row.aminmax() for row in own), strict=True))
    all_reduce(lows, dist.ReduceOp.MIN)
    all_reduce(highs, dist.ReduceOp.MAX)
    for row, low, high in zip(own, lows, highs, strict=True):
        if -low > high:
            row.neg_()
    if not shard:
        gather_columns(basis)
    return basis, ratios[:k].to(exact)


def gather_columns(basis: Tensor) -> None:
    """Fill in the columns of a basis (k, n) that the other processes have computed."""
    width = -(-basis.shape[1] // world())
    for number, columns in enumerate(basis.split(width, dim=1) if world() > 1 else ()):
        part = columns.contiguous()
        dist.broadcast(part.view(torch.uint8), number)  # as bytes: gloo does not know all types
        columns.copy_(part)


def free_memory(device: str) -> float:
    """Bytes that can still be had on the device; on the CPU, infinite where Linux does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = math.inf
    with contextlib.suppress(OSError, TypeError):
        found = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
        free = 1024 * int(found[1])
    with contextlib.suppress(OSError, ValueError):  # a container's own limit, where it has one
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = re.search(r"inactive_file (\d+)", (group / "memory.stat").read_text())
        free = min(free, limit - used + int(cached[1]))
    return free


def check_memory(k: int, n: int, dtype: torch.dtype, device: str) -> None:
    """ValueError for a basis (k, n) that is larger than the memory there is."""
    free, row = free_memory(device), n * dtype.itemsize
    if torch.device(device).type == "cpu":  # that of the machine, which processes share
        free /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if k * row > free:
        raise ValueError(
            f"{k} directions of {n:,} parameters in {dtype} take {k * row / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free on {device}; {int(free // row)} would fit"
        )


class Basis(NamedTuple):
    """A subspace as basis.npz holds it."""

    basis: Tensor  # P (k, n)
    explained_variance_ratio: Tensor  # (k,)
    computed_from: str  # the fingerprint of the samples and options


def fingerprint(files: Sequence[Path], *options: Any) -> str:
    """A digest of the contents of `files`, as their own checksums tell them, and of `options`.

    What torch.save writes is a zip archive, which holds a CRC-32 of each tensor: nothing else is
    read. A file of another kind is read whole.
    """
    digest = hashlib.sha256(repr(options).encode())
    for file in files:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                digest.update(repr([entry.CRC for entry in archive.infolist()]).encode())
        else:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def computed_from(file: Path) -> str | None:
    """The fingerprint that a basis.npz was saved with; None where there is no such file."""
    with contextlib.suppress(Exception):  # whatever else the file may be
        return str(np.load(file)["computed_from"])


def save_basis(file: Path, basis: Basis) -> None:
    """Write a basis.npz. numpy knows no bfloat16: such a basis is written as its bits, uint16."""
    vectors = basis.basis.cpu()
    if vectors.dtype == torch.bfloat16:
        vectors = vectors.view(torch.uint16)
    ratios = basis.explained_variance_ratio.cpu()
    save(file, Basis(vectors.numpy(), ratios.numpy(), basis.computed_from)._asdict())


def load_basis(file: Path, n: int, device: str) -> Basis | None:
    """Read a basis.npz; None where it does not hold k rows of n finite numbers."""
    with contextlib.suppress(Exception):  # a broken one is computed anew
        arrays = np.load(file)
        vectors, ratios = (bits(arrays[name]).to(device) for name in Basis._fields[:2])
        fits = vectors.shape == (len(ratios), n)
        if fits and all(row.isfinite().all() for row in vectors):
            return Basis(vectors, ratios, str(arrays["computed_from"]))
    return None


def bits(array: np.ndarray) -> Tensor:
    """The array as a tensor; what `save_basis` wrote as bits is bfloat16 again."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def random_basis(k: int, n: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """k orthonormal rows (k, n) of a plane that is uniformly random, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(k, n, generator=generator).to(device)
    orthonormalise(basis)
    return basis.to(dtype)


def mean_of(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of state dicts, BatchNorm's statistics included."""
    return {
        name: (sum(sample[name].double() for sample in samples) / len(samples)).to(first.dtype)
        for name, first in samples[0].items()
    }


# ------------------------------------------------------------------------- the run directory

# The options that all runs on one trajectory share, and those that a resumed run has to keep.
EXPERIMENT = ("arch", "datasets", "image_size", "corrupt", "randomseed", "smalldatasets")
SUBSPACE = ("n_components", "params_start", "params_end", "params_stride", "basis", "start")
RESUMED = (*EXPERIMENT, *SUBSPACE, "optimizer", "momentum", "weight_decay", "alpha", "gamma")
RESUMED += ("sample_every",)
# These too in an epoch, or where samples count steps.
MIDWAY = ("batch_size", "accumulate", "start_epoch")


class Run(NamedTuple):
    """A run about to train: where, on what, what a checkpoint holds, how far it is."""

    args: argparse.Namespace
    directory: Path
    data: Data
    state: dict[str, Any]
    rows: list[dict]  # of the epochs done
    progress: dict[str, Any]  # of an epoch begun: batches done, sums, seconds
    basis: Basis | None
    lock: contextlib.ExitStack  # closing it gives the directory free


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Any]:
    """A binary stream whose content takes the place of `file` once it is all written.

    Ends the program where that cannot be, as on a full disk: what was there before stays.
    """
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
        temporary.replace(file)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of an OSError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        refuse(
            f"{file}: could not be written ({cause.strerror or cause}); the files written before "
            "are whole, go on with --resume once it can be", 1,
        )  # fmt: skip
    finally:
        temporary.unlink(missing_ok=True)


def save(file: Path, value: Any) -> None:
    """Write `value`: text to .json and .jsonl, arrays to .npz, anything of tensors elsewhere.

    Of several processes only rank 0 writes.
    """
    if rank():
        return
    with replacing(file) as stream:
        if file.suffix in (".json", ".jsonl"):
            stream.write(value.encode())
        elif file.suffix == ".npz":
            np.savez(stream, **value)
        else:
            torch.save(value, stream)


def read(file: Path, device: str = "cpu") -> Any:
    """What torch.save wrote, on the CPU, or without the values on "meta".

    Only tensors and plain values are let in, no code runs. Raises ValueError that names the file
    where it is missing or not whole.
    """
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    try:
        with warnings.catch_warnings():  # of old formats: they are read, or refused
            warnings.simplefilter("ignore")
            return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # a broken file makes torch raise any of half a dozen kinds
        raise ValueError(f"{file}: not a whole file of tensors ({type(error).__name__})") from error


def state_dict_in(file: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The state dict in a sample, checkpoint.pt, model.th or other weights file.

    DataParallel's prefix `module.` is dropped. Raises ValueError where there is none.
    """
    state = read(file, device)
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.device.type == device
        for name, value in state.items()
    ):
        raise ValueError(f"{file}: holds no state dict")
    return {name.removeprefix("module."): value for name, value in state.items()}


def check_fits(state: Mapping[str, Tensor], module: nn.Module, file: Path, arch: str) -> None:
    """ValueError for a state, read from `file`, whose names or shapes are not the module's."""
    own, given = kinds(module.state_dict()), kinds(state)
    for name in own | given:
        if own.get(name) != given.get(name):
            raise ValueError(f"{file}: does not fit --arch {arch} with these options, see {name}")


def check_values(state: Mapping[str, Tensor], file: Path) -> None:
    """ValueError for a state, read from `file`, that holds what is not finite."""
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{file}: {name} is not finite")


@torch.no_grad()
def load_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state that fits: some networks' `load_state_dict` asks for more than a plain one."""
    for name, value in module.state_dict().items():
        value.copy_(state[name])


def load_file(args: argparse.Namespace, model: nn.Module, file: Path) -> None:
    """Load the weights in `file`; raises ValueError where they do not fit --arch."""
    state = state_dict_in(file)
    check_fits(state, model, file, args.arch)
    check_values(state, file)
    load_into(model, state)


def load_torchvision_weights(model: nn.Module, arch: str) -> None:
    """Load torchvision's best weights, except for a classifier of another number of classes.

    Raises ValueError where torchvision has none for `arch`.
    """
    if arch not in torchvision.models.list_models():
        raise ValueError(f"torchvision has no weights for {arch}; name a file: --pretrained PATH")
    if getattr(model, "variant", "") == "for small images":
        raise ValueError(f"torchvision's weights are for {arch} as it is there; name a file: PATH")
    weights = torchvision.models.get_model_weights(arch).DEFAULT
    try:
        own, state = model.state_dict(), weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # network, disk or archive
        raise ValueError(f"{weights} not downloaded ({error}); name a file: PATH") from error
    fits = {name: v for name, v in state.items() if name in own and own[name].shape == v.shape}
    load_into(model, own | fits)
    left = ", ".join(sorted(own.keys() - fits.keys())) or "nothing"
    say(f"pretrained: {weights}; left as initialised: {left}")


@torch.no_grad()
def try_out(args: argparse.Namespace, model: nn.Module, data: Data) -> None:
    """Refuse a network that cannot be trained or tested on such data; leaves it as it was."""
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    size, classes = args.image_size, data.num_classes
    # Every network fails in its own way on images too small for it, or on one alone.
    what = f"--arch {args.arch}: cannot take images of {size} × {size} pixels"
    with refusing(what, Exception):
        outputs = [model.train(mode)(torch.zeros(2, 3, size, size)) for mode in (True, False)]
    for output in outputs:
        if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < classes:
            given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            refuse(f"--arch {args.arch}: gives {given} for two images, not (2, {classes}) numbers")
    if 1 in (len(data.train), args.batch_size) and not args.evaluate:
        fewer = f", --smalldatasets {args.smalldatasets}" if args.smalldatasets else ""
        what = f"--batch-size {args.batch_size}{fewer}: a batch of one image, on which {args.arch}"
        with refusing(f"{what} cannot train", Exception):
            model.train()(torch.zeros(1, 3, size, size))
    load_into(model, initial)


def make_model(
    args: argparse.Namespace, build: Callable[[str, int, int], nn.Module], data: Data
) -> nn.Module:
    """The network of --arch on the device, initialised with the seed or from --pretrained."""
    torch.manual_seed(args.randomseed)
    with refusing("--arch", (ValueError, TypeError)):
        model = build(args.arch, data.num_classes, args.image_size)
        if not isinstance(model, nn.Module):
            raise ValueError(f"{args.arch}: gives a {type(model).__name__}, not a torch.nn.Module")
    try_out(args, model, data)
    with refusing("--pretrained"):
        if args.pretrained is True:
            load_torchvision_weights(model, args.arch)
        elif args.pretrained:
            load_file(args, model, args.pretrained)
    model = model.to(args.device)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if args.sync_bn else model


def check_same(
    args: argparse.Namespace, recorded: Mapping[str, Any], names: Sequence[str], file: Path
) -> None:
    """Refuse where an option that has to be the same differs from what `file` recorded."""
    for name in names:
        value = getattr(args, name, None)
        needed = value is not None or name in EXPERIMENT  # earlier versions had fewer options
        if name in args and needed and name not in recorded:
            raise ValueError(f"{file}: does not tell its {name}")
        if name in args and recorded.get(name) != value:
            option = "--" + (name if name in SUBSPACE else name.replace("_", "-"))
            refuse(f"{option}: {value} here, {recorded[name]} in {file}; they have to be the same")


def check_config(args: argparse.Namespace, file: Path) -> None:
    """Refuse options that contradict the config.json of the run whose files are to be used."""
    if not file.exists():
        say(f"{file} is missing: not checked that its run had this data, network and seed")
        return
    with refusing(f"{file}: not readable", Exception):
        check_same(args, json.loads(file.read_text())["arguments"], EXPERIMENT, file)


def run_directory(args: argparse.Namespace, method: str) -> Path:
    """Where a subspace run's files are: --run, or a name that tells basis and start."""
    name = method
    if args.basis != "pca":
        name += f"_{Path(args.basis).stem}"
    if args.start is not None:
        name += f"_from_{args.start}"
    return args.save_dir / (args.run or name)


def load_trajectory(args: argparse.Namespace) -> list[Sample]:
    """The samples the options name, once it is clear that they are of the same experiment."""
    if not args.save_dir.is_dir():
        refuse(f"--save-dir {args.save_dir}: there is no such directory; train_sgd.py makes it")
    check_config(args, args.save_dir / "config.json")
    if args.params_start >= args.params_end:
        refuse(f"--params_end {args.params_end}: allowed: above --params_start {args.params_start}")
    with refusing(), refusing("--params_end", FileNotFoundError):
        return load_samples(args.save_dir, args.params_start, args.params_end, args.params_stride)


def extract(args: argparse.Namespace, samples: Sequence[Sample], model: nn.Module) -> Basis:
    """PCA of the samples, or what an earlier run on this trajectory saved of the same PCA.

    `model` is put where training in the subspace starts: at the first sample, unless --pretrained
    named another start.
    """
    with refusing():
        for sample in samples:
            check_fits(sample, model, sample.file, args.arch)
    if args.start == "mean":
        load_into(model, mean_of(samples))
    elif args.start is not None or not args.pretrained:
        start = args.params_start if args.start is None else args.start
        with refusing("--start" if args.start is not None else ""):
            load_file(args, model, args.save_dir / f"{start}.pt")
    names = [name for name, _ in model.named_parameters()]
    n = sum(parameter.numel() for parameter in model.parameters())
    of = [sample.file for sample in samples] if args.basis in BASES else [Path(args.basis)]
    with refusing("--basis", OSError):
        options = [args.basis, args.n_components, args.basis_dtype, args.randomseed, names]
        options += ["in parts"] if args.shard_basis else []
        source = fingerprint(of, *options)
    where, basis = "", None
    for file in args.save_dir.glob("*/basis.npz"):
        if computed_from(file) == source and (basis := load_basis(file, n, args.device)):
            where = f", from {file}"
            break
    found = all_reduce(torch.tensor(int(basis is not None)), dist.ReduceOp.MIN)
    if not found:  # by all processes, since all have to take part in the PCA
        where = ""
        at_fault = {"pca": "--n_components", "random": "--n_components", "schmidt": "--params_end"}
        with refusing(at_fault.get(args.basis, "--basis")):
            basis = Basis(*make_basis(args, samples, names, n), source)
    explained = basis.explained_variance_ratio.sum()
    say(
        f"subspace: {args.basis}, {len(basis.basis)} directions"
        + (f", {explained:.2%} of the variance" if explained.isfinite() else "")
        + f" of {len(samples)} samples ({shorten(sample_range(vars(args)))})"
        + where
    )
    return basis


def make_basis(
    args: argparse.Namespace, samples: Sequence[Sample], names: Sequence[str], n: int
) -> tuple[Tensor, Tensor]:
    """The basis (k, n) of --basis, and the variance it explains: NaN where that is not known.

    Raises ValueError where there is no such basis.
    """
    dtype, k = getattr(torch, args.basis_dtype), args.n_components
    if args.basis == "random":
        if isinstance(k, float):
            raise ValueError(f"{k}: allowed with --basis random: a whole number")
        if k > n:
            raise ValueError(f"{k}: allowed: at most the {n} parameters")
        check_memory(k, n, torch.float32, "cpu")  # where it is drawn
        check_memory(k, n, dtype, args.device)
        basis = random_basis(k, n, args.randomseed, dtype, args.device)
    elif args.basis in BASES:
        # The samples' Gram–Schmidt basis spans what all T − 1 components span. Training is the
        # same in either: SGD, and BFGS that starts at the identity, turn with the basis.
        k = max(1, len(samples) - 1) if args.basis == "schmidt" else k
        shard = args.shard_basis
        return pca(samples, k, names=names, device=args.device, dtype=dtype, shard=shard)
    else:
        basis = read_basis(Path(args.basis))
        fits = basis.dim() == 2 and len(basis) > 0 and basis.shape[1] == n
        if not fits or not basis.is_floating_point() or not basis.isfinite().all():
            raise ValueError(f"{args.basis}: {tuple(basis.shape)}, not finite numbers (k, {n})")
        basis = basis.to(args.device, dtype)
    return basis, torch.full((len(basis),), math.nan)


def read_basis(file: Path) -> Tensor:
    """The basis in a .npy, or in a .npz under the name `basis`; ValueError where there is none."""
    try:
        arrays = np.load(file)
        return bits(arrays if isinstance(arrays, np.ndarray) else arrays["basis"])
    except Exception as error:  # a broken file makes numpy raise any of half a dozen kinds
        raise ValueError(f"{file}: no .npy or .npz that holds a basis") from error


def restore(
    args: argparse.Namespace, file: Path, state: dict[str, Any], basis: Basis | None
) -> tuple[list[dict], dict[str, Any]]:
    """Load the checkpoint in `file` into `state`; the rows and the progress so far."""
    with refusing("--resume"):
        checkpoint = read(file)
        try:
            rows, progress = check_checkpoint(args, checkpoint, state["model"], basis, file)
            states = [(part, checkpoint["states"][name]) for name, part in state.items()]
            load_into(*states[0])
            for optimizer, saved in states[1:]:
                load_optimizer(optimizer, saved, file)
        except (KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
            raise ValueError(f"{file}: not a checkpoint.pt of these scripts") from error
    begun = f", and {progress['batches']} batches of the next" if progress.get("batches") else ""
    say(f"{file}: {checkpoint['epoch']} epochs are done{begun}")
    return rows, progress


def check_checkpoint(
    args: argparse.Namespace, checkpoint: dict, model: nn.Module, basis: Basis | None, file: Path
) -> tuple[list[dict], dict[str, Any]]:
    """The rows and the progress in a checkpoint of the same experiment; ValueError for another.

    What is of another type raises whatever it does.
    """
    rows, progress = checkpoint["rows"], checkpoint["progress"]
    by_steps = progress.get("batches") or getattr(args, "sample_every", None)
    kept = RESUMED + (MIDWAY if by_steps else ())
    check_same(args, checkpoint["arguments"], kept, file)
    check_fits(checkpoint["states"]["model"], model, file, args.arch)
    check_values(checkpoint["states"]["model"], file)
    if basis and checkpoint["basis"] != basis.computed_from:
        raise ValueError(f"{file} is of other samples than there are now; --overwrite it")
    epochs = [row["epoch"] for row in rows]
    if epochs != list(range(epochs[0], epochs[-1] + 1) if epochs else []) or not (rows or progress):
        raise ValueError(f"{file}: its rows are not of one epoch after another")
    sums = [progress.get("seconds", 0.0), *progress.get("totals", {}).values()]
    begun = progress.get("batches", 0)
    if not isinstance(begun, int) or begun < 0 or not all(map(math.isfinite, sums)):
        raise ValueError(f"{file}: its progress is not of an epoch")
    if not all(0 <= row["test_acc"] <= 100 and row["epoch"] > 0 for row in rows):
        raise ValueError(f"{file}: a row has no epoch or accuracy")
    return rows, progress


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Any, file: Path) -> None:
    """Load the state `saved` in `file`; momentum and the like stay those of the options.

    Raises ValueError for a state that does not fit: fused kernels would not look.
    """
    own = [{**group, "params": None} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved)
    except Exception as error:  # one edited by hand has many ways to be wrong
        raise ValueError(f"{file}: its optimizer is not this script's") from error
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options | {"params": group["params"]})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            # Like the parameter, a step count, or P-BFGS's matrix.
            allowed = (parameter.shape, (), 2 * parameter.shape)
            if value is not None and (value.shape not in allowed or not value.isfinite().all()):
                raise ValueError(f"{file}: the optimizer's {name} does not fit, or is not finite")


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory of a run: what a killed process left half written is removed.

    Raises ValueError that says which process holds it. The kernel ends the lock with the process.
    """
    file = directory / "lock"
    with file.open("a+") as stream:
        os.register_at_fork(after_in_child=stream.close)  # processes that decode images outlive it
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            raise ValueError(f"{directory} is in use by process {stream.read()}") from error
        stream.truncate(0)
        stream.write(f"{os.getpid()} on {platform.node()}")
        stream.flush()
        for half in directory.glob("*.tmp"):
            if re.fullmatch(r".+\.\d+\.tmp", half.name):  # as `replacing` names them
                half.unlink()
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def clear(args: argparse.Namespace, directory: Path, start_anew: bool) -> None:
    """Remove the files of an earlier run, where the options allow that.

    They do with --overwrite, and with --resume where a run of the same experiment was stopped
    before its first checkpoint.pt: then it starts again (`start_anew`).
    """
    names = ("metrics.jsonl", "checkpoint.pt", "model.th")
    earlier = [directory / name for name in names]
    earlier += [file for file in directory.glob("*.pt") if file.stem.isdecimal()]
    earlier = [file for file in earlier if file.exists()]
    if not earlier:
        return
    if not args.overwrite:
        if not start_anew or not (directory / "config.json").exists():
            refuse(f"--save-dir: {directory} holds a run; go on with --resume, or --overwrite it")
        check_config(args, directory / "config.json")
    for file in earlier:
        file.unlink()


def check_space(args: argparse.Namespace, model: nn.Module, numbers: range) -> None:
    """Say what disk space the samples still to come will take; refuse where it is not there."""
    there = sum((args.save_dir / f"{i}.pt").exists() for i in numbers)
    count = len(numbers) - (0 if args.overwrite else there)
    size = sum(value.nbytes for value in model.state_dict().values())
    # checkpoint.pt takes three sizes, twice while the next one is written, and model.th one.
    needed = (len(numbers) - there + 7) * size if count else 0
    disk = next(
        path for path in [args.save_dir, *args.save_dir.absolute().parents] if path.exists()
    )
    free = shutil.disk_usage(disk).free
    said = f"{count} samples of {size / 2**20:.1f} MiB, {needed / 2**30:.2f} GiB with checkpoints"
    if needed > free:
        refuse(f"--save-dir {args.save_dir}: {said}, but {free / 2**30:.2f} GiB of disk are free")
    say(f"{said}; {free / 2**30:.1f} GiB of disk are free")


def git_commit() -> str | None:
    """The commit these scripts are at, where git can tell."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def start_run(
    args: argparse.Namespace,
    directory: Path,
    data: Data,
    model: nn.Module,
    state: dict[str, Any],
    basis: Basis | None = None,
) -> Run:
    """Make the run's directory with its config.json, and say what is going to happen.

    `state` is what a checkpoint has to hold: "model", the module that is trained and tested, and
    whatever else has a state_dict; it is loaded where --resume asks for that. `basis` is what
    basis.npz is to hold. Whatever can be refused is, before the first file is written.
    """
    own, rows, progress = directory / "checkpoint.pt", [], {}
    # After a restart the run's own is further than the one it began with.
    file = own if args.resume is True or (restarts() and own.exists()) else args.resume
    if file and (file.exists() or args.resume is not True):
        rows, progress = restore(args, file, state, basis)
    if world() > 1:
        dist.barrier()  # nobody reads any more what is cleared now
    with refusing("--save-dir"), contextlib.ExitStack() as stack:
        if rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(directory))
            if not (rows or progress) or file.resolve().parent != directory.resolve():
                clear(args, directory, start_anew=args.resume is True or restarts() > 0)
        lock = stack.pop_all()
    atexit.register(lock.close)
    config = {
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "arch": args.arch,
        "n": sum(parameter.numel() for parameter in model.parameters()),
        "datasets": args.datasets,
        "train_images": len(data.train),
        "test_images": len(data.test),
        "num_classes": data.num_classes,
        "corrupted_labels": data.corrupted,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": world(),
        "versions": {m.__name__: m.__version__ for m in (torch, torchvision, np)}
        | {"python": platform.python_version()},
        "commit": git_commit(),
    }
    if getattr(args, "sample_every", None):
        steps = len(batch_sizes(len(data.train), data.train.batch_size))
        numbers = range(args.epochs * steps // args.sample_every + 1)
        config["sample_epochs"] = [round(i * args.sample_every / steps, 6) for i in numbers]
    if basis:
        config["k"] = len(basis.basis)
    if numbers := sample_range(vars(args)):
        config["samples"] = list(numbers)
        # With it a report can tell that the samples are still those that were used.
        config["fingerprint"] = fingerprint([args.save_dir / f"{number}.pt" for number in numbers])
    save(directory / "config.json", json.dumps(config, indent=2) + "\n")
    if basis and computed_from(directory / "basis.npz") != basis.computed_from:
        # A part of the columns is no basis: without any, the file has the variances.
        saved = basis._replace(basis=basis.basis[:, :0]) if args.shard_basis else basis
        save_basis(directory / "basis.npz", saved)
    if args.compile:
        state["model"].compile()
    several = f", {world()} processes" if world() > 1 else ""
    variant = f" ({model.variant})" if hasattr(model, "variant") else ""
    say(
        f"{directory}: {args.arch}{variant}, {config['n']:,} parameters; {args.datasets}, "
        f"{len(data.train):,} training images ({data.corrupted:,} labels drawn anew), "
        f"{len(data.test):,} test images; {args.device}, {config['threads']} threads{several}"
    )
    return Run(args, directory, data, state, rows, progress, basis, lock)


# ---------------------------------------------------------------------------- the epoch loop


def cross_entropy(
    model: nn.Module, images: Tensor, labels: Tensor, half: bool
) -> tuple[Tensor, Tensor]:
    """The batch's mean loss and the network's output; `half` runs the network in bfloat16."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        output = model(images)
    # In bfloat16 the loss itself would be rounded to three digits.
    return F.cross_entropy(output.float() if half else output, labels), output


def penalty(args: argparse.Namespace, subspace: nn.Module) -> Tensor | float:
    """The L2 penalty of --weight-decay on θ(z) itself, as SGD in the full space has it."""
    return args.weight_decay / 2 * subspace.vector().square().sum() if args.weight_decay else 0.0


class StopAsked(Exception):  # noqa: N818
    """SIGINT or SIGTERM came, its argument says which; raised between two batches."""


def check_asked(asked: Sequence[int]) -> None:
    """Raise StopAsked in all processes where one has a signal in `asked`."""
    if number := int(all_reduce(torch.tensor([*asked, 0][0]), dist.ReduceOp.MAX)):
        raise StopAsked(number)


def until_asked(batches: Iterable, asked: Sequence[int], every: int = 1) -> Iterator:
    """The batches, as long as no signal was put into `asked`.

    Several processes have to stop at the same batch: they ask each other, every so many.
    """
    for number, batch in enumerate(batches):
        if world() == 1 or number % every == 0:
            check_asked(asked)
        yield batch


@torch.no_grad()
def evaluate(
    model: nn.Module, images: "Images | ImageFiles", half: bool, asked: Sequence[int] = ()
) -> dict[str, float]:
    """Mean loss, and accuracy in percent, with BatchNorm's running statistics.

    From 100 classes on also how often the label is among the five likeliest, test_top5.
    """
    synchronise(model)
    model.eval()
    totals: Counter = Counter()
    for batch, labels in until_asked(images.epoch(), asked):
        loss, output = cross_entropy(model, batch, labels, half)
        totals["loss"] += loss * len(labels)
        totals["correct"] += (output.argmax(1) == labels).sum()
        if output.shape[1] >= 100:
            totals["top5"] += (output.topk(5).indices == labels[:, None]).sum()
    loss, *hits = (float(total) / len(images) for total in sum_over_processes(totals).values())
    names = ("test_acc", "test_top5")
    return {"test_loss": loss} | {name: 100 * hit for name, hit in zip(names, hits, strict=False)}


def evaluate_only(
    args: argparse.Namespace, build: Callable[[str, int, int], nn.Module], directory: Path
) -> dict:
    """What --evaluate does: test the weights of --pretrained or --resume, or the run's own."""
    file = args.resume if isinstance(args.resume, Path) else directory / "model.th"
    data = load_data(args)
    model = make_model(args, build, data)
    if not args.pretrained:
        with refusing("--evaluate"):
            load_file(args, model, file)
    row = evaluate(model, data.test, args.half)
    top5 = f", top-5 {row['test_top5']:.2f} %" if "test_top5" in row else ""
    say(f"test loss {row['test_loss']:.4f}, test accuracy {row['test_acc']:.2f} %{top5}")
    return row


def train_epoch(
    run: Run, step: Callable, after_step: Callable, epoch: int, asked: list[int]
) -> dict[str, float]:
    """An epoch of `step`: means of loss, accuracy in percent, and details; and the seconds.

    What is done of it is in run.progress, and left out.
    """
    args, images, progress = run.args, run.data.train, run.progress
    began = time.perf_counter() - progress.get("seconds", 0.0)
    run.state["model"].train()
    sizes = batch_sizes(len(images), images.batch_size)
    steps = len(sizes)
    # Dropout and the like: a resumed run draws what an unbroken one would.
    seeds = random_stream(args.randomseed, "network", epoch).integers(2**63, size=steps)
    done = progress.get("batches", 0)
    totals: Counter = Counter()  # sums on the device
    for key, total in progress.get("totals", {}).items():  # of all processes
        totals[key] = torch.as_tensor(total if rank() == 0 else 0.0, device=args.device)
    totals["finite"] = done
    batches = until_asked(images.epoch(epoch, done), asked, every=10)
    every = getattr(args, "sample_every", None) or steps
    name, seen = f"epoch {epoch + 1}", sum(sizes[:done])
    with progress_bar(batches, name, steps, initial=done, unit="batch") as bar:
        try:
            for batch, labels in bar:
                torch.manual_seed(int(seeds[done]) + 2 * rank())
                # The mean over the processes of what is weighted so is that over all images.
                weight = len(labels) * world() / sizes[done]
                loss, output, details = step(batch, labels, weight)
                totals.update(details)
                totals["loss"] += loss.detach() * len(labels)
                totals["correct"] += (output.argmax(1) == labels).sum()
                totals["finite"] += loss.detach().isfinite()
                done, seen = done + 1, seen + len(labels)
                sampled = (epoch * steps + done) % every == 0
                if sampled or done == steps or done % args.print_freq == 0:
                    check_finite(run, totals, epoch, done)
                    if not bar.disable:
                        accuracy = f"{100 * totals['correct'] / seen:.2f} %"
                        bar.set_postfix(loss=f"{totals['loss'] / seen:.4f}", accuracy=accuracy)
                after_step(epoch * steps + done)
        finally:
            seconds = time.perf_counter() - began
            progress.update(batches=done, totals=dict(totals), seconds=seconds)
    sums = {name: float(total) for name, total in sum_over_processes(totals).items()}
    del sums["finite"]
    row = {"train_loss": sums.pop("loss") / len(images)}
    row["train_acc"] = 100 * sums.pop("correct") / len(images)
    row |= {name: total / steps / world() for name, total in sums.items()}
    return row | {"seconds": seconds}


def check_finite(run: Run, totals: Mapping[str, Tensor], epoch: int, steps: int) -> None:
    """End the program where training left the finite numbers: nothing is saved of it.

    This is a host sync.
    """
    finite = int(totals["finite"]) if steps else 0
    parameters = run.state["model"].parameters()
    if finite == steps and torch.stack([p.isfinite().all() for p in parameters]).all():
        return
    cure = f"a smaller --lr than {run.args.lr:g}" if "lr" in run.args else "a larger --batch-size"
    cure = "a smaller --alpha" if getattr(run.args, "alpha", 0) else cure
    cure += " or no --half" if run.args.half else ""
    lr = next((f" at lr {g['lr']:g}" for g in run.state["optimizer"].param_groups if "lr" in g), "")
    file = run.directory / "checkpoint.pt"
    last = f"--resume goes on from {file}" if file.exists() else "there is no checkpoint yet"
    what = "loss is" if finite < steps else "parameters are"
    where = f"epoch {epoch + 1}, step {min(finite + 1, steps)}{lr}"
    refuse(f"{where}: the {what} not finite; try {cure}; {last}", 1)


def fit(
    run: Run,
    step: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, dict[str, Any]]],
    export: Callable[[], dict[str, Tensor]],
    after_step: Callable[[int], None] = lambda iteration: None,
) -> dict:
    """Train with `step` to the last epoch, write the run's files; returns the last metrics row.

    `step` takes a batch, and the weight of its loss in the mean over all processes; it returns the
    batch's loss, the network's output, and other numbers to average over the epoch's steps.
    `export` gives the plain network's state dict. `after_step(i)` is called after the i-th step,
    counted from epoch 0 on, before a file says that it is done.

    SIGINT and SIGTERM let the batch end, save all that --resume needs, and end the program with
    exit code 130 or 143; a second one ends it at once.
    """
    args, rows = run.args, run.rows
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked and world() == 1:  # torchrun sends a second one by itself
            raise SystemExit(128 + number)
        asked.append(number)

    first = rows[-1]["epoch"] if rows else args.start_epoch
    epochs = range(first, args.epochs)
    bar = progress_bar(epochs, str(run.directory), args.epochs, initial=first, unit="epoch")
    with run.lock, handling(ask), bar:
        try:
            for epoch in bar:
                train_and_test(run, step, export, after_step, epoch, asked)
            check_asked(asked)
        except StopAsked as stop:
            (number,) = stop.args
            if progress := run.progress:
                check_finite(run, progress["totals"], epoch, progress["batches"])
                progress["totals"] = sum_over_processes(progress["totals"])
            synchronise(run.state["model"])
            save_checkpoint(run, summary(run, export()))
            if rank():
                raise SystemExit(128 + number) from None
            name = signal.Signals(number).name
            refuse(f"stopped by {name}; the same command with --resume goes on", 128 + number)
    best = max(rows, key=lambda row: row["test_acc"])
    say(
        f"{run.directory}: test accuracy {rows[-1]['test_acc']:.2f} % after epoch "
        f"{rows[-1]['epoch']}, best {best['test_acc']:.2f} % after epoch {best['epoch']}"
    )
    return rows[-1]


def train_and_test(
    run: Run, step: Callable, export: Callable, after_step: Callable, epoch: int, asked: list[int]
) -> None:
    """One epoch of `fit`, with its line in metrics.jsonl and its files."""
    args, rows = run.args, run.rows
    row = {"epoch": epoch + 1, "lr": None}
    if "lr" in args:
        row["lr"] = args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.milestones)
        for group in run.state["optimizer"].param_groups:
            group["lr"] = row["lr"]
    row |= train_epoch(run, step, after_step, epoch, asked)
    model = run.state["model"]
    if run.basis:
        row["coordinates"] = model.coordinates.tolist()  # the path in the plane
    if getattr(args, "bn_update", False):
        # In it dropout draws, too.
        seed = random_stream(args.randomseed, "statistics", epoch).integers(2**63)
        torch.manual_seed(int(seed) + rank())
        # Compiled, it would be compiled anew for every count of batches.
        with torch.compiler.set_stance("force_eager"):
            update_bn(until_asked(run.data.train.epoch(epoch), asked), model)
    row |= evaluate(model, run.data.test, args.half, asked)
    rows.append(row)
    run.progress.clear()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    save(run.directory / "metrics.jsonl", lines)
    if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
        # model.th first: with the checkpoint the epoch counts as done, and all of it is there.
        content = summary(run, export())
        save(run.directory / "model.th", content)
        save_checkpoint(run, content)
    with tqdm.external_write_mode():  # above the bar
        say(
            f"epoch {epoch + 1:3d}/{args.epochs}  "
            f"train loss {row['train_loss']:.4f}, accuracy {row['train_acc']:6.2f} %  "
            f"test loss {row['test_loss']:.4f}, accuracy {row['test_acc']:6.2f} %"
            + (f", top-5 {row['test_top5']:6.2f} %" if "test_top5" in row else "")
            + f"  {row['seconds']:.1f} s"
        )


def summary(run: Run, weights: dict[str, Tensor]) -> dict[str, Any]:
    """What model.th holds, and checkpoint.pt too."""
    return {
        "state_dict": weights,
        "best_prec1": max((row["test_acc"] for row in run.rows), default=0.0),
        "epoch": run.rows[-1]["epoch"] if run.rows else run.args.start_epoch,
        "arch": run.args.arch,
    }


def save_checkpoint(run: Run, content: dict[str, Any]) -> None:
    """Write checkpoint.pt: the summary `content`, and all that --resume needs."""
    names = [name for name in RESUMED + MIDWAY if name in run.args]
    needed = {
        "states": {name: part.state_dict() for name, part in run.state.items()},
        "rows": run.rows,
        "progress": run.progress,
        "arguments": {name: getattr(run.args, name) for name in names},
        "basis": run.basis and run.basis.computed_from,
    }
    save(run.directory / "checkpoint.pt", content | needed)
