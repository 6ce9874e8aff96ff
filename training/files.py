"""The files of a run: written whole or not at all, read without running code, one run at a time."""

import argparse
import contextlib
import copy
import errno
import hashlib
import json
import math
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor, nn

from dldr.distributed import on_rank0, print0, rank
from dldr.reading import read_tensors
from dldr.trajectory import parts_of
from training.distributed import restart_count
from training.errors import InputError, blame
from training.memory import size_text
from training.records import (
    MIDWAY,
    RESUMED,
    arguments_of,
    changed_options,
    check_same,
    read_config,
    sample_file,
    sample_key,
    sample_range,
    session_of,
)

EARLIER = ("metrics.jsonl", "checkpoint.pt", "model.th")  # what a run leaves, beside its samples
# What the system says on a file system without locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

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
        why = f"{file}: could not be written ({cause.strerror or cause})"
        cure = "earlier files are intact: once there is room, continue with --resume"
        raise InputError(f"{why}; {cure}", exit_code=1) from error
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


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with None for numbers that are not finite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


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
    for file in [part for path in files for part in parts_of(path)]:
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


# ------------------------------------------------------------------------- the directory of a run


class RunFiles:
    """The directory of a run, and the checkpoint that it continues from; see `opened`.

    Attributes: `directory`; `checkpoint`, what `checkpoint_file` holds, or None to start afresh;
    `resumes`, whether that file is the run's own; `changed`, the options that a resumed run no
    longer has as before; `source`, the fingerprint of the samples that the run builds on;
    `obsolete`, the files of an earlier run that `begin` removes.

    Raises InputError for a directory that holds another run, and a checkpoint of another.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.directory = args, args.directory
        numbers = sample_range(vars(args))
        files = [sample_file(args, number) for number in numbers]
        self.source = fingerprint(files, *sample_key(args)) if files else None
        self.config = self.directory / "config.json"
        self.checkpoint_file = checkpoint_file(args)
        self.resumes = is_within(self.checkpoint_file, self.directory)
        self.checkpoint = on_rank0(self.read) if self.checkpoint_file else None
        self.changed = on_rank0(self.compare) if self.resumes else {}
        self.obsolete = [] if self.resumes else on_rank0(self.earlier)

    def read(self) -> dict:
        """The checkpoint, if it is of the same samples and options."""
        file = self.checkpoint_file
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

    def compare(self) -> dict[str, list]:
        """What the command changes of the run that it resumes, which is printed, too."""
        if not self.config.exists():
            return {}
        changed = changed_options(self.args, read_config(self.config)["sessions"][-1]["arguments"])
        for name, (before, now) in changed.items():
            print0(f"--{name.replace('_', '-')}: {now} from here on, before it was {before}")
        return changed

    def earlier(self) -> list[Path]:
        """The files of an earlier run; InputError unless they may be removed.

        They may with --overwrite, and by the command that wrote them if it ended early.
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
        """Whether the same command ended before its first checkpoint, and no run builds on it."""
        with contextlib.suppress(Exception):  # whatever else the files may be
            begun = read_tensors(self.directory / "checkpoint.pt", mmap=True)
            used = any(self.directory.glob("*/config.json"))
            aside = dict.fromkeys(("save_dir", "directory", "resume", "overwrite"))
            before, now = read_config(self.config)["arguments"], arguments_of(self.args)
            return before | aside == now | aside and not (
                begun["rows"] or begun["progress"] or used
            )
        return False

    def check_labels(self, digest: str) -> None:
        """InputError if the run, or the one whose samples it takes, had other labels."""
        configs = [self.config] if self.resumes else []
        of_samples = self.source and not self.args.samples
        configs += [self.args.save_dir / "config.json"] if of_samples else []
        for file in filter(Path.exists, configs):
            if read_config(file).get("labels", digest) != digest:  # earlier versions had none
                raise InputError(
                    f"--data-dir {self.args.data_dir}: its images and labels are not those that "
                    f"{file} is of; name the directory that has them"
                )

    def begin(self, facts: dict[str, Any], epoch: int) -> None:
        """Remove an earlier run, and write config.json: `facts`, and what this session runs on.

        A session is one start that trains. What the first one had is at the top, too.
        """
        if rank():
            return
        for file in self.obsolete:
            file.unlink()
        session = session_of(self.args, epoch, self.changed)
        if self.source:
            # With it a report can tell that the samples are still those that were used.
            facts = facts | {"samples": list(sample_range(vars(self.args)))}
            facts["fingerprint"] = self.source
        config = session | {"sessions": [session]} | facts
        if self.resumes and self.config.exists():
            before = read_config(self.config)
            config = before | {"sessions": [*before["sessions"], session]} | facts
        save(self.config, json.dumps(config, indent=2) + "\n")

    def save_metrics(self, rows: Sequence[dict]) -> None:
        """Write metrics.jsonl, with null for what is not finite, which JSON does not know."""
        lines = "".join(json.dumps(finite(row)) + "\n" for row in rows)
        save(self.directory / "metrics.jsonl", lines)

    def has_results_of(self, epoch: int) -> bool:
        """Whether model.th, which is written last, is of the epoch."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return read_tensors(self.directory / "model.th")["epoch"] == epoch
        return False


@contextlib.contextmanager
def opened(args: argparse.Namespace) -> Iterator[RunFiles]:
    """Hold the run's directory, which is made; what is refused leaves no directory behind."""
    with contextlib.ExitStack() as stack:
        with blame("--save-dir"):
            args.directory = on_rank0(lambda: hold(args, stack))
        yield RunFiles(args)


def hold(args: argparse.Namespace, stack: contextlib.ExitStack) -> Path:
    """Make the run's directory and lock it until the stack ends; returns it.

    If another run has it locked, the directory with k in its name is taken, if there is one.
    """
    for directory in dict.fromkeys((args.directory, directory_with_k(args, args.directory))):
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        stack.callback(remove_empty, made)
        try:
            # The system's lock ends with the process; a file in its place would outlive a kill.
            lock = filelock.FileLock(directory / ".lock", timeout=0, fallback_to_soft=False)
            stack.enter_context(lock)
        except filelock.Timeout:
            if has_same_k(args, directory):
                break
            continue
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print0(f"{directory}: no locks on this file system; no second run may use it")
        stack.callback((directory / ".lock").unlink, missing_ok=True)
        return directory
    raise ValueError(f"{args.directory} is in use by another process")


def directory_with_k(args: argparse.Namespace, directory: Path) -> Path:
    """The directory with k in its name, where the command gives k and no name."""
    if args.run or "n_components" not in args.given:
        return directory
    end = f"_k{args.n_components}"
    return directory.with_name(directory.name.removesuffix(end) + end)


def has_same_k(args: argparse.Namespace, directory: Path) -> bool:
    """Whether the run in the directory is said to have the --n_components of this one."""
    with contextlib.suppress(InputError, KeyError, OSError):
        recorded = read_config(directory / "config.json")["arguments"]
        return recorded["n_components"] == args.n_components
    return False


def checkpoint_file(args: argparse.Namespace) -> Path | None:
    """The file that the options say to resume from; None to start afresh."""
    if args.resume is True or restart_count():
        own = args.directory / "checkpoint.pt"
        if on_rank0(own.exists):  # after a restart it is further than the one named
            return own
    return None if args.resume is True else args.resume


def is_within(file: Path | None, directory: Path) -> bool:
    """Whether the file, by whatever path, is in the directory."""
    return file is not None and file.resolve().parent == directory.resolve()


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


def check_file(option: str, file: Any) -> None:
    """InputError for a path that an option names and that is no file."""
    if isinstance(file, Path) and not on_rank0(file.is_file):  # the others may not see it
        raise InputError(f"{option}: {file}: there is no such file")


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
