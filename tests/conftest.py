"""What several test files need: small runs of the real scripts."""

import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import multiprocessing

import reporting.analysis
import reporting.plots
import train_pbfgs
import train_psgd
import train_sgd
import training.setup

ROOT = Path(__file__).parent.parent
FOLDERS = (ROOT, ROOT / "dldr", ROOT / "training", ROOT / "reporting")
SCRIPTS = (train_sgd, train_psgd, train_pbfgs)

# Sums are in the same order on every machine, so bit-equality means something; and the tests run on
# all cores as it is.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, also by what is started

DIGITS = ["--datasets", "digits", "--arch", "resnet8", "--batch-size", "256"]


def program(*calls: tuple[ModuleType, list[str]]) -> str:
    """Python that calls each script's main: importing torch takes longer than they do."""
    return "\n".join(
        f"import {script.__name__}; {script.__name__}.main({argv})" for script, argv in calls
    )


def in_processes(processes: int, work: Callable, *arguments: Any) -> None:
    """Call work(rank, *arguments) in so many processes, set up as torchrun does on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # One process imports torch and the scripts, and is forked from then on.
    multiprocessing.set_forkserver_preload(["conftest"])
    given = (processes, port, work, arguments)
    multiprocessing.start_processes(one_process, given, processes, start_method="forkserver")


def one_process(number: int, processes: int, port: int, work: Callable, arguments: tuple) -> None:
    """What each process of `in_processes` runs."""
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    work(number, *arguments)


def pytest_configure(config):
    """On the CPU, also where there is a GPU, whose sums vary from run to run; -m gpu compares."""
    if config.option.markexpr == "gpu":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it once; --deterministic
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=1, help="how often to kill the chain of runs")


def pytest_xdist_auto_num_workers(config):
    """One more than there are cores: some tests wait for processes that they have started."""
    return os.cpu_count() + 1


def pytest_collection_modifyitems(items):
    """The files that take longest come first: begun last, they would leave the other cores idle."""
    longest = ("test_scale", "test_scripts", "test_robust", "test_run_sh", "test_accelerator")
    items.sort(key=lambda item: item.path.stem not in longest)


@pytest.fixture(scope="session")
def sampled(tmp_path_factory) -> Path:
    """A save dir with a trajectory 0 … 6 of ResNet-8 on digits; tests write only subfolders."""
    save_dir = tmp_path_factory.mktemp("sampled")
    train_sgd.main([*DIGITS, "--epochs", "6", "--save-dir", str(save_dir)])
    return save_dir


@pytest.fixture
def copy(sampled, tmp_path) -> Path:
    """A save dir of the test's own with the sampled trajectory in it."""
    return shutil.copytree(sampled, tmp_path / "copy")


@pytest.fixture
def refused(capsys):
    """Call a script's main; returns its one line on stderr after exit code 2."""

    def call(main, argv) -> str:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in argv])
        lines = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2
        assert len(lines) == 1, lines
        return lines[0]

    return call


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made, but not drawn, which takes long."""
    monkeypatch.setattr(reporting.plots, "image", lambda figure, kind: b"")
    monkeypatch.setattr(reporting.analysis, "GRID", 2)


@pytest.fixture
def tiny():
    """A double-precision network with BatchNorm whose loss is smooth enough to check by hand."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 10),
    ).double()


@pytest.fixture
def batch():
    """Images (16, 3, 8, 8) and labels (16,) in double precision."""
    torch.manual_seed(1)
    return torch.randn(16, 3, 8, 8, dtype=torch.float64), torch.randint(10, (16,))


@pytest.fixture
def orthonormal():
    """Make a random basis (k, n) with orthonormal rows, float64."""

    def make(k: int, n: int, seed: int = 2) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q.T.contiguous()

    return make


@pytest.fixture
def settings_as_they_were():
    """torch's settings are the process's: what a test switches on must not stay on."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    training.setup.configure_torch(train_sgd.get_options().parse_args([]))


@pytest.fixture
def patch(monkeypatch):
    """Replace a function in every module of the project that has it under this name."""

    def call(name: str, value) -> None:
        own = [
            module
            for module in sys.modules.values()
            if Path(getattr(module, "__file__", None) or "/").parent in FOLDERS
        ]
        for module in own:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)

    return call
