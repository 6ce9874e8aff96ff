"""How a script starts and ends: options are completed and checked, errors become exit codes."""

import argparse
import functools
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import distributed
import models
from checkpoint import check_file, recorded_options
from distributed import on_rank0, restart_count, world_size
from errors import InputError, blame, exit_with, handling, stop
from names import BASES
from options import Parser
from utils import DATASETS


def entry_point(main: Callable[[Sequence[str] | None], Any]) -> Callable:
    """Decorate a script's main: a user's mistake becomes one line on stderr and an exit code.

    The code is 2 for options and files, 1 for what went wrong later, 130, 143 and 129 for SIGINT,
    SIGTERM and SIGHUP.
    """

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
                exit_with(f"communication between processes failed, one may be gone: {error}", 1)

    return wrapped


def parse_args(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options, and decide what they leave open (device, image size)."""
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
    """Take the network and the data from the trajectory where the command does not name them."""
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
        with blame(option):  # OSError without permission
            if place.exists() and not place.is_dir():
                raise InputError(f"{option} {place}: not a directory")
    started = getattr(args, "start", None) is not None
    tested = args.evaluate and args.resume and args.pretrained
    for one, other, both in (
        ("--resume", "--evaluate and --pretrained", tested),
        ("--overwrite", "--resume", args.overwrite and args.resume),
        ("--start", "--pretrained", started and args.pretrained),
    ):
        if both:
            raise InputError(f"{one}: not with {other}; allowed: one of them")
    basis = getattr(args, "basis", BASES[0])
    check_file("--pretrained", args.pretrained)
    check_file("--resume", args.resume)
    check_file("--basis", None if basis in BASES else Path(basis))
    if ":" in args.arch:
        with blame("--arch"):
            models.imported(args.arch)
    if args.epochs <= args.start_epoch:
        raise InputError(f"--epochs {args.epochs}: allowed: above --start-epoch {args.start_epoch}")
    if 1 < world_size() > args.batch_size / 2:
        least = 2 * world_size()
        raise InputError(f"--batch-size {args.batch_size}: allowed: from {least}, two per process")
    if getattr(args, "shard_basis", False) and args.basis not in ("pca", "schmidt"):
        raise InputError(f"--shard-basis: not with --basis {args.basis}; allowed: pca, schmidt")
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
