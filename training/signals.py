"""How a run is told to stop: by a signal, heeded between two batches."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from dldr.distributed import all_reduce, world_size


class Interrupted(Exception):  # noqa: N818
    """A signal to stop came; raised between two batches."""


class Signals:
    """The SIGNALS that stop a run: the first stops it at the next batch, the second at once."""

    def __init__(self) -> None:
        self.number = 0  # of the first that came

    def handle(self, number: int, frame: Any) -> None:
        """What a signal does."""
        if self.number and world_size() == 1:  # torchrun sends a second one by itself
            raise SystemExit(128 + number)
        self.number = self.number or number

    def check(self) -> None:
        """Raise Interrupted in all processes where one got a signal."""
        if world_size() > 1:
            self.number = int(all_reduce(torch.tensor(self.number), dist.ReduceOp.MAX))
        if self.number:
            raise Interrupted

    def until(self, batches: Iterable, every: int = 1) -> Iterator:
        """The batches, until a signal comes.

        Several processes have to stop at the same batch: they ask each other at every `every`-th.
        """
        for number, batch in enumerate(batches):
            if world_size() == 1 or number % every == 0:
                self.check()
            yield batch
