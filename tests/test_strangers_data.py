"""Label noise and subsets as people have them. Oracles: whole numbers, and noise made by hand."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import DIGITS

import train_sgd
import utils
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
