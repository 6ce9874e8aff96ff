"""The options that the scripts share, and how a script starts and ends."""

import argparse
import contextlib
import difflib
import functools
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

import distributed
import models
from checkpoint import recorded_options
from distributed import on_rank0, restart_count, torchrun_rank, under_torchrun, world_size
from engine import handling
from errors import InputError, blame
from utils import DATASETS


def exit_with(message: str, code: int) -> NoReturn:
    """End the program: one line on stderr that says what is wrong, and the exit code."""
    if number := torchrun_rank():
        time.sleep(15)  # what rank 0 says too it has said by then, and torchrun ends this one
        message = f"process {number}: {message}"
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def entry_point(main: Callable[[Sequence[str] | None], Any]) -> Callable:
    """Decorate a script's main: what a user can mend is one line on stderr and an exit code.

    The code is 2 for options and files, 1 for what went wrong later, 130 and 143 for SIGINT and
    SIGTERM.
    """

    def stop(number: int, frame: Any) -> None:
        if under_torchrun():
            raise SystemExit(128 + number)
        exit_with(f"stopped by {signal.Signals(number).name}", 128 + number)

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> Any:
        with handling(stop):
            try:
                return main(argv)
            except InputError as error:
                exit_with(str(error), error.exit_code)
            except torch.OutOfMemoryError as error:
                sizes = "--batch-size or --test-batch-size"
                exit_with(f"{sizes}: too large for the memory of the GPU ({error})", 1)
            except RuntimeError as error:  # gloo has no class of its own
                if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                    raise
                exit_with(f"between processes, one of which may be gone: {error}", 1)

    return wrapped


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False
        return action.help if none else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults, and raises InputError."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False, formatter_class=HelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong without the usage, which is a screenful here."""
        raise InputError(f"{message} (--help lists the options)")


# ------------------------------------------------------------------------------ types of values


def between(
    kind: type, low: float, high: float = 1e38, above: bool = False
) -> Callable[[str], Any]:
    """An argparse type: an int or float from `low`, or with `above` above it, to `high`."""
    what = "a whole number" if kind is int else "a number"
    ends = {2**31 - 1: "2³¹ − 1", 1e38: "1e38"}
    start = f"above {low}, at most" if above else f"from {low} to"
    allowed = f"{what} {start} {ends.get(high, high)}"

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and not (above and value == low):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")

    return parse


positive = between(int, 1, 2**31 - 1)
natural = between(int, 0, 2**31 - 1)
nonnegative = between(float, 0)
fraction = between(float, 0, 1)


def components(text: str) -> int | float:
    """An argparse type: how many components, or the fraction of variance they are to explain."""
    with contextlib.suppress(ValueError):
        value = int(text) if text.isdecimal() else float(text)
        if value >= 1 if text.isdecimal() else 0 < value < 1:
            return value
    allowed = "a whole number from 1, or a fraction of the variance between 0 and 1"
    raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")


def sample_or_mean(text: str) -> int | str:
    """An argparse type: the number of a sample, or "mean"."""
    return text if text == "mean" else natural(text)


def run_name(text: str) -> str:
    """An argparse type: a directory name that cannot lead out of --save-dir."""
    if re.fullmatch(r"[A-Za-z][\w.-]*", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not a name, as psgd_random")


def path(text: str) -> Path:
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


def network(text: str) -> str:
    """An argparse type: a network's name, package.module:callable, or `list`, which prints them."""
    if text == "list":
        print(models.listing())
        raise SystemExit(0)
    own = re.fullmatch(r"[\w.]+:\w+", text)
    return text if own else one_of("network", models.ARCHITECTURES)(text)


# ------------------------------------------------------------------------------------- options


# One option a row reads as the table it is.
# fmt: off
def get_parser(description: str, arch: str, epochs: int, weight_decay: float) -> Parser:
    """The options that the three scripts have in common, with a script's own defaults."""
    parser = Parser(description)
    add = parser.add_argument
    add("-a", "--arch", type=network, metavar="NAME", default=arch,
        help="a network (`--arch list` prints them all), or package.module:callable, which is "
        "called with num_classes")
    add("--datasets", type=one_of("dataset", list(DATASETS)), metavar="NAME", default="CIFAR10",
        help=", ".join(DATASETS))
    add("--data-dir", type=path, metavar="DIR", default="../data",
        help="where the dataset is, or is downloaded to")
    add("--image-size", type=positive, metavar="PIXELS",
        help="side of the images of ImageFolder and ImageNet (default: 32 and 224)")
    add("-j", "--workers", type=natural, metavar="N", default=4,
        help="threads or processes that decode image files")
    add("--epochs", type=positive, metavar="N", default=epochs, help="number of the last epoch")
    add("--start-epoch", type=natural, metavar="N", default=0,
        help="epochs taken as done at the start; --resume knows by itself")
    add("-b", "--batch-size", type=positive, metavar="N", default=128, help="images a batch")
    add("--test-batch-size", type=positive, metavar="N",
        help="images a batch of a test (default: 500 up to 64 pixels, fewer for larger images)")
    add("--weight-decay", "--wd", type=nonnegative, metavar="W", default=weight_decay,
        help="L2 penalty: W / 2 times the squared norm of all parameters")
    add("-p", "--print-freq", type=positive, metavar="N", default=50,
        help="every N batches, look whether the loss is finite, and show it on a terminal")
    add("--resume", type=path, nargs="?", const=True, metavar="PATH",
        help="continue from this checkpoint (without PATH: the run's own, if there is one)")
    add("--overwrite", action="store_true", help="replace an earlier run in the same directory")
    add("-e", "--evaluate", action="store_true",
        help="only test, the weights of --pretrained or --resume, else the run's own model.th")
    add("--pretrained", type=path, nargs="?", const=True, metavar="PATH",
        help="start from these weights (without PATH: torchvision's, where it has them)")
    add("--half", action="store_true", help="run the network in bfloat16 (autocast)")
    add("--device", metavar="DEVICE", default="auto",
        help="cpu, cuda, mps, xpu …; auto is the accelerator that torch sees, else cpu")
    add("--channels-last", action=argparse.BooleanOptionalAction,
        help="give the network its images in channels_last memory format (default: on the CPU)")
    add("--compile", action="store_true", help="compile the network (torch.compile)")
    add("--threads", type=between(int, 1, 1024), metavar="N",
        help="CPU threads (default: as torch decides)")
    add("--sync-bn", action="store_true",
        help="under torchrun on CUDA, BatchNorm normalizes with the batches of all processes")
    add("--tf32", action="store_true", help="on CUDA, multiply in TensorFloat-32 (10 bits)")
    add("--deterministic", action="store_true",
        help="give the same bits at every run, on CUDA too; an operation that cannot is an error")
    add("--save-dir", type=path, metavar="DIR", default="save_temp",
        help="directory of the trajectory, and of the runs in its subspaces")
    add("--save-every", type=positive, metavar="N", default=10,
        help="write checkpoint.pt and model.th every N epochs, and at the end")
    add("--randomseed", type=natural, metavar="N", default=1,
        help="seed of initialization, label corruption, data order and augmentation")
    add("--corrupt", type=fraction, metavar="C", default=0.0,
        help="fraction of the training labels replaced by ones drawn uniformly over all classes")
    add("--smalldatasets", type=between(float, 0, 1, above=True), metavar="P",
        help="train on a random fraction P of the training images")
    return parser


def add_schedule_options(
    parser: Parser, lr: float | None, lr_help: str, milestones: list[int] | None, usual: str = ""
) -> None:
    """Add what SGD needs, whatever it moves: learning rate, momentum, schedule."""
    add = parser.add_argument
    add("--lr", "--learning-rate", type=nonnegative, metavar="LR", default=lr, help=lr_help)
    add("--momentum", type=fraction, metavar="M", default=0.9, help="momentum")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--milestones", type=natural, nargs="*", metavar="N", default=milestones,
        help=f"after N epochs the learning rate drops to a tenth{usual}")
    add("--schedule", dest="milestones", choices=["cosine"],
        help="instead, the learning rate falls along half a cosine, to 0 after --epochs")


def add_subspace_options(parser: Parser) -> None:
    """Add what says which samples span the subspace, and how many directions of them to keep."""
    add = parser.add_argument
    add("--n_components", "--n-components", type=components, metavar="K",
        help="directions to keep, or the fraction of the samples' variance to explain, as 0.99 "
        "(default: 40, or one less than samples)")
    add("--params_start", "--params-start", type=natural, metavar="N", default=0,
        help="first sample, where training in the subspace starts from")
    add("--params_end", "--params-end", type=natural, metavar="N",
        help="one past the last sample (default: 51, or all where there are fewer)")
    add("--params_stride", "--params-stride", type=positive, metavar="N", default=1,
        help="take every N-th sample")
    add("--basis", metavar="BASIS", default="pca",
        help="pca; schmidt: all that the samples span, whatever K; random: K random directions; "
        "or a file, .npz or .npy")
    add("--start", type=sample_or_mean, metavar="N",
        help="train from this sample, or from their mean (default: --params_start)")
    add("--bn-update", action="store_true",
        help="before each test, recompute BatchNorm's statistics over the training images")
    add("--run", type=run_name, metavar="NAME",
        help="directory in --save-dir (default: the method's, with --basis and --start if given)")
    add("--shard-basis", action="store_true",
        help="under torchrun, each process keeps its part of the basis' columns")
    add("--basis-dtype", choices=["float32", "bfloat16"], default="float32",
        help="how the basis is kept; bfloat16 takes half the memory")
# fmt: on


# ----------------------------------------------------------------------------------- parsing


def parse_args(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options given, with what they leave open (device, image size) decided."""
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    distributed.init(args.device)
    if "basis" in args or getattr(args, "average", None):
        take_from_trajectory(parser, args, argv)
    if restart_count() and not args.evaluate:  # the command is that of the first start
        args.resume, args.overwrite = args.resume or True, False
    check_combinations(args)
    args.image_size = args.image_size or DATASETS[args.datasets].image_size
    if args.channels_last is None:  # on the CPU it was never slower (benchmarks/README.md)
        args.channels_last = args.device == "cpu"
    configure_torch(args)
    return args


def take_from_trajectory(
    parser: Parser, args: argparse.Namespace, argv: Sequence[str] | None
) -> None:
    """Let what the command leaves open about network and data be as it was for the samples."""
    file = args.save_dir / "config.json"
    with blame("--save-dir"):
        recorded = on_rank0(lambda: recorded_options(file))
    try:
        parsed = parser.parse_args(recorded)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    vars(args).update(vars(parser.parse_args(argv, parsed)), device=args.device)


def pick_device(name: str) -> str:
    """The type of device that --device names; InputError for one that torch does not see."""
    seen = "cpu"
    if torch.accelerator.is_available():
        seen = torch.accelerator.current_accelerator().type
    if name not in ("auto", "cpu", seen):
        allowed = ", ".join(dict.fromkeys(("auto", "cpu", seen)))
        raise InputError(f"--device {name}: torch sees no such device here; allowed: {allowed}")
    return seen if name == "auto" else name


def check_combinations(args: argparse.Namespace) -> None:
    """InputError for options that do not go together, or not on this machine."""
    for option, place in (("--save-dir", args.save_dir), ("--data-dir", args.data_dir)):
        with blame(option):
            place.exists()  # OSError where one may not look
    started = getattr(args, "start", None) is not None
    for one, other, both in (
        ("--overwrite", "--resume", args.overwrite and args.resume),
        ("--start", "--pretrained", started and args.pretrained),
    ):
        if both:
            raise InputError(f"{one}: not with {other}; allowed: one of them")
    if args.evaluate and args.resume and args.pretrained:
        raise InputError("--resume: not with --evaluate and --pretrained; allowed: one of them")
    if args.epochs <= args.start_epoch:
        raise InputError(f"--epochs {args.epochs}: allowed: above --start-epoch {args.start_epoch}")
    if 1 < world_size() > args.batch_size / 2:
        least = 2 * world_size()
        raise InputError(f"--batch-size {args.batch_size}: allowed: from {least}, two a process")
    if getattr(args, "shard_basis", False) and args.basis not in ("pca", "schmidt"):
        raise InputError(f"--shard-basis: not with --basis {args.basis}; allowed: pca, schmidt")
    if args.sync_bn and args.device != "cuda":
        raise InputError("--sync-bn: allowed on CUDA; elsewhere torch has none over processes")
    if args.compile and args.device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError(
            "--compile: needs a C++ compiler on the CPU; install g++, or name it in CXX"
        )


def configure_torch(args: argparse.Namespace) -> None:
    """Make torch's settings, which are the process's, those of the options."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    # Trying cuDNN's algorithms pays since shapes repeat; which one wins varies from run to run.
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.use_deterministic_algorithms(args.deterministic)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by cuBLAS
