"""The files of a run: written whole or not at all, read without running code, one run at a time."""

import argparse
import atexit
import contextlib
import copy
import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from distributed import on_rank0, print0, rank, restart_count, world_size
from errors import InputError, blame
from network import check_finite_values, check_fits
from utils import PREPROCESSING, read_tensors, size_text

# The options that all runs on one trajectory share, and those that a resumed run has to keep.
EXPERIMENT = ("arch", "datasets", "image_size", "corrupt", "randomseed", "smalldatasets")
SUBSPACE = ("n_components", "params_start", "params_end", "params_stride", "basis", "start")
SHARED = (*EXPERIMENT, *PREPROCESSING)
RESUMED = (*SHARED, *SUBSPACE, "optimizer", "momentum", "weight_decay", "alpha", "gamma")
RESUMED += ("sample_every", "average")
# These too in the middle of an epoch, and with --sample-every.
MIDWAY = ("batch_size", "accumulate", "start_epoch")

# ------------------------------------------------------------------------------------ writing


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Any]:
    """A binary stream whose content takes the place of `file` once it is all on the disk.

    Raises InputError if that fails, as on a full disk: the earlier file stays as it was.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())  # else a power cut may leave the new name without the content
        temporary.replace(file)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of an OSError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise InputError(
            f"{file}: could not be written ({cause.strerror or cause}); earlier files are intact: "
            "once there is room, continue with --resume", 1,
        ) from error  # fmt: skip
    finally:
        temporary.unlink(missing_ok=True)


def save(file: Path, value: Any) -> None:
    """Write `value`: text to .json and .jsonl, arrays to .npz, anything of tensors elsewhere.

    Tensors are written as on the CPU, so that they load anywhere. Only rank 0 writes.
    """
    if rank():
        return
    with replacing(file) as stream:
        if file.suffix in (".json", ".jsonl"):
            stream.write(value.encode())
        elif file.suffix == ".npz":
            np.savez(stream, **value)
        else:
            torch.save(on_cpu(value), stream)


def on_cpu(value: Any) -> Any:
    """`value` with all tensors in it on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        moved = copy.copy(value)  # keeps a state dict's _metadata, the versions of its modules
        moved.update((name, on_cpu(part)) for name, part in value.items())
        return moved
    return [on_cpu(part) for part in value] if isinstance(value, list) else value


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


# -------------------------------------------------------------------------------- config.json


def sample_range(arguments: Mapping[str, Any]) -> range:
    """The numbers of the samples that a run takes, by its options as config.json has them."""
    if arguments.get("average"):
        return range(*arguments["average"])
    names = ("params_start", "params_end", "params_stride")
    return range(*(arguments[name] for name in names)) if "basis" in arguments else range(0)


def sample_fingerprint(args: argparse.Namespace) -> str | None:
    """The fingerprint of the samples that a run takes; None where it takes none."""
    files = [args.save_dir / f"{number}.pt" for number in sample_range(vars(args))]
    return fingerprint(files) if files else None


def check_same(
    args: argparse.Namespace, recorded: Mapping[str, Any], names: Sequence[str], file: Path
) -> None:
    """InputError where an option that has to be the same differs from what `file` recorded."""
    for name in names:
        value = getattr(args, name, None)
        needed = value is not None or name in EXPERIMENT  # earlier versions had fewer options
        if name in args and needed and name not in recorded:
            raise ValueError(f"{file}: does not record {name}")
        if name in args and recorded.get(name) != value:
            option = "--" + (name if name in SUBSPACE else name.replace("_", "-"))
            raise InputError(
                f"{option}: {value} here, {recorded[name]} in {file}; they have to be the same"
            )


def recorded_options(file: Path) -> list[str]:
    """The options in a config.json that runs on its samples take unless the command gives them.

    A network to import is not among them: code is not run because a file names it.
    """
    if not file.exists():
        return []
    with blame(f"{file}: not readable", Exception):
        arguments = json.loads(file.read_text())["arguments"]
        values = {name: arguments.get(name) for name in (*SHARED, "data_dir")}
    words = []
    for name, value in values.items():
        if value is not None and not (name == "arch" and ":" in str(value)):
            several = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, several)]
    return words


def check_config(args: argparse.Namespace, file: Path) -> None:
    """InputError for options that contradict the config.json of the trajectory."""
    with blame(f"{file}: not readable", Exception):
        check_same(args, json.loads(file.read_text())["arguments"], SHARED, file)


def save_config(
    args: argparse.Namespace, directory: Path, facts: dict[str, Any], epoch: int, resumed: bool
) -> None:
    """Write config.json: `facts`, the first session at the top, and all under `sessions`.

    A session is one start that trains: its arguments, what it ran on, and from which epoch.
    """
    hardware = torch.get_device_module(args.device)
    session = {
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "device": getattr(hardware, "get_device_name", platform.machine)(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "versions": {m.__name__: m.__version__ for m in (torch, torchvision, np)}
        | {"python": platform.python_version()},
        "commit": git_commit(),
        "from_epoch": epoch,
    }
    file, earlier = directory / "config.json", {}
    if resumed and rank() == 0 and file.exists():
        with blame(f"{file}: not readable", Exception):
            earlier = json.loads(file.read_text())
    first = {name: earlier.get(name) for name in session}  # all that earlier versions wrote of it
    sessions = [*earlier.pop("sessions", [first] if earlier else []), session]
    config = session | earlier | facts | {"sessions": sessions}
    save(file, json.dumps(config, indent=2) + "\n")


def git_commit() -> str | None:
    """The commit these scripts are at, where git can tell."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


# ----------------------------------------------------------------------------- checkpoint.pt


def check_file(option: str, file: Any) -> None:
    """InputError for a path that an option names and that is no file."""
    if isinstance(file, Path) and not on_rank0(file.is_file):  # the others may not see it
        raise InputError(f"{option}: {file}: there is no such file")


def is_own(file: Path, directory: Path) -> bool:
    """Whether a file is in the directory of a run, by whatever path."""
    return file.resolve().parent == directory.resolve()


def checkpoint_file(args: argparse.Namespace, directory: Path) -> Path | None:
    """The file that the options say to resume from; None to start afresh."""
    own = directory / "checkpoint.pt"
    # After a restart the run's own is further than the one it began with.
    file = own if args.resume is True or (restart_count() and own.exists()) else args.resume
    return file if file and (file != own or own.exists()) else None


def check_start(args: argparse.Namespace, directory: Path) -> None:
    """InputError if a run cannot start in the directory; checked before the data are read."""

    def check() -> None:
        file = checkpoint_file(args, directory)
        if file:
            with blame_checkpoint(file):
                checkpoint = read_tensors(file, mmap=True)
                by_steps = checkpoint["progress"].get("batches")
                by_steps = by_steps or getattr(args, "sample_every", None)
                kept = RESUMED + (MIDWAY if by_steps else ())
                check_same(args, checkpoint["arguments"], kept, file)
        if (directory / "lock").exists():
            with blame("--save-dir"), locked(directory):
                pass
        if not file or not is_own(file, directory):
            removable(args, directory)

    on_rank0(check)


def read_checkpoint(
    args: argparse.Namespace, directory: Path, model: nn.Module, source: str | None
) -> tuple[Path, dict] | None:
    """The file that the options say to resume from, and what it holds; None to start afresh.

    `source` is the fingerprint of the samples that the run builds on. Raises InputError where the
    checkpoint is not of the same network and samples.
    """
    file = checkpoint_file(args, directory)
    if not file:
        return None
    with blame_checkpoint(file):
        checkpoint = read_tensors(file)
        rows, progress = checkpoint["rows"], checkpoint["progress"]
        check_fits(checkpoint["states"]["model"], model, file, args.arch)
        check_finite_values(checkpoint["states"]["model"], model, file)
        if source and checkpoint["basis"] != source:
            raise ValueError(f"{file} was made from other samples; --overwrite it")
        sums = [progress.get(name, 0) for name in ("batches", "seconds")]
        sums += progress.get("totals", {}).values()
        last = [row["epoch"] + row["test_acc"] for row in rows[-1:]]
        if not all(map(math.isfinite, [*sums, *last])):
            raise ValueError(f"{file}: its rows or its progress are not those of a run")
    return file, checkpoint


@contextlib.contextmanager
def blame_checkpoint(file: Path) -> Iterator[None]:
    """Raise whatever a file with other contents leads to as an InputError that names it."""
    kinds = (KeyError, TypeError, AttributeError, RuntimeError, IndexError)
    what = f"--resume: {file}: not a checkpoint.pt of these scripts"
    with blame("--resume"), blame(what, kinds):
        yield


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Any, file: Path) -> None:
    """Load the state `saved` in `file`; momentum and the like stay those of the options.

    Raises ValueError for a state that does not fit: fused kernels do not check.
    """
    own = [{**group, "params": None} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved)
    except Exception as error:  # one of another script has many ways to be wrong
        raise ValueError(f"{file}: its optimizer is not this script's") from error
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options | {"params": group["params"]})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            # Like the parameter, a step count, or P-BFGS's matrix.
            allowed = (parameter.shape, (), 2 * parameter.shape)
            if value is not None and (value.shape not in allowed or not value.isfinite().all()):
                raise ValueError(f"{file}: the optimizer's {name} does not fit, or is not finite")


# ------------------------------------------------------------------------ a directory of one's own


def claim(args: argparse.Namespace, directory: Path, keep: bool) -> contextlib.ExitStack:
    """Make the run's directory and hold it until the stack is closed; only rank 0 does.

    With `keep` the files of an earlier run stay, otherwise they are removed, which needs
    --overwrite. Raises InputError that says which process holds the directory, or what is in it.
    """
    with blame("--save-dir"), contextlib.ExitStack() as stack:

        def take() -> None:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(directory))
            for file in [] if keep else removable(args, directory):
                file.unlink()

        on_rank0(take)
        held = stack.pop_all()
    atexit.register(held.close)
    return held


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory of a run; ValueError that says which process does already.

    When the process ends, the kernel releases the lock.
    """
    file = directory / "lock"
    with file.open("a+") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its owner may have removed the file since it was opened: then it locks nothing.
            if not file.exists() or not os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                raise BlockingIOError
        except (BlockingIOError, PermissionError) as error:
            stream.seek(0)
            raise ValueError(f"{directory} is in use by process {stream.read()}") from error
        stream.truncate(0)
        stream.write(f"{os.getpid()} on {platform.node()}")
        stream.flush()
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def removable(args: argparse.Namespace, directory: Path) -> list[Path]:
    """The files of an earlier run, where they may be removed; InputError where not.

    They may with --overwrite, and where the run ended before its first checkpoint was due.
    """
    names = ("metrics.jsonl", "checkpoint.pt", "model.th")
    earlier = [directory / name for name in names]
    earlier += [file for file in directory.glob("*.pt") if file.stem.isdecimal()]
    earlier = [file for file in earlier if file.exists()]
    if earlier and not args.overwrite and not ended_early(directory):
        raise InputError(
            f"--save-dir: {directory} holds a run; --overwrite it, or continue it with --resume "
            "where it has a checkpoint.pt"
        )
    return earlier


def ended_early(directory: Path) -> bool:
    """Whether a run ended before its first checkpoint was due, and none builds on its samples."""
    with contextlib.suppress(Exception):  # whatever else the file may be
        begun = read_tensors(directory / "checkpoint.pt", mmap=True)
        return not (begun["rows"] or begun["progress"] or any(directory.glob("*/config.json")))
    return False


def check_disk(args: argparse.Namespace, model: nn.Module, numbers: range) -> None:
    """Print how much disk the samples still to come will take; InputError if it is not free."""
    there = sum((args.save_dir / f"{i}.pt").exists() for i in numbers)
    count = len(numbers) - (0 if args.overwrite else there)
    size = sum(value.nbytes for value in model.state_dict().values())
    if not count:
        return
    # checkpoint.pt takes three sizes, twice while the next one is written, and model.th one.
    needed = (len(numbers) - there + 7) * size
    disk = next(
        path for path in [args.save_dir, *args.save_dir.absolute().parents] if path.exists()
    )
    free = shutil.disk_usage(disk).free
    what = f"{count} samples of {size_text(size)}, {size_text(needed)} with checkpoints"
    if needed > free:
        raise InputError(f"--save-dir {args.save_dir}: {what}, but {size_text(free)} are free")
    print0(f"{what}; {size_text(free)} of disk are free")
