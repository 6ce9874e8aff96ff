"""Strangers' networks in two processes, as torchrun starts them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DIGITS, ROOT, in_processes

import train_sgd

pytestmark = pytest.mark.slow

FEW = [*DIGITS, "--epochs", "2", "--smalldatasets", "0.4", "--lr", "0.02"]
ONE_EACH = ["--test-batch-size", "1"]


def work(number: int, root: str) -> None:
    """One of two processes; of test batches of one image, one process would have none."""
    by_hand = ["--arch", "strangers:ByHand", "--save-dir", f"{root}/by_hand"]
    train_sgd.main([*FEW, *by_hand, *ONE_EACH])


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """What two processes left."""
    root = tmp_path_factory.mktemp("processes")
    in_processes(2, work, str(root))
    return root


def test_what_is_saved_is_what_was_tested(root):
    """Oracle: the saved network, tested by one process. Each has seen other images."""
    directory = root / "by_hand"
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    options = ["--arch", "strangers:ByHand", "--save-dir", str(directory)]
    alone = train_sgd.main([*FEW, *options, "--evaluate"])
    assert rows[-1]["test_loss"] == pytest.approx(alone["test_loss"], rel=1e-5)
    weights = ["--pretrained", str(directory / "1.pt")]
    alone = train_sgd.main([*FEW, *options, "--evaluate", *weights])
    assert rows[0]["test_loss"] == pytest.approx(alone["test_loss"], rel=1e-5)


def test_torchrun_prints_no_warnings(tmp_path):
    """DDP's, on parameters that could have been unused, comes from C++ on every rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", "29533", str(ROOT / "train_sgd.py"), *FEW, "--epochs", "1"]
    done = subprocess.run(
        [*command, "--save-dir", tmp_path], capture_output=True, text=True, check=True
    )
    assert "arning" not in done.stderr
