"""Several processes under torchrun. Where there is only one, everything here costs nothing."""

import atexit
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from errors import InputError, under_torchrun

RUNNING_STATISTICS = ("running_mean", "running_var")


def rank() -> int:
    """The number of this process; 0 where it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def restart_count() -> int:
    """How often torchrun has restarted all processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def init(device: str) -> None:
    """Join the process group where torchrun started this process, and take its GPU."""
    if not under_torchrun():
        return
    if device != "cpu":
        local, there = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
        if local >= there:
            raise InputError(f"--nproc_per_node: allowed: at most {there}, one process per GPU")
        torch.get_device_module(device).set_device(local)
    if not dist.is_initialized():
        store, number, size = next(dist.rendezvous("env://"))
        # After a restart the store still knows the processes that are gone.
        store = dist.PrefixStore(str(restart_count()), store)
        backend = "gloo"
        if device != "cpu":
            own = dist.Backend.default_device_backend_map.get(device, "gloo")
            backend = f"cpu:gloo,{device}:{own}"
        dist.init_process_group(backend, store=store, rank=number, world_size=size)
        atexit.register(dist.destroy_process_group)


def print0(text: str) -> None:
    """Print a line, on rank 0 only."""
    if rank() == 0:
        print(text, flush=True)


def progress_bar(iterable: Iterable | None, text: str, total: int, **settings: Any) -> tqdm:
    """A progress bar, on rank 0 and where stderr is a terminal."""
    disable = True if rank() else None
    return tqdm(iterable, text, total, disable=disable, leave=False, **settings)


def data_parallel(module: nn.Module) -> nn.Module:
    """The module with gradients averaged over all processes; that is its only traffic."""
    if world_size() == 1:
        return module
    # Gradients of 1 × 1 convolutions on channels_last images are copied once more, a small cost.
    warnings.filterwarnings("ignore", "Grad strides do not match")
    warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
    # Dropped layers and unused branches leave parameters without gradient. Looking for those walks
    # the graph at every step, so it is left out where the only parameter is always used.
    several = sum(parameter.requires_grad for parameter in module.parameters()) > 1
    with warnings.catch_warnings():  # broadcast_buffers has another name after torch 2.6
        warnings.simplefilter("ignore")
        # Buffers are not sent at every step: `average_buffers` does it before they are used.
        return DistributedDataParallel(
            module, broadcast_buffers=False, find_unused_parameters=several
        )


def all_reduce(value: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """`value`, changed in place to its sum (or minimum, …) over the processes."""
    if world_size() > 1:
        dist.all_reduce(value, operation)
    return value


def all_mean(value: Tensor) -> Tensor:
    """`value`, changed in place to its mean over the processes."""
    return all_reduce(value).div_(world_size()) if world_size() > 1 else value


def all_sum(totals: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The sum of each number over the processes as floats, in one message; this is a host sync."""
    tensors = {name: v.detach() for name, v in totals.items() if isinstance(v, Tensor)}
    values = dict(totals)
    if tensors:  # one transfer; float32 holds counts up to 2²⁴, and not every device has float64
        wide = torch.float64 in (v.dtype for v in tensors.values())
        kept = torch.float64 if wide else torch.float32
        stacked = torch.stack([v.to(kept) for v in tensors.values()])
        values |= zip(tensors, stacked.tolist(), strict=True)
    summed = all_reduce(torch.tensor(list(values.values()), dtype=torch.float64))
    return dict(zip(values, summed.tolist(), strict=True))


def broadcast(value: Tensor) -> Tensor:
    """`value`, changed in place to that of rank 0."""
    if world_size() > 1:
        dist.broadcast(value, 0)
    return value


def on_rank0(function: Callable[[], Any]) -> Any:
    """What `function` returns or raises on rank 0, in all processes; the others do not call it."""
    if world_size() == 1:
        return function()
    result: list = [None, None]
    if rank() == 0:
        try:
            result[0] = function()
        except Exception as error:
            result[1] = error
    dist.broadcast_object_list(result, device=torch.device("cpu"))
    if result[1] is not None:
        raise result[1]
    return result[0]


def in_turn(function: Callable[[], Any]) -> Any:
    """What `function` returns, called on rank 0 first, then on one process of each machine."""
    if world_size() == 1:
        return function()
    own = 0 if rank() == 0 else 1 if int(os.environ.get("LOCAL_RANK", 0)) == 0 else 2
    for turn in range(3):
        if turn == own:
            result = function()
        dist.barrier()
    return result


def local_columns(n: int) -> tuple[int, int]:
    """Which of n columns this process holds: [first, last)."""
    width = -(-n // world_size())
    return min(n, rank() * width), min(n, (rank() + 1) * width)


def average_buffers(model: nn.Module) -> None:
    """Give all processes the mean of the running statistics of normalization layers."""
    if world_size() > 1:
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2] in RUNNING_STATISTICS:
                all_mean(buffer)
