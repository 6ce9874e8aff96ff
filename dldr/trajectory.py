"""The snapshots of a trajectory in files, read when they are used; no code in the files is run."""

import warnings
import zipfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Snapshot(dict):
    """A state dict in `file`, whose values are read where and when they are used."""

    file: Path


def load_state_dict(file: Path, mmap: bool = False) -> dict[str, Tensor]:
    """The state dict in a snapshot, checkpoint.pt, model.th or other weights file, on the CPU.

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


def load_trajectory(source: Any, *, key: str | None = None, prefix: str = "") -> Sequence[Snapshot]:
    raise NotImplementedError


def load_samples(save_dir: str | Path, start: int, end: int, stride: int = 1) -> list[Snapshot]:
    """The snapshots start.pt, … below end, read only where and when they are used.

    Raises FileNotFoundError that says which are missing and which are there, and ValueError for a
    file that is truncated or corrupt.
    """
    save_dir = Path(save_dir)
    numbers = range(start, end, stride)
    listed = snapshot_numbers(save_dir)
    there = set(listed)
    missing = list(islice((number for number in numbers if number not in there), 4))
    if missing:
        last = next(number for number in reversed(numbers) if number not in there)
        missing = [*missing[:3], last] if len(missing) > 3 else missing
        have = f"there are {abbreviate(listed)}" if there else "there are none"
        raise FileNotFoundError(f"{save_dir} lacks the snapshots {abbreviate(missing)}; {have}")
    snapshots = []
    for number in numbers:
        snapshots.append(Snapshot(load_state_dict(save_dir / f"{number}.pt", mmap=True)))
        snapshots[-1].file = save_dir / f"{number}.pt"
    return snapshots


def snapshot_numbers(save_dir: Path) -> list[int]:
    """The numbers of the snapshots that are there, the smallest first."""
    files = (file for file in save_dir.glob("*.pt") if file.stem.isdecimal() and file.is_file())
    return sorted(int(file.stem) for file in files)


def abbreviate(numbers: Sequence[int]) -> str:
    """A few numbers as they are, more by their ends."""
    return ", ".join(map(str, [*numbers[:2], "…", numbers[-1]] if len(numbers) > 3 else numbers))
