"""Reads the weights in files of any tool. Whatever code a file holds, none of it is run."""

import pickle
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

DEPTH = 4  # how deep in a file weights are looked for: callbacks, EMA, state_dict, …
# How files begin that are often taken for weights, and what they are.
FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; `git lfs pull` brings it",
    b"<": "an HTML page or XML, as a download that failed leaves",
    b"{": "JSON",
    b"\x89HDF": "HDF5, as Keras writes it; save a state_dict() with torch.save",
    b"\x93NUMPY": "a NumPy array; save a state_dict() with torch.save",
    b"\x1f\x8b": "compressed with gzip; unpack it",
}

# ------------------------------------------------------------------------------ without code


class Inert(dict):
    """What stands for any class, function or object in a file: it takes anything, does nothing.

    `state` is what the object would have set itself to: of a module, its parameters.
    """

    state: Any = None
    dump_patches = False  # torch asks classes of whole modules in its old format

    def __new__(cls, *args: Any, **options: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **options: Any) -> "Inert":
        return Inert()

    def append(self, value: Any) -> None:
        """What lists do; sets `add`."""

    extend = add = append
    __hash__ = object.__hash__


class Trusted:
    """A function that files may call. They cannot change it, as they could a function of torch."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        pass


# All that files may call: what makes a tensor of a storage, less requires_grad, hooks, subclasses.
# Of classes only those that are not written in Python: no file can set their attributes.
TRUSTED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor"): Trusted(torch._utils._rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Trusted(
        lambda storage, offset, size, stride, *_: torch._utils._rebuild_tensor(
            storage, offset, size, stride
        )
    ),
    ("torch._utils", "_rebuild_parameter"): Trusted(lambda data, *_: data),
    ("torch._utils", "_rebuild_parameter_with_state"): Trusted(lambda data, *_: data),
    ("torch._tensor", "_rebuild_from_type_v2"): Trusted(
        lambda function, kind, arguments, state: function(*arguments)
    ),
}


class InertUnpickler(pickle.Unpickler):
    """An unpickler that knows TRUSTED, and an inert class for every other name."""

    def find_class(self, module: str, name: str) -> Any:
        return TRUSTED.get((module, name)) or type(name, (Inert,), {"__module__": module})


class InertPickle:
    """What `torch.load` takes for the module pickle. torch finds storages by itself."""

    Unpickler = InertUnpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return InertUnpickler(file, **options).load()


# ------------------------------------------------------------------------------------- files


def read_tensors(file: Path, mmap: bool = False) -> Any:
    """What torch.save or safetensors wrote, on the CPU, with `Inert` in place of other objects.

    With `mmap` tensors are read when they are used, except from files of torch < 1.6. Raises
    ValueError that names the file, and says what it is where it is none of these.
    """
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    if what := foreign(file):
        raise ValueError(f"{file}: {what}")
    try:
        if is_safetensors(file):
            return safetensors.torch.load_file(file)
        with warnings.catch_warnings():  # of old formats, and of classes whose source has changed
            warnings.simplefilter("ignore")
            options = {"mmap": mmap and is_zip(file), "pickle_module": InertPickle}
            return torch.load(file, "cpu", weights_only=False, **options)
    except Exception as error:  # a broken file makes torch raise any of half a dozen kinds
        why = f"truncated or corrupt ({type(error).__name__})"
        raise ValueError(f"{file}: cannot be read, {why}") from error


def start_of(file: Path) -> bytes:
    """The first bytes of a file."""
    with file.open("rb") as stream:
        return stream.read(32)


def is_zip(file: Path) -> bool:
    """Whether it is of torch ≥ 1.6, or else a zip archive."""
    return start_of(file).startswith(b"PK")


def is_safetensors(file: Path) -> bool:
    """Whether it begins as these files do: the length of a header in JSON, and the header."""
    return start_of(file)[8:10] == b'{"'


def foreign(file: Path) -> str | None:
    """What a file is that is not of torch.save or safetensors; None if it is one of these."""
    start = start_of(file)
    if not start:
        return "empty"
    if is_safetensors(file):
        return None
    for beginning, what in FOREIGN.items():
        if start.lstrip().startswith(beginning):
            return what
    if is_zip(file):
        return foreign_archive(file)
    if tarfile.is_tarfile(file):
        return "a tar archive; unpack it"
    if not start.startswith(b"\x80"):
        return "not a file of torch.save or safetensors"
    # torch < 1.6 wrote its magic number first, in a pickle.
    known = start[2:].startswith(pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)[2:])
    return None if known else "a pickle, but not of torch.save; save a state_dict() with that"


def foreign_archive(file: Path) -> str | None:
    """What a zip archive is; None for one of torch.save."""
    try:  # what torch.load reads it with: it would run TorchScript
        names = torch._C.PyTorchFileReader(str(file)).get_all_records()
    except RuntimeError:
        names = None
    if not zipfile.is_zipfile(file):
        return "truncated"
    if names is None or "data.pkl" not in names:
        return "a zip archive, but not of torch.save"
    if "constants.pkl" in names:
        return "TorchScript, which is code; save the state_dict() of the module"
    return None


# ----------------------------------------------------------------------------------- weights


def read_states(file: Path, mmap: bool = False) -> dict[str, dict[str, Tensor]]:
    """The state dicts in a file by the keys to them; raises ValueError where there is none."""
    value = read_tensors(file, mmap)
    try:
        states = {key: state for key, state in find_states(value) if state}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if not states:
        items = contents(value)
        what = ", ".join(map(str, list(items)[:8])) or type(value).__name__
        optimizer = "the state of an optimizer, " if "param_groups" in items else ""
        raise ValueError(f"{file}: holds {optimizer}no weights; it holds {what}")
    return states


def find_states(value: Any, path: str = "", depth: int = DEPTH) -> Iterator[tuple[str, dict]]:
    """The state dicts in what a file holds, and of whole modules, each with the keys to it.

    Optimizers are left out, and in state dicts what is neither a tensor nor a module's extra state.
    Raises ValueError for a state dict with tensors of a kind that cannot be read.
    """
    items = contents(value)
    if "_parameters" in items and "_modules" in items:
        yield path, dict(module_state(items))
        return
    if not depth or "param_groups" in items:
        return
    deeper = [
        state
        for name, part in items.items()
        if not is_extra_state(name)
        for state in find_states(part, f"{path}.{name}" if path else str(name), depth - 1)
    ]
    yield from deeper
    if not deeper and is_state(items):
        yield (
            path,
            {
                name: part
                for name, part in items.items()
                if isinstance(part, Tensor) or is_extra_state(name)
            },
        )


def is_extra_state(name: Any) -> bool:
    """Whether an entry of a state dict is what a module's `get_extra_state` returned."""
    return str(name).rpartition(".")[2] == "_extra_state"


def contents(value: Any) -> Mapping:
    """The entries of a dict, or the attributes of an object."""
    if isinstance(value, Inert) and isinstance(value.state, dict):
        return value | value.state
    return value if isinstance(value, Mapping) else {}


def is_state(items: Mapping) -> bool:
    """Whether it holds real numbers by name, as a state dict does."""
    tensors = [part for part in items.values() if isinstance(part, Tensor)]
    real = [part for part in tensors if part.is_floating_point()]
    if not real or not all(isinstance(name, str) for name in items):
        return False
    for name, part in items.items():
        if type(part).__name__.startswith("_rebuild"):  # of a sparse tensor, for one
            raise ValueError(f"{name} is a tensor of a kind that is not read: {type(part)}")
    # Not what callbacks remember: a score beside names of files, say.
    return any(part.dim() for part in real) or len(tensors) == len(items)


def module_state(items: Mapping, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The state dict of a whole module, from its attributes."""
    hidden = items.get("_non_persistent_buffers_set") or ()
    for name, value in (items["_parameters"] | items.get("_buffers", {})).items():
        if isinstance(value, Tensor) and name not in hidden:
            yield prefix + name, value
    for name, module in items["_modules"].items():
        if "_parameters" in contents(module):
            yield from module_state(contents(module), f"{prefix}{name}.")
