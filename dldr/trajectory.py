"""The snapshots of a trajectory in files, read when they are used; no code in the files is run."""

import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dldr.parameters import trainable
from dldr.reading import read_states

SUFFIXES = (".pt", ".pth", ".ckpt", ".tar", ".bin", ".th", ".safetensors")
# What a folder that is one snapshot calls its weights, or with .index.json the list of its parts.
FOLDER_WEIGHTS = (
    "model.safetensors",
    "adapter_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "adapter_model.bin",
)
# What torch.compile, FSDP and checkpoint wrappers put into names.
WRAPPERS = r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\."


class Snapshot(dict):
    """A state dict in `file`, whose values are read where and when they are used.

    `parts` are the files that hold them: `file` itself, or what is in it where it is a folder.
    """

    file: Path
    parts: Sequence[Path]


def load_trajectory(
    source: Any, *, key: str | None = None, prefix: str = "", model: nn.Module | None = None
) -> list[Snapshot]:
    """The snapshots in files that any tool wrote, in the order of the numbers in their names.

    `source` is a folder, a glob, a file, or a list of these. Snapshots are files of torch.save
    (state dicts, checkpoints that hold one, whole modules) or safetensors, and folders as Hugging
    Face writes them, sharded ones too. What wrappers put into names (`module.`, `_orig_mod.`, …) is
    dropped. Of several state dicts in a file the one is taken that `key` names, such as "ema", or
    that fits `model`, whose names it then gets. `prefix` is what else names begin with, such as
    "model."; with a model it need not be named.

    Values are read when they are used, except from files of torch < 1.6. Files with names unlike
    most of them (last.ckpt beside epoch_1.ckpt, …) are left out with a warning. Raises ValueError
    in one line for what cannot be read, and where it is not clear what to take.
    """
    paths = find_snapshots(source)
    return [load_snapshot(path, key=key, prefix=prefix, model=model) for path in paths]


def load_snapshot(
    path: Path, *, key: str | None = None, prefix: str = "", model: nn.Module | None = None
) -> Snapshot:
    """One snapshot, a file or a folder of one: see `load_trajectory`."""
    snapshot = Snapshot(load_state_dict(path, key=key, prefix=prefix, model=model, mmap=True))
    snapshot.file, snapshot.parts = path, parts_of(path)
    return snapshot


def load_state_dict(
    path: Path,
    *,
    key: str | None = None,
    prefix: str = "",
    model: nn.Module | None = None,
    mmap: bool = False,
) -> dict[str, Tensor]:
    """The weights in a file or a folder of one snapshot, see `load_trajectory`, in memory."""
    states: dict[str, dict] = {}
    for part in parts_of(path):
        for name, state in read_states(part, mmap).items():
            states.setdefault(name, {}).update(state)
    try:
        return choose(states, key, prefix, model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# ----------------------------------------------------------------------- which weights are meant


def choose(
    states: Mapping[str, Mapping], key: str | None, prefix: str, model: nn.Module | None
) -> dict[str, Tensor]:
    """The one of several state dicts that is meant; raises ValueError where that is not clear."""
    if key is not None:
        if key not in states:
            raise ValueError(f"no weights under the key {key}; allowed: {called(states)}")
        states = {key: states[key]}
    states = distinct({name: without(prefix, clean(state)) for name, state in states.items()})
    if model is not None:
        return fitting(states, model)
    if len(states) > 1:
        raise ValueError(f"several weights; allowed as key: {called(states)}")
    return next(iter(states.values()))


def distinct(states: Mapping[str, dict]) -> dict[str, dict]:
    """The state dicts without copies of each other."""
    kept: dict[str, dict] = {}
    for key, state in states.items():
        if not any(is_equal(state, other) for other in kept.values()):
            kept[key] = state
    return kept


def is_equal(state: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two state dicts have the same names and tensors."""
    tensors = [name for name, value in state.items() if isinstance(value, Tensor)]
    return state.keys() == other.keys() and all(
        torch.equal(state[name], other[name]) for name in tensors
    )


def called(keys: Iterable[str]) -> str:
    """Keys or prefixes in a message."""
    return ", ".join(key or "''" for key in keys)


def clean(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state under the names that it had before the network was wrapped."""
    cleaned = {re.sub(WRAPPERS, "", name): value for name, value in state.items()}
    while all(name.startswith("module.") for name in cleaned):
        cleaned = without("module.", cleaned)
    return cleaned if len(cleaned) == len(state) else dict(state)


def without(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """What begins with a prefix, without it; raises ValueError where nothing does."""
    begun = {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}
    if not begun:
        first = dict.fromkeys(name.partition(".")[0] + "." for name in state)
        raise ValueError(f"no name begins with {prefix}; allowed as prefix: {called(first)}")
    return begun


def fitting(states: Mapping[str, Mapping], model: nn.Module) -> dict[str, Tensor]:
    """The one of several state dicts that holds a model's parameters, under the model's names.

    Names in a file may have a prefix more. Of tied parameters one is enough. Raises ValueError
    where none fits, or several do.
    """
    own = clean({name: name for name in [*model.state_dict(), *dict(model.named_parameters())]})
    wanted = aliases(model, {name: cleaned for cleaned, name in own.items()})
    fits = {
        (key, prefix): filled
        for key, state in states.items()
        for prefix in prefixes(state, wanted)
        if (filled := fill(without(prefix, state), wanted)) is not None
    }
    fits = {option: state for option, state in fits.items() if not option[1]} or fits
    shared = {option: {n: state[n] for n in own if n in state} for option, state in fits.items()}
    fits = {option: fits[option] for option in distinct(shared)}
    if not fits:
        first = next(iter(states.values()))
        raise ValueError(f"does not fit the network: {misfit(first, wanted)}")
    if len(fits) > 1:
        keys, beginnings = (dict.fromkeys(part) for part in zip(*fits, strict=True))
        what, which = ("key", keys) if len(keys) > 1 else ("prefix", beginnings)
        raise ValueError(f"several weights fit the network; allowed as {what}: {called(which)}")
    (state,) = fits.values()
    return {own.get(name, name): value for name, value in state.items()}


def aliases(model: nn.Module, cleaned: Mapping[str, str]) -> list[tuple[list[str], torch.Size]]:
    """The names of each parameter in θ, several where it is tied, and its shape."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(cleaned[name])
    return [(names[parameter], parameter.shape) for parameter in trainable(model).values()]


def prefixes(state: Mapping[str, Tensor], wanted: Sequence[tuple]) -> list[str]:
    """What stands before the names of the first parameter in a file, once or more."""
    ends = wanted[0][0] if wanted else []
    begun = {n[: -len(end)] for n in state for end in ends if f".{n}".endswith(f".{end}")}
    return sorted(begun) or [""]


def fill(state: dict[str, Tensor], wanted: Sequence[tuple]) -> dict[str, Tensor] | None:
    """The state with tied parameters under all their names; None where it lacks one in θ."""
    for names, shape in wanted:
        there = [name for name in names if name in state and state[name].shape == shape]
        if not there:
            return None
        state |= {name: state[there[0]] for name in names if name not in state}
    return state


def misfit(state: Mapping[str, Tensor], wanted: Sequence[tuple]) -> str:
    """What a state that does not fit lacks first."""
    name, shape = next(
        (names[0], shape) for names, shape in wanted if fill(dict(state), [(names, shape)]) is None
    )
    if name in state:
        return f"{name} is {tuple(state[name].shape)}, {tuple(shape)} in the network"
    return f"it lacks {name}; it holds {', '.join(list(state)[:3])}, …"


# --------------------------------------------------------------------- which files, in what order


def find_snapshots(source: Any) -> list[Path]:
    """The files, and folders of one snapshot, that a source of `load_trajectory` stands for."""
    return in_order(list(paths_of(source)), listed=not isinstance(source, (str, PathLike)))


def parts_of(path: Path) -> list[Path]:
    """The files of a snapshot."""
    return weights_in(path) if path.is_dir() else [path]


def paths_of(source: Any) -> Iterator[Path]:
    """The snapshots in a file, a folder, a glob, or a list of these, in no order."""
    if not isinstance(source, (str, PathLike)):
        for part in source:
            yield from paths_of(part)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        yield from snapshots_in(path)
    elif path.exists():
        yield path
    else:
        matching = list(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        if not matching:
            raise ValueError(f"{source}: there is no such file")
        yield from paths_of(matching)


def snapshots_in(folder: Path) -> list[Path]:
    """The snapshots in a folder: the folders in it that are one, or itself, or its files."""
    entries = sorted(folder.iterdir())
    folders = [entry for entry in entries if entry.is_dir() and weights_in(entry)]
    if folders or weights_in(folder):
        return folders or [folder]
    files = [entry for entry in entries if entry.suffix in SUFFIXES and entry.is_file()]
    if files:
        return files
    if (folder / ".metadata").exists():
        raise ValueError(
            f"{folder}: of torch.distributed.checkpoint; make it one file: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE.pt"
        )
    names = ", ".join(entry.name for entry in entries[:5]) or "nothing"
    raise ValueError(f"{folder}: no {', '.join(SUFFIXES)} in it; it holds {names}")


def weights_in(folder: Path) -> list[Path]:
    """The files of the one snapshot that a folder is; [] where it is none."""
    for name in FOLDER_WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index}: no index of files") from error
            return [folder / part for part in sorted(names)]
    return []


def in_order(paths: Sequence[Path], listed: bool) -> list[Path]:
    """The paths that differ in numbers only, in the order of these.

    Where none has a number that others have elsewhere, a list is taken as it is. Others than most
    are left out with a warning. Raises ValueError where it is not clear which these are.
    """
    if not paths:
        raise ValueError("no files")
    families = defaultdict(list)
    for path in dict.fromkeys(paths):
        families[re.sub(r"\d+", "#", str(path))].append(path)
    first, *others = sorted(families.values(), key=len, reverse=True)
    if len(first) == 1 and others and listed:
        return list(dict.fromkeys(paths))
    if others and len(others[0]) == len(first):
        kinds = ", ".join(f"{kind} ({len(members)})" for kind, members in families.items())
        raise ValueError(f"which of these in which order? {kinds}; list the files, or use a glob")
    if others:
        left = ", ".join(path.name for family in others for path in family)
        warnings.warn(f"left out, unlike {first[0].name} in the name: {left}", stacklevel=4)
    return sorted(first, key=lambda path: [int(number) for number in re.findall(r"\d+", str(path))])


# ---------------------------------------------------------------------- N.pt, as the scripts write


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
        have = f"there are {abbreviate(listed)}" if there else f"there are {other_names(save_dir)}"
        raise FileNotFoundError(f"{save_dir} lacks the snapshots {abbreviate(missing)}; {have}")
    return [load_snapshot(save_dir / f"{number}.pt") for number in numbers]


def snapshot_numbers(save_dir: Path) -> list[int]:
    """The numbers of the snapshots that are there, the smallest first."""
    files = (file for file in save_dir.glob("*.pt") if file.stem.isdecimal() and file.is_file())
    return sorted(int(file.stem) for file in files if file.stem == str(int(file.stem)))


def other_names(save_dir: Path) -> str:
    """What a folder without snapshots N.pt holds in their place."""
    names = sorted(file.name for file in save_dir.glob("*") if file.suffix in SUFFIXES)
    return f"none that are called 0.pt, 1.pt, …, but {', '.join(names[:3])}" if names else "none"


def abbreviate(numbers: Sequence[int]) -> str:
    """A few numbers as they are, more by their ends."""
    return ", ".join(map(str, [*numbers[:2], "…", numbers[-1]] if len(numbers) > 3 else numbers))
