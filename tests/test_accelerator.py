"""The scripts on a device that is not the CPU, in a process of its own: see on_accelerator.py."""

import subprocess
import sys

import pytest
from conftest import ROOT


def test_the_scripts_on_an_accelerator():
    """It would be `--device auto` of all tests that follow, and torch cannot let go of it."""
    pytest.importorskip(
        "torch.utils.backend_registration", reason="torch before 2.10", exc_type=ImportError
    )
    file = ROOT / "tests" / "on_accelerator.py"
    command = [sys.executable, "-m", "pytest", "-n0", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
