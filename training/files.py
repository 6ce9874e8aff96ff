"""The files of a run: written whole or not at all, read without running code, one run at a time."""

import argparse
import contextlib
import copy
import hashlib
import json
import os
import platform
import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from dldr.distributed import on_rank0, print0, rank, world_size
from dldr.reading import read_tensors
from training.distributed import restart_count
from training.errors import InputError, blame
from training.memory import size_text
from utils import PREPROCESSING

# The options that all runs on one trajectory share, and those that a resumed run has to keep.
EXPERIMENT = ("arch", "datasets", "image_size", "corrupt", "randomseed", "smalldatasets")
SUBSPACE = ("n_components", "params_start", "params_end", "params_stride", "basis", "start")
SHARED = (*EXPERIMENT, *PREPROCESSING)
RESUMED = (*SHARED, *SUBSPACE, "optimizer", "momentum", "weight_decay", "alpha", "gamma")
RESUMED += ("method", "sample_every", "average")
# These too in the middle of an epoch, and with --sample-every.
MIDWAY = ("batch_size", "accumulate", "start_epoch")
EARLIER = ("metrics.jsonl", "checkpoint.pt", "model.th")  # what a run leaves, beside its samples

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
    read. A file of another kind is read whole, and one that was written without checksums.
    """
    digest = hashlib.sha256(repr(options).encode())
    for file in files:
        if checksums := checksums_in(file):
            digest.update(repr(checksums).encode())
        else:
            with file.open("rb") as stream:
                while block := stream.read(2**24):
                    digest.update(block)
    return digest.hexdigest()


def checksums_in(file: Path) -> list[int]:
    """The CRC-32 of each entry of a zip archive; [] for another file, or where some have none."""
    if not zipfile.is_zipfile(file):
        return []
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    # torch.serialization.set_crc32_options(False) writes 0.
    complete = all(entry.CRC for entry in entries if entry.file_size)
    return [entry.CRC for entry in entries] if complete else []


# ----------------------------------------------------------------------- samples and options


def sample_range(arguments: Mapping[str, Any]) -> range:
    """The numbers of the samples that a run takes, by its options as config.json has them."""
    if arguments["average"]:
        return range(*arguments["average"])
    if arguments["basis"]:
        names = ("params_start", "params_end", "params_stride")
        return range(*(arguments[name] for name in names))
    return range(0)


def sample_fingerprint(args: argparse.Namespace) -> str | None:
    """The fingerprint of the samples that a run takes; None where it takes none."""
    files = [args.save_dir / f"{number}.pt" for number in sample_range(vars(args))]
    return fingerprint(files) if files else None


def check_same(
    args: argparse.Namespace, recorded: Mapping[str, Any], names: Sequence[str], file: Path
) -> None:
    """InputError where an option that has to be the same differs from what `file` recorded."""
    for name in names:
        if name not in recorded:
            raise ValueError(f"{file}: does not record {name}")
        value = getattr(args, name)
        if recorded[name] != value:
            option = "--" + (name if name in SUBSPACE else name.replace("_", "-"))
            raise InputError(
                f"{option}: {value} here, {recorded[name]} in {file}; they have to be the same"
            )


def recorded_options(file: Path) -> dict[str, Any]:
    """The options in a config.json that runs on its samples take unless the command gives them.

    A network to import is not among them: code is not run because a file names it.
    """
    if not file.exists():
        return {}
    with blame(f"{file}: not readable", Exception):
        arguments = json.loads(file.read_text())["arguments"]
        options = {name: arguments[name] for name in SHARED}
        options["data_dir"] = Path(arguments["data_dir"])
        if ":" in options["arch"]:
            del options["arch"]
    return options


def check_config(args: argparse.Namespace, file: Path) -> None:
    """InputError for options that contradict the config.json of the trajectory."""
    with blame(f"{file}: not readable", Exception):
        check_same(args, json.loads(file.read_text())["arguments"], SHARED, file)


def check_file(option: str, file: Any) -> None:
    """InputError for a path that an option names and that is no file."""
    if isinstance(file, Path) and not on_rank0(file.is_file):  # the others may not see it
        raise InputError(f"{option}: {file}: there is no such file")


def git_commit() -> str | None:
    """The commit these scripts are at, where git can tell."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


# ------------------------------------------------------------------------- the directory of a run


class RunFiles:
    """The directory of a run, held by this process, and the checkpoint that it continues from.

    Attributes: `directory`; `checkpoint`, what the file that --resume names holds, or None to start
    afresh; `resumes`, whether that file is the run's own; `source`, the fingerprint of the samples
    that the run builds on.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """InputError for a directory that holds another run, and a checkpoint of another."""
        self.args, self.directory = args, args.directory
        self.source = sample_fingerprint(args)
        file = self.checkpoint_file()
        self.checkpoint = on_rank0(lambda: self.read(file)) if file else None
        self.resumes = bool(file) and file.resolve().parent == self.directory.resolve()
        if not self.resumes:
            on_rank0(self.earlier)

    def checkpoint_file(self) -> Path | None:
        """The file that the options say to resume from; None to start afresh."""
        own, resume = self.directory / "checkpoint.pt", self.args.resume
        if resume is True or (restart_count() and own.exists()):
            # After a restart the run's own is further than the one it began with.
            return own if on_rank0(own.exists) else None
        return resume

    def read(self, file: Path) -> dict:
        """A checkpoint of the same samples and options."""
        with blame_checkpoint(file):
            checkpoint = read_tensors(file)
            by_steps = checkpoint["progress"].get("batches") or self.args.sample_every
            names = RESUMED + (MIDWAY if by_steps else ())
            check_same(self.args, checkpoint["arguments"], names, file)
            if self.source and checkpoint["basis"] != self.source:
                raise ValueError(f"{file} was made from other samples; --overwrite it")
            begun = checkpoint["progress"].get("batches", 0)
            also = f", and {begun} batches of the next" if begun else ""
            print0(f"{file}: {checkpoint['epoch']} epochs are done{also}")
        return checkpoint

    def earlier(self) -> list[Path]:
        """The files of an earlier run; InputError unless they may be removed.

        They may with --overwrite, and where the run ended before its first checkpoint was due.
        """
        files = [self.directory / name for name in EARLIER]
        files += [file for file in self.directory.glob("*.pt") if file.stem.isdecimal()]
        files = [file for file in files if file.exists()]
        if files and not self.args.overwrite and not self.ended_early():
            raise InputError(
                f"--save-dir: {self.directory} holds a run; --overwrite it, or continue it with "
                "--resume where it has a checkpoint.pt"
            )
        return files

    def ended_early(self) -> bool:
        """Whether a run ended before its first checkpoint was due, and none builds on it."""
        with contextlib.suppress(Exception):  # whatever else the file may be
            begun = read_tensors(self.directory / "checkpoint.pt", mmap=True)
            used = any(self.directory.glob("*/config.json"))
            return not (begun["rows"] or begun["progress"] or used)
        return False

    def begin(self, facts: dict[str, Any], epoch: int) -> None:
        """Remove an earlier run, and write config.json: `facts`, and what this session runs on.

        A session is one start that trains. What the first one had is at the top, too.
        """
        if not self.resumes and rank() == 0:
            for file in self.earlier():
                file.unlink()
        hardware = torch.get_device_module(self.args.device)
        arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()}
        versions = {module.__name__: module.__version__ for module in (torch, torchvision, np)}
        session = {
            "arguments": arguments,
            "device": getattr(hardware, "get_device_name", platform.machine)(),
            "threads": torch.get_num_threads(),
            "processes": world_size(),
            "versions": versions | {"python": platform.python_version()},
            "commit": git_commit(),
            "from_epoch": epoch,
        }
        file = self.directory / "config.json"
        if self.resumes and rank() == 0 and file.exists():
            with blame(f"{file}: not readable", Exception):
                earlier = json.loads(file.read_text())
                config = earlier | {"sessions": [*earlier["sessions"], session]} | facts
        else:
            config = session | {"sessions": [session]} | facts
        save(file, json.dumps(config, indent=2) + "\n")

    def save_metrics(self, rows: Sequence[dict]) -> None:
        """Write metrics.jsonl."""
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        save(self.directory / "metrics.jsonl", lines)

    def has_results_of(self, epoch: int) -> bool:
        """Whether model.th, which is written last, is of the epoch."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return read_tensors(self.directory / "model.th")["epoch"] == epoch
        return False


@contextlib.contextmanager
def opened(args: argparse.Namespace) -> Iterator[RunFiles]:
    """Hold the run's directory, which is made; what is refused leaves no directory behind."""
    directory = args.directory
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        if rank() == 0:
            with blame("--save-dir"):
                directory.mkdir(parents=True, exist_ok=True)
                stack.callback(remove_empty, made)
                try:
                    stack.enter_context(filelock.FileLock(directory / ".lock", timeout=0))
                except filelock.Timeout as error:
                    raise ValueError(f"{directory} is in use by another process") from error
                stack.callback((directory / ".lock").unlink)
        yield RunFiles(args)


def remove_empty(directories: Sequence[Path]) -> None:
    """Remove directories, the deepest first, up to one with files in it."""
    with contextlib.suppress(OSError):
        for directory in directories:
            directory.rmdir()


@contextlib.contextmanager
def blame_checkpoint(file: Path) -> Iterator[None]:
    """Raise whatever a file with other contents leads to as an InputError that names it."""
    kinds = (KeyError, TypeError, AttributeError, RuntimeError, IndexError)
    with blame("--resume"), blame(f"--resume: {file}: not a checkpoint.pt of these scripts", kinds):
        yield


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Any) -> None:
    """Load a state; momentum and the like stay those of the options."""
    own = [{**group, "params": None} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options | {"params": group["params"]})


def check_disk(args: argparse.Namespace, model: nn.Module, numbers: range) -> None:
    """Print how much disk the samples still to come will take; InputError if it is not free."""
    there = sum((args.save_dir / f"{i}.pt").exists() for i in numbers)
    count = len(numbers) - (0 if args.overwrite else there)
    if not count:
        return
    state = model.state_dict().values()
    size = sum(value.nbytes for value in state if isinstance(value, Tensor))
    # checkpoint.pt takes three sizes, twice while the next one is written, and model.th one.
    needed = (len(numbers) - there + 7) * size
    free = on_rank0(lambda: shutil.disk_usage(args.save_dir).free)
    what = f"{count} samples of {size_text(size)}, {size_text(needed)} with checkpoints"
    if needed > free:
        raise InputError(f"--save-dir {args.save_dir}: {what}, but {size_text(free)} are free")
    print0(f"{what}; {size_text(free)} of disk are free")
