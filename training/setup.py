"""What the options leave open, and whether they go together; the device and torch's settings."""

import argparse
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

import models
from dldr.distributed import on_rank0, world_size
from training import distributed
from training.distributed import restart_count
from training.errors import InputError, blame
from training.files import check_file, recorded_options
from training.options import BASES, Parser, one_of
from utils import DATASETS


def parse_args(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options, and decide what they leave open (device, image size, directory)."""
    args = parser.parse_args(argv)
    if args.arch == "list":
        print(models.listing())
        raise SystemExit(0)
    args.device = pick_device(args.device)
    distributed.init(args.device)
    if args.basis or args.average:
        take_from_trajectory(args, given_options(parser, args, argv))
    if restart_count() and not args.evaluate:  # the command is that of the first start
        args.resume, args.overwrite = args.resume or True, False
    if args.average:
        args.method = "average"
    args.directory = run_directory(args)
    check_combinations(args)
    args.image_size = args.image_size or DATASETS[args.datasets].image_size
    if args.channels_last is None:  # on the CPU it was never slower (benchmarks/README.md)
        args.channels_last = args.device == "cpu"
    configure_torch(args)
    return args


def given_options(parser: Parser, args: argparse.Namespace, argv: Sequence[str] | None) -> set[str]:
    """The names of the options that the command gives, even if they are the defaults."""
    untouched = object()
    empty = argparse.Namespace(**dict.fromkeys(vars(args), untouched))
    parsed = vars(parser.parse_args(argv, empty))
    return {name for name, value in parsed.items() if value is not untouched}


def take_from_trajectory(args: argparse.Namespace, given: set[str]) -> None:
    """Take the network and the data from the trajectory where the command does not name them."""
    with blame("--save-dir"):
        recorded = on_rank0(lambda: recorded_options(args.save_dir / "config.json"))
    vars(args).update({name: value for name, value in recorded.items() if name not in given})


def run_directory(args: argparse.Namespace) -> Path:
    """Where a run's files are: --save-dir, or in it --run, or a name made of basis and start."""
    if args.method == "sgd":
        return args.save_dir
    name = args.method
    if args.basis and args.basis != "pca":
        name += f"_{Path(args.basis).stem}"
    if args.start is not None:
        name += f"_from_{args.start}"
    return args.save_dir / (args.run or name)


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
        with blame(option):  # OSError without permission
            if place.exists() and not place.is_dir():
                raise InputError(f"{option} {place}: not a directory")
    if args.overwrite and args.resume:
        raise InputError("--overwrite: not with --resume; allowed: one of them")
    if args.pretrained and args.start is not None:
        raise InputError("--start: not with --pretrained; allowed: one of them")
    if args.evaluate and args.resume and args.pretrained:
        raise InputError("--evaluate: with --resume or --pretrained, not with both")
    check_file("--pretrained", args.pretrained)
    check_file("--resume", args.resume)
    if args.basis and args.basis not in BASES:
        check_file("--basis", Path(args.basis))
    if ":" in args.arch:
        with blame("--arch"):
            models.imported(args.arch)
    else:
        with blame("--arch", argparse.ArgumentTypeError):
            args.arch = one_of("network", models.ARCHITECTURES)(args.arch)
    if args.epochs <= args.start_epoch:
        raise InputError(f"--epochs {args.epochs}: allowed: above --start-epoch {args.start_epoch}")
    if 1 < world_size() > args.batch_size / 2:
        least = 2 * world_size()
        raise InputError(f"--batch-size {args.batch_size}: allowed: from {least}, two per process")
    if args.sync_bn and args.device != "cuda":
        raise InputError("--sync-bn: allowed on CUDA; torch has it nowhere else")
    if args.compile and args.device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError(
            "--compile: needs a C++ compiler on the CPU; install g++, or name it in CXX"
        )


def configure_torch(args: argparse.Namespace) -> None:
    """Set torch's process-wide settings from the options."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # --compile advises --tf32
    # Trying cuDNN's algorithms pays since shapes repeat; which one wins varies from run to run.
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.use_deterministic_algorithms(args.deterministic)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by cuBLAS
