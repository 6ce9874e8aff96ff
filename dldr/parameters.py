"""The parameters θ of a network as one vector (n,), and snapshots: its parameters at some time."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

RUNNING_STATISTICS = ("running_mean", "running_var")  # of BatchNorm


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """θ by name: the parameters with requires_grad; of a frozen model all that are real numbers.

    Raises ValueError for complex parameters, for those of lazy modules, which have no size yet, and
    for those with elements that share memory, which cannot be written to.
    """
    for name, p in model.named_parameters():
        if p.requires_grad and p.is_complex():
            raise ValueError(f"{name} is complex; allowed: real numbers (torch.view_as_real)")
        if nn.parameter.is_lazy(p):
            raise ValueError(f"{name} is lazy; give its module a size, or a first batch")
        if overlaps(p):
            raise ValueError(f"{name} is an expanded view; give it its own memory: .clone()")
    real = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    return {name: p for name, p in real.items() if p.requires_grad} or real


def overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, as those of an expanded view: it cannot be written to."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and step == 0 for size, step in pairs)


def flatten(model: nn.Module) -> Tensor:
    """θ as one vector (n,), a copy, in `named_parameters` order."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in trainable(model).values()])


def unflatten(vector: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """The vector (n,) cut into tensors named and shaped like the parameters in θ, copies.

    Raises ValueError where the vector is not as long as θ.
    """
    names, parameters = zip(*trainable(model).items(), strict=True)
    sizes = [parameter.numel() for parameter in parameters]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"a vector {tuple(vector.shape)} for {sum(sizes)} parameters")
    parts = zip(names, vector.split(sizes), parameters, strict=True)
    return {name: part.reshape(parameter.shape).clone() for name, part, parameter in parts}


@torch.no_grad()
def load_vector(vector: Tensor, model: nn.Module) -> None:
    """Write the vector (n,) into θ: what `flatten` read, back in place."""
    values = unflatten(vector, model)
    for name, parameter in trainable(model).items():
        parameter.copy_(values[name])


def average(snapshots: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of state dicts, BatchNorm's running statistics included.

    Whole numbers, booleans and what is no tensor have no mean, and are those of the last snapshot.
    A network with averaged weights needs its BatchNorm statistics recomputed:
    `torch.optim.swa_utils.update_bn`.
    """
    means = {}
    for name, last in snapshots[-1].items():
        if not isinstance(last, Tensor):  # an extra state
            means[name] = deepcopy(last)
        elif last.is_floating_point() or last.is_complex():
            wide = torch.complex128 if last.is_complex() else torch.float64
            home = home_of_float64(last.device)
            total = sum(snapshot[name].to(home, wide) for snapshot in snapshots)
            means[name] = (total / len(snapshots)).to(last)
        else:
            means[name] = last.clone()
    return means


def home_of_float64(device: Any) -> torch.device:
    """Where float64 is computed for tensors on this device: Apple's GPUs do not have it."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def parameter_names(snapshot: Mapping[str, Tensor]) -> list[str]:
    """The entries of a state dict that may be parameters: no running statistics, no whole numbers.

    Tied weights count once. Only a network can tell its other buffers apart: see `trainable`.
    """
    first: dict[tuple, str] = {}  # of the names of the same memory
    for name, value in snapshot.items():
        last = name.rpartition(".")[2]
        if last in (*RUNNING_STATISTICS, "_extra_state") or not isinstance(value, Tensor):
            continue
        if value.is_floating_point():
            first.setdefault((value.data_ptr(), value.shape), name)
    return list(first.values())
