"""Several processes under torchrun. Where there is only one, everything here costs nothing."""

import atexit
import os
import warnings
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dldr.distributed import all_mean, all_reduce, broadcast, world_size
from dldr.parameters import RUNNING_STATISTICS, overlaps
from training.errors import InputError, under_torchrun


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


def average_buffers(model: nn.Module) -> None:
    """Give all processes the same buffers: the mean of BatchNorm's statistics, else rank 0's."""
    if world_size() > 1:
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2] in RUNNING_STATISTICS:
                all_mean(buffer)
            elif not overlaps(buffer):
                sent = buffer.contiguous().view(-1)
                broadcast(sent.view(torch.uint8))  # gloo does not know all types
                buffer.copy_(sent.view(buffer.shape))
