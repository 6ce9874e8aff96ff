"""ImageNet's path: photographs at 224 pixels. Oracles: arithmetic, and one process for two."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, program
from PIL import Image
from sklearn.datasets import load_sample_images
from test_scale import torchrun

import train_pbfgs
import train_psgd
import train_sgd

# Without BatchNorm and dropout, so that two processes compute what one does.
MODULE = """
from torch import nn

def patches(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 16, 16, stride=16), nn.GELU(), nn.Conv2d(16, 32, 2, stride=2), nn.GELU(),
        nn.Flatten(), nn.Linear(32 * 49, num_classes),
    )
"""
pytestmark = pytest.mark.slow
SUBSPACE = ["--params_end", "9", "--params_stride", "2", "--n_components", "4", "--epochs", "2"]
COMMANDS = {
    ".": (train_sgd, ["--epochs", "4", "--lr", "0.002", "--sample-every", "2"]),
    "pbfgs": (train_pbfgs, SUBSPACE),
    "psgd": (train_psgd, [*SUBSPACE, "--lr", "0.01"]),
}


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """The options for a folder of two classes: 20 pieces to train of each photograph, 6 to test."""
    (tmp_path / "photographed.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    generator = torch.Generator().manual_seed(0)
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        image = Image.fromarray(photograph)
        for part, count in (("train", 20), ("val", 6)):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                x, y = (int(torch.randint(most, (), generator=generator)) for most in (340, 170))
                image.crop((x, y, x + 300, y + 250)).save(folder / f"{number}.jpg")
    return [
        "--datasets",
        "ImageNet",
        "--data-dir",
        str(tmp_path),
        "--arch",
        "photographed:patches",
        "--batch-size",
        "10",
        "--workers",
        "1",
    ]


def test_the_chain(photographs, tmp_path):
    """40 images in batches of 10: 4 steps an epoch, of which every second is sampled."""
    calls = []
    for script, options in COMMANDS.values():
        script.main([*photographs, *options, "--save-dir", str(tmp_path / "one")])
        if script is not train_psgd:  # what is its own is in test_scale.py
            argv = [*photographs, *options, "--save-dir", str(tmp_path / "two")]
            calls.append((script, argv))
    (tmp_path / "both.py").write_text(program(*calls))
    process = torchrun(tmp_path / "both.py")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["sample_epochs"] == [i / 2 for i in range(9)]
    assert len(list((tmp_path / "one").glob("[0-9]*.pt"))) == 9
    config = json.loads((tmp_path / "two" / "pbfgs" / "config.json").read_text())
    assert (config["samples"], config["processes"]) == ([0, 2, 4, 6, 8], 2)
    for name in (".", "pbfgs"):
        one, two = (
            torch.load(tmp_path / directory / name / "checkpoint.pt", weights_only=True)
            for directory in ("one", "two")
        )
        assert one["rows"][-1]["train_acc"] > 75
        for key, value in one["state_dict"].items():
            torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-3, atol=1e-4)


def test_a_network_of_torchvision(photographs, tmp_path, capsys):
    argv = [*photographs, "--arch", "resnet18", "--image-size", "96", "--epochs", "1"]
    argv += ["--save-dir", str(tmp_path / "run")]
    train_sgd.main([*argv, "--lr", "0.01", "--sample-every", "2"])
    assert "resnet18 (torchvision's), 11,177,538 parameters" in capsys.readouterr().out
    row = train_pbfgs.main([*argv, "--params_end", "3", "--n_components", "2"])
    assert 0 <= row["trials"] <= 30


def test_an_image_that_cannot_be_read_ends_the_program(photographs, tmp_path):
    """The error keeps the processes that decode, and they ignore the SIGTERM that Python sends."""
    (tmp_path / "train" / "china" / "0.jpg").write_text("no image")
    command = [sys.executable, "train_sgd.py", *photographs, "--workers", "2"]
    command += ["--save-dir", tmp_path / "run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "china/0.jpg: not a readable image" in done.stderr
