"""What a run says and hears: options of other scripts, encodings, signals, a lagging test."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from conftest import DIGITS, ROOT

import train_pbfgs
import train_psgd
import train_sgd
import training.run
from training.metrics import statistics_lag


@pytest.mark.parametrize(
    ("script", "option", "named"),
    [
        (train_pbfgs, "--optimizer", "train_sgd.py and train_psgd.py have --optimizer"),
        (train_sgd, "--n-components", "train_psgd.py and train_pbfgs.py have --n-components"),
        (train_sgd, "--n_components", "train_psgd.py and train_pbfgs.py have --n_components"),
        (train_psgd, "--accumulate", "train_pbfgs.py has --accumulate"),
        (train_pbfgs, "--average", "train_sgd.py has --average"),
        (train_psgd, "--n_component", "did you mean --n_components?"),
    ],
)
def test_an_option_of_another_script_is_named(script, option, named, refused):
    assert named in refused(script.main, [option, "3"])


def test_a_home_directory_is_found_without_the_shell(tmp_path, monkeypatch):
    """A shell leaves --save-dir=~/x as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    args = train_sgd.get_options().parse_args(["--save-dir=~/x", "--data-dir=~"])
    assert (args.save_dir, args.data_dir) == (tmp_path / "x", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_any_encoding_of_the_output_will_do(encoding, sampled, tmp_path):
    """--help has θ and …, and the first line of a subspace run has …"""
    (tmp_path / "run").mkdir()
    for number in range(7):
        os.link(sampled / f"{number}.pt", tmp_path / "run" / f"{number}.pt")
    run = [*DIGITS, "--epochs", "1", "--save-dir", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    for options in (["--help"], run):
        command = [sys.executable, "train_psgd.py", *options]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_sigusr1_saves_and_ends(tmp_path, monkeypatch, capsys):
    """As SLURM's --signal=USR1 sends it. Oracle: the run can be resumed."""
    cross_entropy = training.run.cross_entropy

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return cross_entropy(*arguments)

    argv = [*DIGITS, "--epochs", "1", "--save-dir", str(tmp_path / "run"), "--resume"]
    with monkeypatch.context() as context, pytest.raises(SystemExit) as exit:
        context.setattr(training.run, "cross_entropy", interrupted)
        train_sgd.main(argv)
    assert exit.value.code == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1" in capsys.readouterr().err
    assert train_sgd.main(argv)["epoch"] == 1


def test_a_script_runs_in_a_thread(tmp_path):
    """Python lets only the main thread handle signals."""
    rows = []
    argv = [*DIGITS, "--epochs", "1", "--save-dir", str(tmp_path / "run")]
    thread = threading.Thread(target=lambda: rows.append(train_sgd.main(argv)))
    thread.start()
    thread.join()
    assert rows[0]["epoch"] == 1


def test_a_test_at_chance_says_what_to_try(copy, capsys):
    """From the initialization, BatchNorm's statistics are those of noise for some epochs."""
    argv = [*DIGITS, "--params_end", "3", "--epochs", "1", "--save-dir", str(copy)]
    row = train_psgd.main(argv)
    assert row["statistics_lag"]
    assert "BatchNorm's statistics lag; try --bn-update" in capsys.readouterr().out
    assert "statistics_lag" not in train_psgd.main([*argv, "--bn-update", "--run", "updated"])


@pytest.mark.parametrize(
    ("train", "test", "classes", "lags"),
    [
        (61, 10.3, 10, True),
        (61, 40, 10, False),
        (15, 10, 10, False),
        (80, 51, 2, True),
        (60, 50, 2, False),
        (60, 1.2, 100, True),
    ],
)
def test_when_statistics_are_said_to_lag(train, test, classes, lags):
    """Distances from chance to 100 %, in tenths: a test below one, training above two."""
    from torch import nn

    row = {"train_acc": train, "test_acc": test}
    assert bool(statistics_lag(row, nn.BatchNorm1d(1), classes)) == lags
    assert not statistics_lag(row, nn.Linear(1, 1), classes)
