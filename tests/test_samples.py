"""--samples: the scripts on other tools' checkpoints. Oracle: the same run on --save-dir's N.pt."""

import json
from pathlib import Path

import pytest
import torch
from conftest import DIGITS
from safetensors.torch import save_file

import models
import train_pbfgs
import train_psgd
import train_sgd

OPTIONS = [*DIGITS, "--n_components", "3", "--params_end", "5", "--epochs", "2"]


@pytest.fixture
def checkpoints(sampled, tmp_path, monkeypatch) -> list[dict]:
    """The trajectory in ckpt/ as Lightning writes it, with an average, and in folders/ sorted."""
    monkeypatch.chdir(tmp_path)
    Path("ckpt").mkdir()
    for number in range(7):
        state = torch.load(sampled / f"{number}.pt")
        prefixed = {f"model.{name}": value for name, value in state.items()}
        average = {name: value + 1 for name, value in state.items()}
        torch.save({"state_dict": prefixed, "ema": average}, f"ckpt/epoch={number}.ckpt")
        Path(f"folders/checkpoint-{number}0").mkdir(parents=True)
        save_file(state, f"folders/checkpoint-{number}0/model.safetensors")


RUNS = {
    "ckpt": (train_psgd, ["--samples", "ckpt/*.ckpt", "--key", "state_dict"]),
    "folders": (train_pbfgs, ["--samples", "folders", "--start", "1"]),
}


@pytest.mark.parametrize("source", RUNS)
def test_checkpoints_of_other_tools_are_samples(source, checkpoints, copy):
    """Under other names and in another order: equal to the bit."""
    script, options = RUNS[source]
    row = script.main([*OPTIONS, *options, "--save-dir", "new", "--run", "run"])
    start = options[options.index("--start") :] if "--start" in options else []
    expected = script.main([*OPTIONS, *start, "--save-dir", str(copy), "--run", "run"])
    assert row | {"seconds": 0} == expected | {"seconds": 0}
    one, other = (torch.load(path / "run" / "model.th") for path in (Path("new"), copy))
    assert all(torch.equal(value, other["state_dict"][n]) for n, value in one["state_dict"].items())


def test_a_run_on_samples_is_recorded_and_resumed(checkpoints, monkeypatch, tmp_path):
    """Also from another directory, by --resume alone. Oracle: an unbroken run."""
    run = ["--save-dir", str(tmp_path / "new"), "--run"]
    source = ["--samples", "ckpt", "--key", "ema"]
    expected = train_psgd.main([*OPTIONS, *source, *run, "unbroken"])
    train_psgd.main([*OPTIONS[:-1], "1", *source, *run, "resumed"])
    recorded = json.loads(Path("new/resumed/config.json").read_text())
    assert recorded["arguments"]["samples"][6] == str(tmp_path / "ckpt" / "epoch=6.ckpt")
    assert recorded["samples"] == [0, 1, 2, 3, 4]
    monkeypatch.chdir("/")
    row = train_psgd.main(["--resume", "--epochs", "2", *run, "resumed"])
    assert row | {"seconds": 0} == expected | {"seconds": 0}


def test_the_basis_of_other_weights_in_the_same_files_is_another(checkpoints):
    """Both keys in one save dir. Oracle: the coordinates of a save dir of its own."""
    source = [*OPTIONS, "--samples", "ckpt", "--key"]
    train_psgd.main([*source, "state_dict", "--save-dir", "both", "--run", "one"])
    row = train_psgd.main([*source, "ema", "--save-dir", "both", "--run", "other"])
    assert (
        row["coordinates"]
        == train_psgd.main([*source, "ema", "--save-dir", "alone"])["coordinates"]
    )


REFUSED = {
    "--samples none": "--samples: none: there is no such file",
    "--samples ckpt": "ckpt/epoch=0.ckpt: several weights; allowed as key: state_dict, ema",
    "--samples folders --params_end 8": "--params_end: --samples are 7, numbered from 0",
    "--samples folders --start 7": "--start: --samples are 7, numbered from 0",
    "--samples folders --arch resnet20": "checkpoint-00: does not fit --arch resnet20",
    "--key ema": "--key: allowed with --pretrained PATH or --samples",
}


@pytest.mark.parametrize("options", REFUSED)
def test_mistakes_are_one_line(options, checkpoints, refused):
    """And nothing is written."""
    line = refused(train_psgd.main, [*OPTIONS, *options.split(), "--save-dir", "new"])
    assert REFUSED[options] in line
    assert not Path("new").exists()


def test_pretrained_weights_with_a_prefix_and_a_key(checkpoints, sampled):
    """Oracle: the network that was saved."""
    run = [*DIGITS, "--epochs", "1", "--evaluate"]
    row = train_sgd.main([*run, "--pretrained", "ckpt/epoch=6.ckpt", "--key", "state_dict"])
    assert row == train_sgd.main([*run, "--pretrained", str(sampled / "6.pt")])


def test_pretrained_weights_with_a_prefix_and_another_head(checkpoints, capsys):
    """As of a network fine-tuned by Lightning. Oracle: what is said to be left as it is."""
    state = models.build("resnet8", 7).state_dict()
    torch.save({f"net.{name}": value for name, value in state.items()}, "weights.pt")
    run = [*DIGITS, "--epochs", "1", "--save-dir", "new", "--pretrained", "weights.pt"]
    train_sgd.main(run)
    assert "left as initialized: linear.weight, linear.bias" in capsys.readouterr().out
    assert torch.equal(torch.load("new/0.pt")["conv1.weight"], state["conv1.weight"])
