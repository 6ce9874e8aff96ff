"""Several processes that differ: in their disks, their rounding, what they are given.

Oracle: a run of processes that do not differ.
"""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from conftest import DIGITS, in_processes
from torch import nn

import dldr.distributed
import dldr.pbfgs
import models
import train_pbfgs
import train_psgd
import train_sgd
from dldr.reading import read_tensors
from dldr.trajectory import load_state_dict

pytestmark = pytest.mark.slow
SUBSPACE = ["--params_end", "3", "--n_components", "2", "--epochs", "2", "--lr", "0.1"]


class Odd(nn.Module):
    """A network with parameters that some or all forward passes leave out, and an integer one."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.sometimes = nn.Linear(192, 16), nn.Linear(16, 16)
        self.never, self.last = nn.Linear(16, 16), nn.Linear(16, classes)
        self.steps = nn.Parameter(torch.tensor(0), requires_grad=False)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.first(images.flatten(1)).tanh()
        # Each process draws for itself, so that one may take this part and the other not.
        if not self.training or torch.rand(()) < 0.5:
            hidden = hidden + self.sometimes(hidden).tanh()
        return self.last(hidden)


def drifting(B: torch.Tensor, s: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The update on a processor that rounds differently, and more than any does."""
    return update(B, s, y) * (1 + 1e-3 * dldr.distributed.rank())


update = dldr.pbfgs.update_inverse_hessian


def refusal(script, argv: list[str]) -> str:
    """What a script raises in this process, before its last line is printed."""
    with pytest.raises(ValueError) as error:
        script.main.__wrapped__(argv)
    return str(error.value)


def work(number: int, root: str) -> None:
    """One of two processes; the second has a disk of its own."""
    root = Path(root)
    own = [*DIGITS, "--save-dir", str(root / f"disk{number}" / "run")]
    shared = [*DIGITS, "--save-dir", str(root / "shared")]
    torch.manual_seed(number)
    train_sgd.main([*own, "--epochs", "2"])
    train_sgd.main([*own, "--epochs", "4", "--resume"])
    train_sgd.main([*shared, "--epochs", "4"])
    said = {"disks": refusal(train_psgd, [*own, *SUBSPACE])}

    dldr.pbfgs.update_inverse_hessian = drifting
    row = train_pbfgs.main([*shared, *SUBSPACE[:-2], "--batch-size", "100"])
    said["coordinates"] = json.dumps(row["coordinates"])
    dldr.pbfgs.update_inverse_hessian = update

    said["few"] = refusal(train_sgd, [*own, "--overwrite", "--smalldatasets", "0.002"])

    def download() -> None:
        time.sleep(0.5 * (number == 0))
        with (root / "turns.txt").open("a") as file:
            file.write(f"{number}\n")

    for local in ("0", str(number)):  # on two machines, and on one
        os.environ["LOCAL_RANK"] = local
        dldr.distributed.in_turn(download)

    models.build = lambda arch, classes, image_size: Odd(classes)
    odd = [*DIGITS, "--save-dir", str(root / "odd")]
    train_sgd.main([*odd, "--epochs", "2"])
    train_psgd.main([*odd, *SUBSPACE])
    train_pbfgs.main([*odd, *SUBSPACE[:-2]])
    (root / f"said{number}.txt").write_text("\n".join(f"{k}: {v}" for k, v in said.items()))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """What two processes left."""
    root = tmp_path_factory.mktemp("machines")
    in_processes(2, work, str(root))
    return root


def saved(directory: Path) -> dict:
    return read_tensors(directory / "checkpoint.pt")


def said(root: Path, what: str) -> list[str]:
    """Both processes' refusals."""
    lines = [line for i in (0, 1) for line in (root / f"said{i}.txt").read_text().splitlines()]
    return [line for line in lines if line.startswith(what)]


def test_a_run_resumes_where_only_the_first_machine_has_its_files(root):
    """Each process deciding for itself, two that went on from different weights were averaged."""
    assert not (root / "disk1" / "run" / "checkpoint.pt").exists()
    resumed, unbroken = saved(root / "disk0" / "run"), saved(root / "shared")
    for name, value in unbroken["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    keys = ("epoch", "train_loss", "test_acc")
    rows = [[row[key] for key in keys] for run in (resumed, unbroken) for row in run["rows"]]
    assert rows[:4] == rows[4:]


def test_samples_that_not_all_processes_see_are_refused(root):
    lines = said(root, "disks")
    assert len(lines) == 2
    assert all("a directory that all machines share" in line for line in lines)


def test_processors_that_round_differently_stay_together(root):
    """To the last bit, though the second one's inverse Hessian is off by a thousandth a step."""
    first, second = said(root, "coordinates")
    assert first == second


def test_fewer_images_than_processes_are_refused(root):
    lines = said(root, "few")
    assert len(lines) == 2
    assert all("2 processes in all for 2 training images" in line for line in lines)


def test_the_first_process_downloads_before_the_others_look(root):
    assert (root / "turns.txt").read_text().split() == ["0", "1"] * 2


@pytest.mark.parametrize("run", [".", "psgd", "pbfgs"])
def test_unused_parameters_integers_and_infinite_masks_are_trained_around(run, root):
    first, last = (load_state_dict(root / "odd" / f"{number}.pt") for number in (0, 2))
    state = saved(root / "odd" / run)["state_dict"]
    assert not torch.equal(state["sometimes.weight"], first["sometimes.weight"])
    assert torch.equal(last["never.weight"], first["never.weight"])
    assert state["steps"] == 0
    assert state["mask"].tolist() == [0, -torch.inf]
