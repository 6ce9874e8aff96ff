"""The options of the scripts; without torch, so that --help and mistakes are answered at once."""

import argparse
import contextlib
import difflib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from training.errors import InputError, accept_any_encoding, exit_with, handle, stop

GROUPS = ("data", "network", "training", "subspace", "run", "machine")  # of options, in --help
DATASETS = ("digits", "CIFAR10", "CIFAR100", "MNIST", "ImageFolder", "ImageNet")
NOISE = ("symmetric", "symmetric-other", "pair", "asymmetric")
BASES = ("pca", "schmidt", "random", "walk")
# The options of only some scripts, with what they are in the others: all know all of them.
ONLY_IN = {
    "train_sgd.py": {"sample_every": None, "average": None},
    "train_sgd.py and train_psgd.py": dict.fromkeys(("lr", "milestones", "schedule", "optimizer"))
    | {"momentum": 0.0},
    "train_psgd.py and train_pbfgs.py": {"params_start": 0, "params_end": None, "params_stride": 1}
    | {"samples": None}
    | {"n_components": None, "basis": None, "start": None, "bn_update": False}
    | {"basis_dtype": "float32"},
    "train_pbfgs.py": {"accumulate": 1, "alpha": 0.0, "gamma": 0.0},
}
ABSENT = {name: value for options in ONLY_IN.values() for name, value in options.items()}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False
        return action.help if none else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser with `groups` that shows defaults, and raises InputError."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False, formatter_class=HelpFormatter)
        self.set_defaults(**ABSENT)
        self.rates: dict[str, float] = {}  # --lr's default for each --optimizer
        self.drops: dict[str, list[int]] = {}  # --milestones' default for each of --datasets
        self.groups = {title: self.add_argument_group(title) for title in GROUPS}

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        """As usual, but an unknown option is answered with the nearest."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self.hint(unknown[0])}")
        return parsed

    def hint(self, unknown: str) -> str:
        """What may be meant: an option of another script, or the nearest of this one."""
        word, flags = unknown.partition("=")[0].lower(), self._option_string_actions
        if not word.startswith("--"):
            return ""
        for scripts, options in ONLY_IN.items():
            if word[2:].replace("-", "_") in options:
                return f"; {scripts} {'have' if ' and ' in scripts else 'has'} {word}"
        begun = [flag for flag in flags if flag.startswith(word)]
        near = begun or difflib.get_close_matches(word, flags, n=1)
        return f"; did you mean {near[0]}?" if near else ""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong without the usage, which is a screenful here."""
        raise InputError(f"{message} (--help lists the options)")


def answer_early(parser: Parser) -> None:
    """Answer --help and mistakes, and from now on Ctrl-C, before torch is imported."""
    accept_any_encoding()
    # Else DDP warns from C++, in every process, of parameters that might have been unused.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    handle(stop)
    try:
        parser.parse_args()
    except InputError as error:
        exit_with(str(error), error.exit_code)


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
        if text.isdecimal() and int(text) >= 1:
            return int(text)
        if not text.isdecimal() and 0 < float(text) < 1:
            return float(text)
    allowed = "a whole number from 1, or a fraction of the variance between 0 and 1"
    raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")


def sample_or_mean(text: str) -> int | str:
    """An argparse type: the number of a sample, or "mean"."""
    if text.lower() == "mean":
        return "mean"
    with contextlib.suppress(argparse.ArgumentTypeError):
        return natural(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not the number of a sample, or mean")


def basis(text: str) -> str:
    """An argparse type: a kind of basis, or the file that holds one."""
    if Path(text).suffix in (".npy", ".npz"):
        return str(path(text).absolute())
    return one_of("basis", BASES, " or a file, .npz or .npy")(text)


def noise(text: str) -> str:
    """An argparse type: a kind of label noise, or the file that holds labels, FILE or FILE:KEY."""
    if re.fullmatch(r".+\.(npy|pt)(:.+)?", text):
        return str(path(text).absolute())
    return one_of("noise", NOISE, " or a file, .npy, .pt or .pt:KEY")(text)


def run_name(text: str) -> str:
    """An argparse type: a directory name that cannot lead out of --save-dir."""
    if re.fullmatch(r"[A-Za-z][\w.-]*", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not a name like psgd_random")


def path(text: str) -> Path:
    """An argparse type: a path that a file system can have."""
    if not text or any(len(os.fsencode(part)) > 255 for part in Path(text).parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a path; its names have 1 to 255 bytes")
    with contextlib.suppress(RuntimeError):  # no such user
        return Path(text).expanduser()  # a shell leaves the ~ in --save-dir=~/x as it is
    return Path(text)


def one_of(what: str, names: Sequence[str], others: str = "") -> Callable[[str], str]:
    """An argparse type: one of `names` in any case; a near miss is answered with the nearest."""
    by_case = {name.lower(): name for name in names}

    def parse(text: str) -> str:
        if text.lower() in by_case:
            return by_case[text.lower()]
        near = difflib.get_close_matches(text.lower(), by_case, cutoff=0.5)
        hint = f"did you mean {' or '.join(by_case[name] for name in near)}?"
        hint = hint if near else f"allowed: {', '.join(names)}{others}"
        raise argparse.ArgumentTypeError(f"there is no {what} {text!r}; {hint}")

    return parse


# ------------------------------------------------------------------------------------- options


def get_parser(
    method: str, description: str, arch: str, epochs: int, weight_decay: float
) -> Parser:
    """The options that the three scripts have in common, with a script's own defaults."""
    parser = Parser(description)
    parser.set_defaults(method=method)
    add_data_options(parser)
    add_preprocessing_options(parser)
    add_network_options(parser, arch)
    add_training_options(parser, epochs, weight_decay)
    add_run_options(parser)
    add_precision_options(parser)
    add_machine_options(parser)
    return parser


def add_data_options(parser: Parser) -> None:
    """Add the options for images and labels."""
    add = parser.groups["data"].add_argument
    add(
        "--datasets",
        type=one_of("dataset", DATASETS),
        metavar="NAME",
        default="CIFAR10",
        help=", ".join(DATASETS),
    )
    add(
        "--data-dir",
        type=path,
        metavar="DIR",
        default="../data",
        help="where the dataset is, or is downloaded to",
    )
    add(
        "--corrupt",
        type=fraction,
        metavar="C",
        default=0.0,
        help="fraction of the training labels replaced by others, as --noise says",
    )
    add(
        "--noise",
        type=noise,
        metavar="KIND|FILE",
        default="symmetric",
        help="what they become: symmetric: drawn uniformly over all classes; symmetric-other: over "
        "the other ones; pair: the next class; asymmetric: CIFAR-10's similar class; or, instead "
        "of --corrupt, a file with all training labels, .npy, .pt or .pt:KEY",
    )
    add(
        "--smalldatasets",
        type=between(float, 0, 1, above=True),
        metavar="P",
        help="train on a random fraction P of the training images",
    )


def add_preprocessing_options(parser: Parser) -> None:
    """Add the options for what is made of an image."""
    add = parser.groups["data"].add_argument
    add(
        "--image-size",
        type=positive,
        metavar="PIXELS",
        help="side of the images of ImageFolder and ImageNet (default: 32 and 224)",
    )
    add(
        "--mean",
        type=fraction,
        nargs=3,
        metavar="M",
        help="mean of each channel, of pixels from 0 to 1 (default: the dataset's)",
    )
    add(
        "--std",
        type=between(float, 0, 1, above=True),
        nargs=3,
        metavar="S",
        help="standard deviation of each channel (default: the dataset's)",
    )
    add(
        "--no-augment",
        action="store_const",
        const=True,
        help="train on the images as they are, neither cropped at random nor mirrored",
    )
    add(
        "--no-flip",
        action="store_const",
        const=True,
        help="do not mirror the training images (of text, say)",
    )


def add_network_options(parser: Parser, arch: str) -> None:
    """Add the options for the network and its initial weights."""
    add = parser.groups["network"].add_argument
    add(
        "-a",
        "--arch",
        metavar="NAME",
        default=arch,
        help="a network (`--arch list` prints them all), or package.module:callable, which is "
        "called with num_classes",
    )
    add(
        "--pretrained",
        type=lambda text: path(text).absolute(),
        nargs="?",
        const=True,
        metavar="PATH",
        help="start from these weights (without PATH: torchvision's, where it has them)",
    )
    add(
        "--key",
        metavar="KEY",
        help="where in a file of several weights those of --pretrained or --samples are, e.g. ema",
    )


def add_training_options(parser: Parser, epochs: int, weight_decay: float) -> None:
    """Add the options for how long to train, on what batches, from which seed."""
    add = parser.groups["training"].add_argument
    add("--epochs", type=positive, metavar="N", default=epochs, help="train until this epoch")
    add(
        "--start-epoch",
        type=natural,
        metavar="N",
        default=0,
        help="epochs counted as done at the start; --resume knows them",
    )
    add("-b", "--batch-size", type=positive, metavar="N", default=128, help="images per batch")
    add(
        "--weight-decay",
        "--wd",
        type=nonnegative,
        metavar="W",
        default=weight_decay,
        help="L2 penalty: W / 2 times the squared norm of the parameters (adamw: apart from the "
        "loss, in a subspace on z)",
    )
    add(
        "--randomseed",
        type=natural,
        metavar="N",
        default=1,
        help="seed of initialization, label corruption, data order and augmentation",
    )
    add(
        "--train-seed",
        type=natural,
        metavar="N",
        help="seed of data order, augmentation and dropout alone (default: --randomseed)",
    )


def add_run_options(parser: Parser) -> None:
    """Add the options for the files of a run and of earlier ones."""
    add = parser.groups["run"].add_argument
    add(
        "--save-dir",
        type=path,
        metavar="DIR",
        default="save_temp",
        help="directory of the trajectory, and of the runs in its subspaces",
    )
    add(
        "--save-every",
        type=positive,
        metavar="N",
        default=10,
        help="write checkpoint.pt and model.th every N epochs, and at the end",
    )
    add(
        "--resume",
        type=path,
        nargs="?",
        const=True,
        metavar="PATH",
        help="continue from this checkpoint (without PATH: the run's own, if there is one)",
    )
    add("--overwrite", action="store_true", help="replace an earlier run in the same directory")
    add(
        "-e",
        "--evaluate",
        action="store_true",
        help="only test: --pretrained's or --resume's weights, else the run's own model.th",
    )
    add(
        "-p",
        "--print-freq",
        type=positive,
        metavar="N",
        default=50,
        help="every N batches, check that the loss is finite, and show it on a terminal",
    )


def add_precision_options(parser: Parser) -> None:
    """Add the options for how to compute."""
    add = parser.groups["machine"].add_argument
    add("--half", action="store_true", help="run the network in bfloat16 (autocast)")
    add(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="give the network its images in channels_last memory format (default: on the CPU)",
    )
    add("--compile", action="store_true", help="compile the network (torch.compile)")
    add("--tf32", action="store_true", help="on CUDA, multiply in TensorFloat-32 (10 bits)")
    add(
        "--deterministic",
        action="store_true",
        help="same bits in every run, on CUDA too; an operation that cannot is an error",
    )


def add_machine_options(parser: Parser) -> None:
    """Add the options for where to compute."""
    add = parser.groups["machine"].add_argument
    add(
        "--device",
        type=str.lower,
        metavar="DEVICE",
        default="auto",
        help="cpu, cuda, mps, xpu …; auto is the accelerator that torch sees, else cpu",
    )
    add(
        "--threads",
        type=between(int, 1, 1024),
        metavar="N",
        help="CPU threads (default: as torch decides)",
    )
    add(
        "-j",
        "--workers",
        type=natural,
        metavar="N",
        default=4,
        help="threads or processes that decode image files",
    )
    add(
        "--test-batch-size",
        type=positive,
        metavar="N",
        help="images per test batch (default: 500 up to 64 pixels, fewer for larger images)",
    )
    add(
        "--sync-bn",
        action="store_true",
        help="under torchrun on CUDA, BatchNorm normalizes with the batches of all processes",
    )


def add_optimizer_options(
    parser: Parser, rates: dict[str, float], drops: dict[str, list[int]], usual: str
) -> None:
    """Add the options of the optimizers of torch, in the full space or in a subspace.

    `rates` are the learning rates for each optimizer, `drops` the milestones for each dataset,
    with those of all others under "", and `usual` says so.
    """
    parser.rates, parser.drops = rates, drops
    add = parser.groups["training"].add_argument
    add(
        "--optimizer",
        type=one_of("optimizer", list(rates)),
        metavar="NAME",
        default="sgd",
        help=", ".join(rates),
    )
    default = f"{rates['sgd']:g}, with adam and adamw {rates['adam']:g}"
    add(
        "--lr",
        "--learning-rate",
        type=nonnegative,
        metavar="LR",
        help=f"learning rate (default: {default})",
    )
    add("--momentum", type=fraction, metavar="M", default=0.9, help="momentum of sgd")
    add = parser.groups["training"].add_mutually_exclusive_group().add_argument
    add(
        "--milestones",
        type=natural,
        nargs="*",
        metavar="N",
        help=f"after N epochs the learning rate drops to a tenth (default: {usual})",
    )
    add(
        "--schedule",
        type=one_of("schedule", ["cosine"]),
        metavar="cosine",
        help="instead of --milestones, half a cosine from the learning rate to 0 after --epochs",
    )


def add_sample_options(parser: Parser) -> None:
    """Add the options for which samples span the subspace."""
    add = parser.groups["subspace"].add_argument
    add(
        "--samples",
        nargs="+",
        metavar="FILES",
        help="checkpoints of any tool in place of --save-dir's N.pt: files, folders or globs, "
        "numbered from 0 in the order of the numbers in their names",
    )
    add(
        "--params_start",
        "--params-start",
        type=natural,
        metavar="N",
        default=0,
        help="first snapshot, where training in the subspace starts from",
    )
    add(
        "--params_end",
        "--params-end",
        type=natural,
        metavar="N",
        help="one past the last snapshot (default: 51, or all where there are fewer; all of "
        "--samples)",
    )
    add(
        "--params_stride",
        "--params-stride",
        type=positive,
        metavar="N",
        default=1,
        help="take every N-th snapshot",
    )


def add_subspace_options(parser: Parser) -> None:
    """Add the options for the subspace, the samples that span it, and where training starts."""
    add_sample_options(parser)
    add = parser.groups["subspace"].add_argument
    add(
        "--n_components",
        "--n-components",
        type=components,
        metavar="K",
        help="directions to keep, or the fraction of the snapshots' variance to explain, e.g. 0.99 "
        "(default: 40, or one less than the snapshots)",
    )
    add(
        "--basis",
        type=basis,
        metavar="BASIS",
        default="pca",
        help="pca; schmidt: all directions that the snapshots span; random: K random ones; walk: "
        "pca of a random walk with steps as long as theirs; or a file, .npz or .npy",
    )
    add(
        "--start",
        type=sample_or_mean,
        metavar="N",
        help="start at snapshot N, or at the snapshots' `mean` (default: --params_start)",
    )
    add(
        "--bn-update",
        action="store_true",
        help="before each test, recompute BatchNorm's statistics over the training images",
    )
    add(
        "--basis-dtype",
        type=one_of("type", ["float32", "bfloat16"]),
        metavar="TYPE",
        default="float32",
        help="how the basis is kept; bfloat16 takes half the memory",
    )
    add = parser.groups["run"].add_argument
    add(
        "--run",
        type=run_name,
        metavar="NAME",
        help="directory in --save-dir (default: the method's, with --basis, --start and "
        "--train-seed if given, and with --n_components where another one's run is in it)",
    )
