"""Several processes of torch.distributed. Where there is only one, all of this costs nothing."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm


def rank() -> int:
    """The number of this process; 0 where it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(value: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """`value`, changed in place to its sum (or minimum, …) over the processes."""
    if world_size() > 1:
        dist.all_reduce(value, operation)
    return value


def all_mean(value: Tensor) -> Tensor:
    """`value`, changed in place to its mean over the processes."""
    return all_reduce(value).div_(world_size()) if world_size() > 1 else value


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


def print0(text: str) -> None:
    """Print a line, on rank 0 only."""
    if rank() == 0:
        print(text, flush=True)


def progress_bar(iterable: Iterable | None, text: str, total: int, **settings: Any) -> tqdm:
    """A progress bar, on rank 0 and where stderr is a terminal."""
    disable = True if rank() else None
    return tqdm(iterable, text, total, disable=disable, leave=False, **settings)
