"""The scripts on a device that is not the CPU, in processes of their own: see on_accelerator.py."""

import faulthandler
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


@pytest.mark.slow
@pytest.mark.skipif(TORCH < (2, 10), reason="torch takes devices made in Python from 2.10 on")
@pytest.mark.parametrize("part", ["numbers", "not numbers"])
def test_the_scripts_on_an_accelerator(part):
    """Torch cannot let go of it, and it would be `--device auto` of all tests that follow."""
    faulthandler.cancel_dump_traceback_later()  # pytest's limit, which each test there has itself
    file = ROOT / "tests" / "on_accelerator.py"
    command = [sys.executable, "-m", "pytest", "-n0", file, "-k", part]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
