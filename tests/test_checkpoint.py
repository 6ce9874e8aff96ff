"""What a resumed run keeps, removes and records. Oracle: the files that were there before."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DIGITS
from torch import nn

import models
import train_psgd
import train_sgd
import training.files
import training.records


def contents(directory: Path) -> dict[str, bytes]:
    """The bytes of all files."""
    files = [file for file in directory.rglob("*") if file.is_file()]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def config(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("lost", [["checkpoint.pt"], ["checkpoint.pt", "model.th"]])
def test_a_finished_run_is_not_removed_where_its_checkpoint_is_lost(lost, copy, refused):
    for name in lost:
        (copy / name).unlink()
    before = contents(copy)
    line = refused(train_sgd.main, [*DIGITS, "--epochs", "6", "--save-dir", copy, "--resume"])
    assert "continue it with --resume where it has a checkpoint.pt" in line
    assert "--overwrite" in line
    assert contents(copy) == before


def test_another_run_is_not_removed_by_the_average_of_its_name(copy, refused):
    argv = [*DIGITS, "--params_end", "7", "--n_components", "3", "--epochs", "1"]
    train_psgd.main([*argv, "--save-dir", str(copy), "--run", "average"])
    before = contents(copy)
    argv = [*DIGITS, "--average", "3", "7", "--save-dir", copy, "--resume"]
    refused(train_sgd.main, argv)
    assert contents(copy) == before


@pytest.mark.slow
def test_each_session_that_trains_is_recorded(copy, monkeypatch):
    """A start that has nothing left to do changes nothing, whatever its options are."""
    before = contents(copy)
    base = [*DIGITS, "--save-dir", str(copy), "--resume"]
    train_sgd.main([*base, "--epochs", "6", "--threads", "2", "--lr", "0.01"])
    assert contents(copy) == before
    monkeypatch.setattr(training.records, "git_commit", lambda: "a later one")
    train_sgd.main([*base, "--epochs", "7", "--threads", "2", "--lr", "0.01"])
    torch.set_num_threads(1)
    first, recorded = json.loads(before["config.json"]), config(copy)
    names = ("arguments", "threads", "commit", "versions", "device")
    assert {name: recorded[name] for name in names} == {name: first[name] for name in names}
    assert [session["from_epoch"] for session in recorded["sessions"]] == [0, 6]
    assert [session["threads"] for session in recorded["sessions"]] == [1, 2]
    assert recorded["sessions"][1]["arguments"]["lr"] == 0.01
    assert recorded["sessions"][1]["commit"] == "a later one"


class Masked(nn.Module):
    """A linear network with the buffer of an attention layer, −inf above the diagonal."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(192, classes)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1)) + (self.mask.exp().sum() - 6)


def test_infinite_buffers_of_the_network_itself_can_be_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "build", lambda arch, classes, image_size: Masked(classes))
    base = [*DIGITS, "--save-dir", str(tmp_path)]
    train_sgd.main([*base, "--epochs", "1"])
    assert train_sgd.main([*base, "--epochs", "2", "--resume"])["epoch"] == 2
    train_psgd.main([*base, "--params_end", "3", "--n_components", "2", "--epochs", "1"])


def test_content_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """A power cut after the one and before the other would leave an empty file."""
    steps, replace, fsync = [], Path.replace, os.fsync
    monkeypatch.setattr(Path, "replace", lambda *a: (steps.append("replace"), replace(*a))[1])
    monkeypatch.setattr(os, "fsync", lambda *a: (steps.append("fsync"), fsync(*a))[1])
    for name in ("a.pt", "b.json", "c.npz"):
        value = {"x": torch.ones(3)} if name == "a.pt" else "{}" if name == "b.json" else {"x": [1]}
        training.files.save(tmp_path / name, value)
    assert steps == ["fsync", "replace"] * 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pt", "b.json", "c.npz"]


def test_the_same_samples_have_the_same_fingerprint(copy):
    files = [copy / f"{number}.pt" for number in range(3)]
    first = training.files.fingerprint(files, "an option")
    shutil.copy(files[0], copy / "again.pt")
    assert training.files.fingerprint([copy / "again.pt", *files[1:]], "an option") == first
    assert training.files.fingerprint(files, "another") != first
    assert training.files.fingerprint(files[:2], "an option") != first
