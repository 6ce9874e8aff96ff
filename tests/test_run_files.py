"""The directory of a run: who holds it, what is in it, whose it is."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from conftest import DIGITS
from PIL import Image

import train_pbfgs
import train_psgd
import train_sgd
from dldr.reading import read_tensors

SMALL = [*DIGITS, "--smalldatasets", "0.2"]
SUBSPACE = [*DIGITS, "--params_end", "7", "--epochs", "1"]


def config(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def files(directory: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


# Locks


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number, tmp_path, monkeypatch, capsys):
    """What flock answers on some network file systems; the run goes on and says so."""

    def flock(descriptor, operation):
        if operation & fcntl.LOCK_NB:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    train_sgd.main([*SMALL, "--epochs", "1", "--save-dir", str(tmp_path / "run")])
    assert "no locks" in capsys.readouterr().out
    assert not (tmp_path / "run" / ".lock").exists()


HOLD = """
import sys, time, filelock
lock = filelock.FileLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_process_holds_nothing(tmp_path, refused):
    """While it lives, a second run is refused; its lock file stays and does not matter."""
    run = tmp_path / "run"
    run.mkdir()
    command = [sys.executable, "-c", HOLD, str(run / ".lock")]
    argv = [*SMALL, "--epochs", "1", "--save-dir", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert "in use by another process" in refused(train_sgd.main, argv)
        assert [file.name for file in run.iterdir()] == [".lock"]
        holder.send_signal(signal.SIGKILL)
    assert (run / ".lock").exists()
    assert train_sgd.main(argv)["epoch"] == 1


# Starting again


def end_early(run: Path) -> None:
    """Make a run one that was killed before its first checkpoint was due."""
    (run / "model.th").unlink()
    torch.save(read_tensors(run / "checkpoint.pt") | {"rows": []}, run / "checkpoint.pt")


def test_only_the_same_command_starts_again(tmp_path, refused):
    """Any other one is refused, and no file is changed, until --overwrite."""
    run = tmp_path / "run"
    argv = [*SMALL, "--epochs", "2", "--save-dir", str(run)]
    train_sgd.main(argv)
    end_early(run)
    before = files(run)
    for other in (["--arch", "resnet20"], ["--corrupt", "0.1"], ["--lr", "0.01"]):
        assert "holds a run" in refused(train_sgd.main, [*argv, *other])
        assert files(run) == before
    train_sgd.main(argv)
    end_early(run)
    train_sgd.main([*argv, "--lr", "0.01", "--overwrite"])
    assert config(run)["arguments"]["lr"] == 0.01


# Names


def test_runs_of_several_k_have_their_places(copy):
    """The first one keeps the method's name; a command finds its run again."""
    argv = [*SUBSPACE, "--save-dir", str(copy)]
    for k in ("2", "3", "4"):
        train_psgd.main([*argv, "--n_components", k])
    places = {"psgd": 2, "psgd_k3": 3, "psgd_k4": 4}
    assert {name: config(copy / name)["k"] for name in places} == places
    for k, name in (("2", "psgd"), ("3", "psgd_k3")):
        train_psgd.main([*argv, "--n_components", k, "--resume", "--epochs", "2"])
        assert config(copy / name)["sessions"][-1]["arguments"]["epochs"] == 2


def test_runs_of_several_k_may_begin_at_once(copy):
    """While another process holds psgd/, not yet with a config.json."""
    (copy / "psgd").mkdir()
    with filelock.FileLock(copy / "psgd" / ".lock"):
        train_psgd.main([*SUBSPACE, "--n_components", "3", "--save-dir", str(copy)])
    assert config(copy / "psgd_k3")["k"] == 3
    assert not (copy / "psgd" / "config.json").exists()


def test_a_second_run_of_the_same_k_is_refused(copy, refused):
    """While another process holds psgd/, whose config.json has this k."""
    argv = [*SUBSPACE, "--n_components", "3", "--save-dir", str(copy)]
    train_psgd.main(argv)
    for more in ([], ["--resume"], ["--overwrite"]):
        with filelock.FileLock(copy / "psgd" / ".lock"):
            assert "psgd is in use by another process" in refused(train_psgd.main, [*argv, *more])
    assert not (copy / "psgd_k3").exists()


def test_seeds_of_training_on_one_trajectory(copy):
    """Labels are those of --randomseed, the order another: the digest is equal, the loss not."""
    argv = [*SUBSPACE, "--n_components", "3", "--save-dir", str(copy)]
    one = train_psgd.main(argv)
    other = train_psgd.main([*argv, "--train-seed", "2"])
    assert one["train_loss"] != other["train_loss"]
    first, second = config(copy / "psgd"), config(copy / "psgd_seed2")
    assert first["labels"] == second["labels"] == config(copy)["labels"]
    assert first["fingerprint"] == second["fingerprint"]
    same = train_psgd.main([*argv, "--train-seed", "1", "--run", "same"])
    assert same["train_loss"] == one["train_loss"]


# What is recorded


def test_records_say_what_a_run_is(copy):
    """Kind, method and optimizer, of the objects that trained."""
    argv = ["--save-dir", str(copy), "--epochs", "1"]
    train_psgd.main(argv)
    train_psgd.main([*argv, "--optimizer", "adam", "--run", "adam"])
    train_pbfgs.main([*argv, "--n_components", "2"])
    train_sgd.main(["--save-dir", str(copy), "--average", "3", "7"])
    expected = {
        ".": ("full", "sgd", "SGD"),
        "psgd": ("subspace", "psgd", "SGD"),
        "adam": ("subspace", "psgd", "Adam"),
        "pbfgs": ("subspace", "pbfgs", "PBFGS"),
        "average": ("average", "average", None),
    }
    names = ("kind", "method", "optimizer")
    found = {name: tuple(config(copy / name)[key] for key in names) for name in expected}
    assert found == expected


def test_the_epochs_of_samples_count_from_the_start_epoch(tmp_path):
    """Six steps an epoch, a sample every four, from epoch 1 on: 1.pt is of step 6, 2.pt of 8."""
    options = ["--start-epoch", "1", "--epochs", "2", "--sample-every", "4"]
    train_sgd.main([*DIGITS, *options, "--save-dir", str(tmp_path / "run")])
    assert config(tmp_path / "run")["sample_epochs"][1:] == [1, 1.333333, 2]
    assert sorted(file.stem for file in (tmp_path / "run").glob("[0-9]*.pt")) == ["1", "2", "3"]


@pytest.fixture
def images(tmp_path):
    """An ImageFolder of two classes, of 12 + 2 images each."""
    random = np.random.default_rng(0)
    for part, n in (("train", 12), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for number in range(n):
                pixels = random.integers(256, size=(8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{number}.png")
    return tmp_path / "images"


def test_a_data_set_that_has_changed_is_noticed(images, tmp_path, monkeypatch, refused):
    """The path is that of the trajectory wherever a run is started; one image less is refused."""
    monkeypatch.chdir(tmp_path)
    options = ["--datasets", "ImageFolder", "--data-dir", "images", "--image-size", "8"]
    train_sgd.main([*options, "--arch", "resnet8", "--epochs", "2", "--save-dir", "run"])
    assert config(tmp_path / "run")["arguments"]["data_dir"] == str(images)
    shutil.copytree(images, tmp_path / "elsewhere" / "images")
    (tmp_path / "elsewhere" / "images" / "train" / "cat" / "3.png").unlink()
    monkeypatch.chdir(tmp_path / "elsewhere")
    argv = ["--epochs", "1", "--save-dir", str(tmp_path / "run")]
    train_psgd.main([*argv, "--run", "first"])
    line = refused(train_psgd.main, [*argv, "--run", "second", "--data-dir", "images"])
    assert "--data-dir" in line
    assert not (tmp_path / "run" / "second").exists()
    line = refused(train_sgd.main, [*argv[2:], "--resume", "--epochs", "3", "--data-dir", "images"])
    assert "--data-dir" in line


def test_wrong_labels_are_counted(tmp_path, capsys):
    """Oracle: for ten classes a tenth of the drawn labels is right by chance, here 24 of 287."""
    options = ["--corrupt", "0.2", "--randomseed", "3", "--epochs", "1"]
    train_sgd.main([*DIGITS, *options, "--save-dir", str(tmp_path / "run")])
    found = config(tmp_path / "run")
    assert found["corrupted_labels"] == 287
    assert 0.82 < found["wrong_labels"] / 287 < 0.98
    assert f"287 labels replaced, {found['wrong_labels']} wrong" in capsys.readouterr().out
