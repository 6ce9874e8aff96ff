"""A resumed run is the run that it continues. Oracle: an unbroken run, and config.json."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS

import train_psgd
import train_sgd
from dldr.reading import read_tensors

SUBSPACE = ["--params_end", "4", "--epochs", "1"]


def config(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def rows(directory: Path) -> list[dict]:
    """The metrics, less the seconds."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    """A run of two epochs whose options are not the defaults."""
    save_dir = tmp_path_factory.mktemp("two") / "run"
    options = ["--lr", "0.02", "--train-seed", "5", "--no-augment", "--schedule", "cosine"]
    train_sgd.main([*DIGITS, *options, "--epochs", "2", "--save-dir", str(save_dir)])
    return save_dir


def test_a_resumed_run_has_the_options_that_it_had(two_epochs, tmp_path, capsys):
    """Resumed with --epochs alone, it is bit-equal to the run with every option resumed."""
    capsys.readouterr()
    lasting = [*DIGITS, "--lr", "0.02", "--train-seed", "5", "--no-augment"]
    commands = {"short": [], "whole": [*lasting, "--schedule", "cosine"]}
    for name, options in commands.items():
        run = shutil.copytree(two_epochs, tmp_path / name)
        train_sgd.main([*options, "--resume", "--epochs", "3", "--save-dir", str(run)])
        output = capsys.readouterr().out
        assert "--epochs: 3 from here on, before it was 2" in output
        assert "--lr: " not in output
    assert rows(tmp_path / "short") == rows(tmp_path / "whole")
    last = [read_tensors(tmp_path / name / "3.pt") for name in commands]
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])
    session = config(tmp_path / "short")["sessions"][-1]
    assert session["changed"] == {"epochs": [2, 3]}
    assert session["arguments"]["batch_size"] == 256


def test_a_finished_cosine_schedule_that_goes_on_says_that_the_rate_jumps(
    two_epochs, tmp_path, capsys
):
    """By hand: half a cosine from 0.02 is 0 after two of two epochs, a quarter after two of 3."""
    run = shutil.copytree(two_epochs, tmp_path / "run")
    train_sgd.main(["--resume", "--epochs", "3", "--save-dir", str(run)])
    assert "learning rate jumps from 0 to 0.005" in capsys.readouterr().out


def test_without_epochs_a_finished_run_stays_finished(two_epochs, tmp_path):
    run = shutil.copytree(two_epochs, tmp_path / "run")
    assert train_sgd.main(["--resume", "--save-dir", str(run)])["epoch"] == 2
    assert len(config(run)["sessions"]) == 1


def test_milestones_take_the_place_of_a_schedule(two_epochs, tmp_path):
    run = shutil.copytree(two_epochs, tmp_path / "run")
    options = ["--resume", "--epochs", "3", "--milestones", "2", "--save-dir", str(run)]
    assert train_sgd.main(options)["lr"] == pytest.approx(0.002)
    assert config(run)["sessions"][-1]["changed"]["schedule"] == ["cosine", None]


def test_a_run_is_resumed_though_its_trajectory_has_grown(copy, capsys):
    """Without options it takes the samples that it had. Oracle: its first session."""
    (copy / "5.pt").rename(copy / "later")
    (copy / "6.pt").unlink()
    train_psgd.main([*DIGITS, "--epochs", "1", "--save-dir", str(copy)])
    (copy / "later").rename(copy / "5.pt")
    train_psgd.main(["--resume", "--epochs", "2", "--save-dir", str(copy)])
    first, last = (session["arguments"] for session in config(copy / "psgd")["sessions"])
    assert (last["params_end"], last["n_components"]) == (5, 4)
    assert first["n_components"] == last["n_components"]
    assert config(copy / "psgd")["samples"] == [0, 1, 2, 3, 4]


def test_a_checkpoint_of_another_basis_is_refused(copy, refused):
    """A Subspace's state holds a sketch of P; oracle: P with its rows in another order."""
    argv = [*SUBSPACE, "--save-dir", str(copy)]
    train_psgd.main(argv)
    arrays = dict(np.load(copy / "psgd" / "basis.npz"))
    arrays["basis"] = arrays["basis"][::-1]
    np.savez(copy / "psgd" / "basis.npz", **arrays)
    line = refused(train_psgd.main, [*argv, "--resume", "--epochs", "2"])
    assert "checkpoint.pt" in line
    assert "another basis" in line


def test_a_run_of_an_earlier_version_is_refused_in_a_line(two_epochs, tmp_path, refused):
    """What 7e33a32 wrote has no method among its options."""
    run = shutil.copytree(two_epochs, tmp_path / "run")
    checkpoint = read_tensors(run / "checkpoint.pt")
    del checkpoint["arguments"]["method"]
    torch.save(checkpoint, run / "checkpoint.pt")
    line = refused(train_sgd.main, ["--resume", "--epochs", "3", "--save-dir", run])
    assert "earlier version" in line
    assert "--overwrite" in line


def test_what_was_not_given_is_not_said_to_be_here(two_epochs, tmp_path, refused):
    """A checkpoint beside no config.json: the options are the defaults."""
    shutil.copy(two_epochs / "checkpoint.pt", tmp_path)
    line = refused(train_sgd.main, ["--resume", "--save-dir", tmp_path])
    assert "--arch: has to be given; it is resnet8 in" in line


def test_evaluation_takes_the_options_of_the_run(two_epochs):
    """Oracle: the metrics of its last epoch."""
    tested = train_sgd.main(["--evaluate", "--save-dir", str(two_epochs)])
    assert tested["test_acc"] == rows(two_epochs)[-1]["test_acc"]
