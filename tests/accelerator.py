"""A stand-in for a GPU, for tests: tensors on a device of their own, computed by CPU kernels.

Importing this module registers the device `standin`, for the whole process, in the slot that torch
keeps for backends of others. Its tensors lie in ordinary memory, and each operation is the CPU's
kernel on the same memory: values are the CPU's to the bit. As on CUDA, tensors of two devices do
not mix, numbers (0-dim tensors) and CPU indices aside. `recorded` tells every launch, copy and
host sync, and the line that caused it.
"""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils.backend_registration import (  # an ImportError before torch 2.10
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "standin"
ROOT = Path(__file__).parent.parent
PACKAGES = Path(torch.__file__).parent.parent  # may lie in the project, as .venv
CPU, EXTERNAL = 1, 12  # kDLCPU and kDLExtDev of dlpack.h
# They return tensors, but the host has to wait for their shape, or for what LAPACK says.
WAITING = ("nonzero", "masked_select", "_unique2", "_linalg_eigh")
# torch would take these apart before they get here, as no accelerator has them.
WHOLE = ("copy_", "convolution", "convolution_backward")
HALVED = ("conv2d", "linear", "mm", "addmm", "matmul")  # what autocast runs in bfloat16


class Event(NamedTuple):
    """What the device is asked for: a launch, a copy to it, or a sync, where the host waits."""

    kind: str
    name: str  # of the operation
    line: str  # file:line of the project, or "backward"


class Module(_DummyBackendModule):
    """What torch expects of `torch.standin`, and the events while they are recorded."""

    events: list[Event] | None = None

    def get_rng_state(self, device: torch.device) -> Tensor:
        """Nothing: all random numbers are drawn by the CPU's generator."""
        return torch.empty(0)

    def set_rng_state(self, state: Tensor, device: torch.device) -> None:
        """Nothing to set."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """The types that autocast takes."""
        return [torch.bfloat16]


MODULE = Module()


@contextlib.contextmanager
def recorded() -> Iterator[list[Event]]:
    """The events of the `with` block."""
    MODULE.events = events = []
    try:
        yield events
    finally:
        MODULE.events = None


def record(kind: str, name: str) -> None:
    """Note an event, with the innermost line of the project that is running."""
    if MODULE.events is None:
        return
    frame = sys._getframe()
    while frame and not is_own(frame.f_code.co_filename):
        frame = frame.f_back
    line = "backward"  # torch runs it in a thread of its own
    if frame:
        line = f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
    MODULE.events.append(Event(kind, name, line))


@functools.cache
def is_own(file: str) -> bool:
    """Whether a file is the project's, this one aside."""
    path = Path(file)
    return file != __file__ and path.is_relative_to(ROOT) and not path.is_relative_to(PACKAGES)


def parts(value: Any) -> Sequence:
    """The parts of a list, or the value alone: arguments and results nest no deeper."""
    return value if isinstance(value, list | tuple) else [value]


def is_here(value: Any) -> bool:
    """Whether it is a tensor on this device."""
    return isinstance(value, Tensor) and value.device.type == NAME


pointer = ctypes.pythonapi.PyCapsule_GetPointer
pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def relabel(tensor: Tensor, device: int) -> Tensor:
    """A tensor on the other device, in the same memory."""
    capsule = torch._C._to_dlpack(tensor)
    ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = device
    return torch._C._from_dlpack(capsule)


def to_cpu(value: Any) -> Any:
    """An argument as the CPU's kernel takes it; it may resize those that are empty."""
    if isinstance(value, list | tuple):
        return [to_cpu(part) for part in value]
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if not is_here(value):
        return value
    return relabel(value, CPU) if value.numel() else torch.empty(value.shape, dtype=value.dtype)


def to_device(value: Any) -> Any:
    """A result of the CPU's kernel as it lies on this device."""
    if isinstance(value, list | tuple):
        return type(value)(map(to_device, value))
    return relabel(value, EXTERNAL) if isinstance(value, Tensor) else value


def redispatch(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """The CPU's kernel on tensors of this device: for what looks at no value."""
    return operation.redispatch(DispatchKeySet(DispatchKey.CPU), *args, **kwargs)


def check_devices(operation: Any, arguments: Mapping[str, Any], written: Sequence[str]) -> None:
    """RuntimeError, as on CUDA, for arguments on the CPU."""
    for name, value in arguments.items():
        for tensor in parts(value):
            if not isinstance(tensor, Tensor) or is_here(tensor):
                continue
            if name == "indices" and is_here(arguments["self"]):
                record("copy", str(operation))
            elif tensor.dim() or name in written:
                raise RuntimeError(
                    f"{operation}: Expected all tensors to be on the same device; {name} is not"
                )


def run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Every operation on this device: the CPU's, in the same memory."""
    schema, name = operation._schema, operation._schema.name.removeprefix("aten::")
    aliases = [result.alias_info for result in schema.returns if result.alias_info]
    if any(not alias.is_write for alias in aliases):  # a view
        return redispatch(operation, *args, **kwargs)
    arguments = dict(zip([a.name for a in schema.arguments], args, strict=False)) | kwargs
    written = [a.name for a in schema.arguments if a.alias_info and a.name in arguments]
    if name != "copy_":
        check_devices(operation, arguments, written)
    moved = {one: to_cpu(value) for one, value in arguments.items()}
    if name == "resize_":  # its content is lost, which is more than torch promises
        moved["self"] = torch.empty(0, dtype=args[0].dtype)
    results = operation(**moved)

    if name in WAITING or not all(isinstance(v, Tensor | None) for v in parts(results)):
        record("sync", name)
    elif name == "copy_" and not all(map(is_here, args[:2])):
        record("copy" if is_here(args[0]) else "sync", name)
    elif not name.startswith(("empty", "resize")):
        record("launch", name)
    for own, now in ((arguments[one], moved[one]) for one in written):
        if isinstance(own, Tensor) and own.shape != now.shape:
            memory = to_device(now).untyped_storage()
            settings = torch.ops.aten.set_.source_Storage_storage_offset
            redispatch(settings, own, memory, 0, now.shape, now.stride())
    if aliases:
        own = tuple(arguments[one] for one in written)
        return own if len(own) > 1 else own[0]
    return to_device(results)


def autocast(operation: Any, *args: Any) -> Any:
    """The operation in bfloat16, as under autocast on the CPU."""
    half = [v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for v in args]
    with torch._C._ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.AutocastPrivateUse1)):
        return operation(*half)


def deepcopied(tensor: Tensor, memo: dict) -> Tensor:
    """What copy.deepcopy makes of a tensor: torch would clone a storage that is not there."""
    if not is_here(tensor) or id(tensor) in memo:
        return deepcopy(tensor, memo)
    return memo.setdefault(id(tensor), tensor.detach().clone())


_setup_privateuseone_for_python_backend(NAME, MODULE)
deepcopy, Tensor.__deepcopy__ = Tensor.__deepcopy__, deepcopied
# Kernels are there as long as these are.
LIBRARIES = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
LIBRARIES[0].fallback(run, "PrivateUse1")
LIBRARIES[0].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for whole in WHOLE:
    kernel = functools.partial(run, getattr(torch.ops.aten, whole).default)
    LIBRARIES[1].impl(whole, kernel, "PrivateUse1")
for halved in HALVED:
    kernel = functools.partial(autocast, getattr(torch.ops.aten, halved))
    LIBRARIES[1].impl(halved, kernel, "AutocastPrivateUse1")
