"""The loss on points of a subspace: landscapes, and paths through them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dldr.distributed import progress_bar
from dldr.subspace import Subspace


@torch.no_grad()
def landscape(loss: Callable[[], Tensor], subspace: Subspace, points: Any) -> Tensor:
    """The loss at each of P points, (P,), on the subspace's device.

    `points` (P, k) are coordinates z, and `loss()` is any scalar of the network at the current z,
    such as `F.cross_entropy(subspace(images), labels)`. Afterwards z is what it was. Modes are
    left to the caller: BatchNorm's running statistics are those of one network, and mislead at
    others, so a landscape should use the statistics of the batch (`frozen_buffers`, training mode).

    Raises ValueError for points of other dimensions than the subspace.
    """
    z = subspace.coordinates
    points = torch.as_tensor(points).to(z)
    if points.dim() != 2 or points.shape[1] != len(z):
        raise ValueError(f"points {tuple(points.shape)}; allowed: (P, {len(z)})")
    before, losses = z.clone(), []
    try:
        for point in progress_bar(points, "loss landscape", len(points), unit="point"):
            z.copy_(point)
            losses.append(loss().detach().reshape(()))
    finally:
        z.copy_(before)
    return torch.stack(losses) if losses else z.new_empty(0)
