"""Several processes. Oracle: one process on the same global batches; bytes that are counted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import DIGITS, ROOT, in_processes, program
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import models
import train_pbfgs
import train_psgd
import train_sgd
import training.distributed
import training.run
import training.setup
from training.subspaces import load_basis

pytestmark = pytest.mark.slow
SUBSPACE = ["--params_end", "4", "--n_components", "3", "--epochs", "2", "--batch-size", "200"]
COMMANDS = {
    ".": (train_sgd, ["--epochs", "3", "--lr", "0.02"]),
    "psgd": (train_psgd, [*SUBSPACE, "--lr", "0.1", "--weight-decay", "1e-3"]),
    "pbfgs": (train_pbfgs, SUBSPACE),
    "residual": (train_pbfgs, [*SUBSPACE, "--alpha", "0.01", "--run", "residual"]),
    "schmidt": (
        train_pbfgs,
        [*SUBSPACE, "--basis", "schmidt", "--basis-dtype", "bfloat16", "--run", "schmidt"],
    ),
    "random": (train_psgd, [*SUBSPACE, "--basis", "random", "--lr", "0.1", "--run", "random"]),
    "several": (train_pbfgs, [*SUBSPACE, "--accumulate", "2", "--run", "several"]),
}

SIZE = 8 * 27 + 8 + 10 * 288 + 10  # n of `plain_network`
NORMALIZED = (".", "psgd", "pbfgs")  # what is run with BatchNorm, too


def plain_network(arch: str, classes: int, image_size: int) -> nn.Module:
    """A network without BatchNorm: its gradient of a batch is the mean of those of the parts."""
    layers = [nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, classes)]
    return nn.Sequential(*layers)


def counting(sent: list) -> None:
    """Note the bytes of what goes through the collectives."""
    all_reduce, parallel = dist.all_reduce, training.distributed.data_parallel

    def counted_all_reduce(tensor, *rest, **options):
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *rest, **options)

    def counted_parallel(module):
        wrapped = parallel(module)
        if wrapped is not module:
            wrapped.register_comm_hook(None, allreduce_hook)  # it calls dist.all_reduce
        return wrapped

    dist.all_reduce = counted_all_reduce
    train_sgd.data_parallel = train_psgd.data_parallel = counted_parallel


def work(number: int, directory: str, network: bool) -> None:
    """One of several processes: all the commands."""
    if network:
        models.build = plain_network
    sent: list = []
    counting(sent)
    bytes_of = {}
    for name, (script, options) in COMMANDS.items():
        if not network and name not in NORMALIZED:
            continue
        sent.clear()
        script.main([*DIGITS, *options, "--save-dir", directory])
        bytes_of[name] = list(sent)
    if number == 0:
        torch.save(bytes_of, f"{directory}/bytes.pth")


def run(directory, processes: int, network: bool = True):
    """The save dir after all commands in so many processes."""
    directory.mkdir()
    in_processes(processes, work, str(directory), network)
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All commands in 1 and 3 processes, of a network without BatchNorm."""
    root = tmp_path_factory.mktemp("scale")
    return {processes: run(root / str(processes), processes) for processes in (1, 3)}


@pytest.mark.parametrize("name", COMMANDS)
def test_several_processes_train_as_one_does(name, runs):
    one, several = (
        torch.load(runs[count] / name / "checkpoint.pt", weights_only=True) for count in (1, 3)
    )
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(several["state_dict"][key], value, rtol=1e-3, atol=1e-4)
    if name != ".":
        z = [saved["states"]["model"]["coordinates"] for saved in (one, several)]
        torch.testing.assert_close(z[1], z[0], rtol=1e-3, atol=1e-4)
        assert z[0].norm() > 0.01
    for row, other in zip(one["rows"], several["rows"], strict=True):
        for key in ("train_loss", "train_acc", "test_loss", "test_acc"):
            assert other[key] == pytest.approx(row[key], rel=1e-3, abs=1e-3)
        assert other.get("trials") == row.get("trials")


def test_several_processes_find_the_same_basis(runs):
    """Also one in bfloat16."""
    for name in ("psgd", "schmidt"):
        one, other = (load_basis(runs[count] / name / "basis.npz", SIZE) for count in (1, 3))
        torch.testing.assert_close(other.ratios, one.ratios, rtol=1e-4, atol=0)
        torch.testing.assert_close(other.vectors, one.vectors, rtol=0.01, atol=1e-4)


def test_a_step_in_the_subspace_sends_the_coordinates_and_little_else(runs):
    """1,437 images in batches of 200: 8 steps an epoch, 2 epochs; k = 3."""
    sent = torch.load(runs[3] / "bytes.pth", weights_only=True)
    assert sent["."].count(4 * SIZE) <= 3 * 6, "256 images a batch, the last one is 157"
    assert 0 < sent["psgd"].count(4 * 3) <= 2 * 8
    assert max(sent["psgd"]) < 200, "the rest: sums of an epoch, signals"
    assert 0 < sent["pbfgs"].count(4 * 3) <= 2 * 8
    assert max(sent["pbfgs"]) < 200
    assert sent["residual"].count(4 * SIZE) <= 2 * 8
    rows = torch.load(runs[3] / "pbfgs" / "checkpoint.pt", weights_only=True)["rows"]
    trials = sum(row["trials"] + 1 for row in rows) * 8
    # One for the loss at the start of each step, one a trial.
    assert sent["pbfgs"].count(4) <= trials + 16 + 1


def test_with_batchnorm_the_statistics_are_shared(tmp_path):
    run(tmp_path / "run", 2, network=False)
    for name in NORMALIZED:
        rows = torch.load(tmp_path / "run" / name / "checkpoint.pt", weights_only=True)["rows"]
        assert rows[-1]["test_acc"] > 15
    args = training.setup.parse_args(
        train_sgd.get_options(), [*DIGITS, "--save-dir", str(tmp_path / "run")]
    )
    row = training.run.evaluate_only(args)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["rows"][-1]
    assert row["test_acc"] == pytest.approx(saved["test_acc"], abs=1e-3), "all tested the same"


def torchrun(*arguments, restarts: int = 0) -> subprocess.Popen:
    """A real torchrun of two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "--max-restarts", str(restarts), "--", *arguments]
    command = [str(part) for part in command]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, **pipe)


def wait_for(file, process) -> None:
    """Until there is the file."""
    deadline = time.monotonic() + 200
    while not file.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def one_worker(process) -> int:
    """The process id of the second process that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return max(map(int, children))


LONG = [*DIGITS, "--smalldatasets", "0.4", "--batch-size", "32", "--save-every", "1", "--save-dir"]


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_killed_process_ends_the_job_or_restarts_it(restarts, tmp_path):
    command = ["train_sgd.py", *LONG, tmp_path / "run", "--epochs", "12"]
    process = torchrun(*command, restarts=restarts)
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    os.kill(one_worker(process), signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    if not restarts:
        assert process.returncode == 1
        assert "between processes" in output
        assert "SIGKILL" in output
        assert "processes" in output
        return
    assert process.returncode == 0, output
    assert "epochs are done" in output
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == list(range(1, 13))


def test_sigterm_saves_and_the_run_resumes(tmp_path, monkeypatch):
    """Oracle: weights and rows of an unbroken run of two processes. A refusal is one line."""
    run, whole = ([*LONG, str(tmp_path / name), "--epochs", "8"] for name in ("run", "whole"))
    process = torchrun("train_sgd.py", *run)
    wait_for(tmp_path / "run" / "1.pt", process)
    process.terminate()
    output, _ = process.communicate(timeout=200)
    assert "stopped by SIGTERM; the same command with --resume continues" in output
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert len(saved["rows"]) < 8
    process = torchrun("train_sgd.py", *run)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert len([line for line in output.splitlines() if "holds a run" in line]) == 1
    calls = (train_sgd, [*run, "--resume"]), (train_sgd, whole)
    (tmp_path / "both.py").write_text(program(*calls))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    process = torchrun(tmp_path / "both.py")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert len([line for line in output.splitlines() if "epoch   8/8" in line]) == 2
    assert "FutureWarning" not in output
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2
    whole, broken = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("whole", "run")
    )
    for row, other in zip(whole["rows"], broken["rows"], strict=True):
        assert other["epoch"] == row["epoch"]
        assert other["train_acc"] == pytest.approx(row["train_acc"], abs=0.3)
        assert other["train_loss"] == pytest.approx(row["train_loss"], rel=1e-2)
    model = models.build("resnet8", 10)
    for name, _ in model.named_parameters():
        pair = [saved["state_dict"][name] for saved in (broken, whole)]
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4)
