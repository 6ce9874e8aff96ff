"""The published functions' recorded figures on a tiny float64 problem (golden/*.npz)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import Subspace


class Golden:
    """One recorded run: the subspace at its start, the batches, and what came of each step."""

    def __init__(self, name: str, network: torch.nn.Module) -> None:
        self.recorded = dict(np.load(Path(__file__).parent / "golden" / f"{name}.npz"))
        prefix = "param/"
        state = {
            key.removeprefix(prefix): torch.from_numpy(value)
            for key, value in self.recorded.items()
            if key.startswith(prefix)
        }
        network.load_state_dict(state)
        self.network = network
        self.subspace = Subspace(network, self["basis"]).train()
        self.batches = list(zip(self["images"].double(), self["labels"], strict=True))

    def __getitem__(self, name: str) -> Any:
        return torch.from_numpy(self.recorded[name])

    def check_end(self) -> None:
        """Compare the final parameters and BatchNorm statistics."""
        state = self.subspace.export()
        names = [name for name, _ in self.network.named_parameters()]
        ours = torch.cat([state[name].reshape(-1) for name in names])
        close(ours, self["final_parameters"])
        close(state["1.running_mean"], self["final_running_mean"])
        close(state["1.running_var"], self["final_running_var"])
        assert state["1.num_batches_tracked"] == len(self.batches)


def close(ours: torch.Tensor, recorded: torch.Tensor) -> None:
    """Equal to 1e-8."""
    torch.testing.assert_close(ours.detach(), recorded, rtol=0, atol=1e-8)
