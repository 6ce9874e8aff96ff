"""What the options leave open, and whether they go together; the device and torch's settings."""

import argparse
import contextlib
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import models
from dldr.distributed import on_rank0, world_size
from dldr.trajectory import find_snapshots
from training import distributed
from training.distributed import restart_count
from training.errors import InputError, blame, warnings_told
from training.files import check_file, checkpoint_file, directory_with_k
from training.options import BASES, NOISE, Parser, one_of
from training.records import read_config, resumed_options, shared_options
from utils import DATASETS, LABEL_FILE


def parse_args(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options, and decide what they leave open (device, image size, directory)."""
    args = parser.parse_args(argv)
    if args.arch == "list":
        print(models.listing())
        raise SystemExit(0)
    args.given = given_options(parser, args, argv)
    args.device = pick_device(args.device)
    distributed.init(args.device)
    if restart_count() and not args.evaluate:  # the command is that of the first start
        args.resume, args.overwrite = args.resume or True, False
    if args.average:
        args.method = "average"
    args.directory = on_rank0(lambda: run_directory(args))
    take_from_records(args)
    check_combinations(args)
    fill_in(args, parser)
    configure_torch(args)
    return args


def given_options(parser: Parser, args: argparse.Namespace, argv: Sequence[str] | None) -> set[str]:
    """The names of the options that the command gives, even if they are the defaults."""
    untouched = object()
    empty = argparse.Namespace(**dict.fromkeys(vars(args), untouched))
    parsed = vars(parser.parse_args(argv, empty))
    return {name for name, value in parsed.items() if value is not untouched}


def take_from_records(args: argparse.Namespace) -> None:
    """Take what the command does not give from the trajectory, and from the run it continues."""
    file = checkpoint_file(args)
    if args.evaluate and not args.pretrained:
        file = file or args.directory / "model.th"

    def read() -> dict[str, Any]:
        recorded, trajectory = {}, args.save_dir / "config.json"
        if (args.basis or args.average) and not args.samples and trajectory.exists():
            with blame("--save-dir"):
                recorded |= shared_options(trajectory)
        if file and file.exists() and (file.parent / "config.json").exists():
            recorded |= resumed_options(file.parent / "config.json")
        return recorded

    recorded = on_rank0(read)
    known = vars(args).keys() - args.given
    known -= {"schedule"} if "milestones" in args.given else set()  # one of them
    vars(args).update({name: value for name, value in recorded.items() if name in known})


def fill_in(args: argparse.Namespace, parser: Parser) -> None:
    """Decide what depends on other options."""
    args.data_dir = args.data_dir.absolute()
    if args.samples:
        with blame("--samples"):
            args.samples = on_rank0(lambda: sample_names(args.samples))
    args.image_size = args.image_size or DATASETS[args.datasets].image_size
    if args.channels_last is None:  # on the CPU it was never slower (benchmarks/README.md)
        args.channels_last = args.device == "cpu"
    if args.train_seed is None:
        args.train_seed = args.randomseed
    if args.optimizer:
        args.lr = parser.rates[args.optimizer] if args.lr is None else args.lr
        if args.milestones is None:
            args.milestones = parser.drops.get(args.datasets, parser.drops[""])


def sample_names(source: Sequence[str]) -> list[str]:
    """The files that --samples names, in their order, as config.json can have them."""
    with warnings_told():
        return [str(path.absolute()) for path in find_snapshots(source)]


def run_directory(args: argparse.Namespace) -> Path:
    """Where a run's files are: --save-dir, or in it --run, or a name made of its options."""
    if args.method == "sgd":
        return args.save_dir
    name = args.method
    if args.basis and args.basis != "pca":
        name += f"_{Path(args.basis).stem}"
    if args.start is not None:
        name += f"_from_{args.start}"
    if args.train_seed is not None:
        name += f"_seed{args.train_seed}"
    directory = args.save_dir / (args.run or name)
    # So that runs of several k go on side by side, the later ones have it in their names.
    with_k = directory_with_k(args, directory)
    return with_k if with_k.exists() or is_of_other_k(args, directory) else directory


def is_of_other_k(args: argparse.Namespace, directory: Path) -> bool:
    """Whether the directory has a run with other --n_components, which is not to be replaced."""
    with contextlib.suppress(Exception):  # what is wrong with the file is said later
        recorded = read_config(directory / "config.json")["arguments"]["n_components"]
        return not args.overwrite and recorded != args.n_components
    return False


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
    if args.key and not (args.samples or isinstance(args.pretrained, Path)):
        raise InputError("--key: allowed with --pretrained PATH or --samples")
    check_file("--pretrained", args.pretrained)
    check_file("--resume", args.resume)
    if args.noise not in NOISE:
        check_file("--noise", Path(LABEL_FILE.fullmatch(args.noise)[1]))
        if args.corrupt:
            raise InputError(
                "--corrupt: not with the labels of a --noise FILE; allowed: one of them"
            )
    if args.basis and args.basis not in BASES:
        check_file("--basis", Path(args.basis))
    if ":" in args.arch:
        with blame("--arch"):
            models.imported(args.arch)
    else:
        with blame("--arch", argparse.ArgumentTypeError):
            args.arch = one_of("network", models.ARCHITECTURES)(args.arch)
    if args.epochs <= args.start_epoch and not args.average:
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
