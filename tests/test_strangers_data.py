"""Label noise and subsets as people have them. Oracles: whole numbers, and noise made by hand."""

import json
import math
import random

import numpy as np
import pytest
import torch

import train_sgd
import utils
from dldr import PBFGS
from training.files import RunFiles
from training.subspaces import random_basis


@pytest.mark.parametrize("n", [1437, 50_000])
def test_a_share_is_exact(n):
    """Oracle: thousandths in whole numbers. Of CIFAR-10's labels, 45 of them lost one."""
    for thousandths in range(1001):
        assert utils.share(thousandths / 1000, n) == thousandths * n // 1000
    labels = torch.zeros(50, dtype=torch.long)
    kept, left = utils.subset(50, 0.58, 1)
    assert (len(kept), len(left)) == (29, 21)
    drawn = utils.corrupt_labels(labels, 0.58, 10**6, 1)  # hardly one stays 0 by chance
    assert int((drawn != labels).sum()) == 29


def test_a_random_basis_is_not_the_initialization():
    """Oracle: chance, a cosine of 1/√n. The stream of the first layer's weights was the same."""
    torch.manual_seed(3)
    initial = torch.nn.Linear(500, 20).weight.detach().flatten()
    row = random_basis(1, 10_000, 3, torch.float32, "cpu")[0]
    assert abs(torch.dot(row, initial) / initial.norm()) < 4 / math.sqrt(10_000)
    assert torch.equal(row, random_basis(1, 10_000, 3, torch.float32, "cpu")[0])


def test_metrics_are_json_whatever_a_test_gives(tmp_path):
    """Oracle: a parser that refuses NaN, which JSON does not have."""
    files = RunFiles.__new__(RunFiles)
    files.directory = tmp_path
    files.save_metrics([{"epoch": 1, "test_loss": math.nan, "test_acc": 10.0, "lr": math.inf}])
    line = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert row == {"epoch": 1, "test_loss": None, "test_acc": 10.0, "lr": None}


@pytest.mark.parametrize(("name", "folder"), [("MNIST", "MNIST/raw"), ("CIFAR100", "cifar-100-p")])
def test_where_a_dataset_is_looked_for_is_said(name, folder, tmp_path, monkeypatch, refused):
    """Oracle: torchvision's own folders. Here there is no network."""
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", None)
    (tmp_path / "data").mkdir()
    options = ["--datasets", name, "--data-dir", tmp_path / "data", "--save-dir", tmp_path / "run"]
    assert f"name the directory that has {folder}" in refused(train_sgd.main, options)


@pytest.mark.parametrize(
    "draw",
    [random.random, np.random.rand, lambda: float(torch.rand(()))],
    ids=["py", "np", "torch"],
)
def test_trials_of_a_step_draw_the_same(draw):
    """Oracle: one draw. Layers are dropped by any of the three."""
    z, draws = torch.nn.Parameter(torch.ones(2)), []

    def evaluate() -> torch.Tensor:
        draws.append(draw())
        return torch.tensor(float(len(draws)))  # never less, so all trials are made

    z.grad = torch.ones(2)
    PBFGS([z]).step(evaluate)
    assert len(draws) > 2
    assert len(set(draws)) == 1
    assert draw() not in draws
