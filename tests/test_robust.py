"""Runs that are interrupted, run out of room, diverge or meet. Oracle: an unbroken run, bit by bit.

`pytest tests/test_robust.py -k killed --kills 200` kills the chain that often.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from conftest import DIGITS, program
from test_options import files
from torch import nn

import models
import train_pbfgs
import train_psgd
import train_sgd
import training.files
import training.losses
import training.memory
import utils
from dldr.reading import read_tensors

ROOT = Path(__file__).parent.parent
SUBSPACE = [*DIGITS, "--params_end", "7", "--n_components", "5", "--save-every", "2"]
RUNS = {
    "sgd": (train_sgd, "", [*DIGITS, "--save-every", "2", "--epochs", "4"]),
    "psgd": (train_psgd, "psgd", [*SUBSPACE, "--epochs", "4"]),
    "pbfgs": (train_pbfgs, "pbfgs", [*SUBSPACE, "--epochs", "4", "--alpha", "0.01"]),
}


def tensors(value, name=""):
    """All that is in nested dicts and lists, by path, but for the seconds."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in tensors(part, f"{name}/{key}").items()}
    return {} if name.endswith("/seconds") else {name: value}


def contents(directory: Path) -> dict:
    """Everything that a run left, less what no two runs share."""
    found = {}
    for file in sorted(directory.rglob("*")):
        where = str(file.relative_to(directory))
        if file.suffix in (".pt", ".th"):
            found |= tensors(read_tensors(file), where)
        elif file.suffix == ".jsonl":
            found |= tensors([json.loads(line) for line in file.read_text().splitlines()], where)
        elif file.suffix == ".npz":
            found |= {f"{where}/{key}": value for key, value in np.load(file).items()}
        elif file.is_file() and file.name != "config.json":
            found[where] = "a file"
    return found


def differences(one: Path, other: Path) -> list[str]:
    """Where what two runs left is not equal to the last bit."""
    a, b = contents(one), contents(other)
    odd = a.keys() ^ b.keys()
    for name in a.keys() & b.keys():
        same = torch.equal if isinstance(a[name], torch.Tensor) else np.array_equal
        if not same(a[name], b[name]):
            odd.add(name)
    return sorted(odd)


@pytest.fixture(scope="session")
def unbroken(sampled, tmp_path_factory):
    """Save dirs of runs that nothing interrupted."""
    save_dirs = {}
    for name, (script, _, options) in RUNS.items():
        save_dirs[name] = tmp_path_factory.mktemp("unbroken") / name
        if name != "sgd":
            shutil.copytree(sampled, save_dirs[name])
        script.main([*options, "--save-dir", str(save_dirs[name])])
    return save_dirs


def start(name, sampled, tmp_path):
    """The command line of one of RUNS in a directory of its own."""
    script, _, options = RUNS[name]
    save_dir = tmp_path / "run"
    if name != "sgd":
        shutil.copytree(sampled, save_dir)
    return script, [*options, "--save-dir", str(save_dir)], save_dir


def interrupt(patch, moment: int, number: int = signal.SIGINT) -> list:
    """Let a signal come at that forward pass, counted from 1; returns those there were."""
    cross_entropy, calls = training.losses.cross_entropy, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == moment:
            os.kill(os.getpid(), number)
        return cross_entropy(*args)

    patch("cross_entropy", interrupted)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "number"), [(2, signal.SIGINT), (7, signal.SIGTERM)])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_asked_to_stop_resumes_as_if_it_had_not(
    name, moment, number, sampled, unbroken, tmp_path, patch, capsys
):
    """At a forward pass of training, of a test or of a search, and once more on the way."""
    script, argv, save_dir = start(name, sampled, tmp_path)
    cross_entropy = training.losses.cross_entropy
    calls = interrupt(patch, moment, number)
    for _ in range(2):
        calls.clear()
        with pytest.raises(SystemExit) as exit:
            script.main([*argv, "--resume"])
        assert exit.value.code == 128 + number
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert signal.Signals(number).name in error[0]
        assert "--resume" in error[0]
    patch("cross_entropy", cross_entropy)
    script.main([*argv, "--resume"])
    assert differences(save_dir, unbroken[name]) == []


@pytest.mark.slow
def test_a_run_stopped_before_its_first_batch_resumes(tmp_path, unbroken, monkeypatch):
    """A signal while the initialization is written."""
    save_sample = train_sgd.save_sample

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        save_sample(*args)

    argv = [*RUNS["sgd"][2], "--save-dir", str(tmp_path / "run"), "--resume"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(train_sgd, "save_sample", interrupted)
        train_sgd.main(argv)
    assert exit.value.code == 143
    train_sgd.main(argv)
    assert differences(tmp_path / "run", unbroken["sgd"]) == []


@pytest.mark.slow
def test_an_average_can_be_stopped_and_resumed(sampled, tmp_path, patch, monkeypatch):
    """In the pass that recomputes BatchNorm's statistics, and in the test."""
    argv = [*DIGITS, "--average", "3", "7", "--resume", "--save-dir"]
    for name in ("whole", "run"):
        shutil.copytree(sampled, tmp_path / name)
    train_sgd.main([*argv, str(tmp_path / "whole")])
    cross_entropy, recompute = training.losses.cross_entropy, training.losses.recompute_statistics

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        recompute(*args)

    with pytest.raises(SystemExit) as exit, monkeypatch.context() as context:
        context.setattr(train_sgd, "recompute_statistics", interrupted)
        train_sgd.main([*argv, str(tmp_path / "run")])
    assert exit.value.code == 130
    interrupt(patch, 1)
    with pytest.raises(SystemExit):
        train_sgd.main([*argv, str(tmp_path / "run"), "--test-batch-size", "100"])
    patch("cross_entropy", cross_entropy)
    train_sgd.main([*argv, str(tmp_path / "run")])
    assert differences(tmp_path / "run" / "average", tmp_path / "whole" / "average") == []


@pytest.mark.slow
def test_weights_of_half_an_epoch_are_no_result(sampled, tmp_path, patch):
    """Stopped in the fourth epoch, resumed to end after three. Oracle: the files before."""
    script, argv, save_dir = start("sgd", sampled, tmp_path)
    interrupt(patch, 3 * 7 + 2)  # an epoch has 6 batches, and one for the test
    with pytest.raises(SystemExit):
        script.main(argv)
    before = contents(save_dir)
    assert script.main([*argv, "--epochs", "3", "--resume"])["epoch"] == 3
    after = contents(save_dir)
    assert [name for name in after if not np.array_equal(after[name], before[name])] == []


def test_a_second_signal_ends_at_once(tmp_path, patch):
    def twice(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("still running")

    patch("cross_entropy", twice)
    with pytest.raises(SystemExit) as exit:
        train_sgd.main([*DIGITS, "--save-dir", str(tmp_path / "run")])
    assert exit.value.code == 143
    assert not read_tensors(tmp_path / "run" / "checkpoint.pt")["progress"]


def test_what_nohup_ignores_does_not_stop(tmp_path, patch):
    def hang_up(*args):
        os.kill(os.getpid(), signal.SIGHUP)
        return cross_entropy(*args)

    cross_entropy = training.losses.cross_entropy
    patch("cross_entropy", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        argv = [*DIGITS, "--epochs", "1", "--save-dir", str(tmp_path / "run")]
        assert train_sgd.main(argv)["epoch"] == 1
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train_sgd.main([*DIGITS, "--epochs", "1", "--save-dir", str(tmp_path)])
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


@pytest.mark.slow
@pytest.mark.parametrize(("script", "moment"), [(train_sgd, 3), (train_psgd, 6)])
def test_dropout_is_a_function_of_the_step(patch, script, moment, tmp_path, monkeypatch, capsys):
    """An epoch stopped halfway, or before BatchNorm is recomputed, draws the same when resumed."""

    def build(arch, num_classes, image_size):
        parts = [nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, num_classes)]
        return nn.Sequential(*parts, nn.BatchNorm1d(num_classes))

    monkeypatch.setattr(models, "build", build)
    options = [*DIGITS, "--epochs", "2", "--resume"]
    train_sgd.main([*options, "--save-dir", str(tmp_path / "unbroken")])
    if script is train_psgd:
        shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
        options += ["--params_end", "3", "--n_components", "2", "--bn-update"]
        script.main([*options, "--save-dir", str(tmp_path / "unbroken")])
    interrupt(patch, moment)
    with pytest.raises(SystemExit):
        script.main([*options, "--save-dir", str(tmp_path / "broken")])
    script.main([*options, "--save-dir", str(tmp_path / "broken")])
    assert f"{moment} batches of the next" in capsys.readouterr().out
    assert differences(tmp_path / "broken", tmp_path / "unbroken") == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_program(number, tmp_path):
    """The real command line, stopped when it shows its first line, before or in the training."""
    command = [sys.executable, "-u", "train_sgd.py", *DIGITS, "--save-dir", str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdout.readline()
        process.send_signal(number)
        _, error = process.communicate(timeout=200)
    assert process.returncode == 128 + number
    assert len(error.splitlines()) == 1, error
    assert error.startswith("train_sgd.py: stopped by SIG")


@pytest.mark.slow
def test_the_chain_ends_with_its_script(tmp_path):
    """Ctrl-C goes to run.sh and all it started: the script's last line is seen, nothing follows."""
    for file in (ROOT / "run.sh", ROOT / "requirements.txt", *ROOT.glob("*.py")):
        shutil.copy(file, tmp_path)
    for name in ("dldr", "experiments", "models", "training"):
        shutil.copytree(ROOT / name, tmp_path / name)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with subprocess.Popen(
        ["./run.sh", "digits"],
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert any("epoch   2/" in line for line in iter(process.stdout.readline, ""))
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 130
    assert output.splitlines()[-1].startswith("train_sgd.py: stopped by SIGINT")
    log = (tmp_path / "save_labelnoise0_resnet20_digits" / "log.txt").read_text()
    assert log.splitlines()[-1] == output.splitlines()[-1]


# A chain, killed


def chain(save_dir: Path) -> list[str]:
    """The three scripts in one program."""
    calls = []
    for name, (script, _, options) in RUNS.items():
        end = ["--epochs", "7"] if name == "sgd" else []
        calls.append((script, [*options, *end, "--save-dir", str(save_dir), "--resume"]))
    return [sys.executable, "-c", program(*calls)]


@pytest.mark.slow
def test_a_killed_chain_ends_as_an_unbroken_one(tmp_path, request):
    """SIGKILL at random moments; after each, every file in place can be read."""
    kills, finished, killed = request.config.getoption("kills"), 0, 0
    settings = {"cwd": ROOT, "stdout": subprocess.DEVNULL}
    began = time.perf_counter()
    subprocess.run(chain(tmp_path / "unbroken"), check=True, **settings)
    seconds = time.perf_counter() - began
    moments = np.random.default_rng(kills)
    broken = tmp_path / "broken"
    while killed < kills or broken.exists():
        with subprocess.Popen(chain(broken), start_new_session=True, **settings) as process:
            try:
                process.wait(moments.uniform(0, seconds) if killed < kills else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode == -signal.SIGKILL:
            killed += 1
            contents(broken)
            continue
        assert process.returncode == 0
        assert differences(broken, tmp_path / "unbroken") == []
        finished += 1
        shutil.rmtree(broken)
    print(f"{killed} kills, {finished} chains finished, no difference")


# No room, no sense


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "pbfgs"])
def test_a_full_disk_stops_with_a_line_and_the_run_resumes_later(name, sampled, unbroken, tmp_path):
    """With files limited to a size that the checkpoint is above, and a sample is not."""
    script, argv, save_dir = start(name, sampled, tmp_path)
    command = [sys.executable, f"{script.__name__}.py", *argv, "--resume"]
    full = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000)),
    )
    assert full.returncode == 1, full.stderr
    (line,) = full.stderr.splitlines()
    assert "File too large" in line
    assert ".npz" in line if name == "pbfgs" else "checkpoint.pt" in line
    assert "--resume" in line
    contents(save_dir)
    script.main([*argv, "--resume"])
    assert differences(save_dir, unbroken[name]) == []


@pytest.mark.slow
def test_samples_that_will_not_fit_are_refused(tmp_path, refused, monkeypatch, capsys):
    """resnet8's state dict takes 303,136 bytes: 12 samples, and 7 more for the checkpoints."""
    usage = shutil.disk_usage("/")
    argv = [*DIGITS, "--epochs", "11", "--save-dir", tmp_path / "a" / "b"]
    for free, fits in ((19 * 303_136 - 1, False), (19 * 303_136, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if fits:
            train_sgd.main([str(word) for word in argv])
            assert "12 samples of 296.0 KiB" in capsys.readouterr().out
        else:
            assert "--save-dir" in refused(train_sgd.main, argv)
            assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_what_is_overwritten_takes_no_room(sampled, tmp_path, monkeypatch, capsys):
    """Seven of the twelve samples are there, and seven more sizes are for the checkpoints."""
    usage, save_dir = shutil.disk_usage("/"), shutil.copytree(sampled, tmp_path / "run")
    free = usage._replace(free=12 * 303_136)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    train_sgd.main([*DIGITS, "--epochs", "11", "--save-dir", str(save_dir), "--overwrite"])
    assert "12 samples of 296.0 KiB" in capsys.readouterr().out


def test_a_basis_that_will_not_fit_is_refused(sampled, refused, monkeypatch):
    """resnet8 has 75,290 parameters: two rows of four bytes fit into 700,000 bytes."""
    monkeypatch.setattr(training.memory, "free_memory", lambda device: 7e5)
    argv = [*SUBSPACE, "--basis", "random", "--n_components", "5", "--save-dir", sampled]
    line = refused(train_psgd.main, argv)
    assert "--n_components" in line
    assert "allowed: 2 directions" in line
    assert not (sampled / "psgd_random").exists()


def test_free_memory_is_what_the_system_says(monkeypatch):
    """Oracle: an allocation of half of it is possible, and it is not more than there is."""
    free = training.memory.free_memory("cpu")
    assert 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert training.memory.free_memory("cpu") < free / 2, (
        "the processes of a machine share its memory"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cure"), [("sgd", "--lr"), ("psgd", "--lr"), ("pbfgs", "--alpha")]
)
def test_a_loss_that_is_not_finite_stops(patch, name, cure, sampled, tmp_path, refused):
    """From the fourth batch of the third epoch on; the checkpoint of the second is still there."""
    script, argv, save_dir = start(name, sampled, tmp_path)
    cross_entropy = training.losses.cross_entropy
    seed = int(utils.rng(1, "network", 2).integers(2**63, size=6)[3])

    def broken(model, images, labels, half):
        loss, output = cross_entropy(model, images, labels, half)
        bad = torch.initial_seed() - seed in (0, 1)
        return (loss * float("nan") if bad else loss), output

    patch("cross_entropy", broken)
    with pytest.raises(SystemExit) as exit:
        script.main([*argv])
    assert exit.value.code == 1
    saved = read_tensors(save_dir / RUNS[name][1] / "checkpoint.pt")
    assert saved["epoch"] == 2
    assert not (save_dir / "3.pt").exists() or name != "sgd"


def test_what_a_diverged_run_says(tmp_path, capsys):
    argv = [*DIGITS, "--lr", "1e30", "--epochs", "3", "--save-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as exit:
        train_sgd.main(argv)
    assert exit.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    for part in ("epoch 1, step 2", "a smaller --lr than 1e+30", "--resume continues"):
        assert part in line


def test_parameters_that_are_not_finite_stop_though_every_loss_was(tmp_path, capsys):
    """One step an epoch: its loss is of the start, and what it leaves is not a number."""
    argv = [*DIGITS, "--batch-size", "2000", "--lr", "1e38", "--save-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as exit:
        train_sgd.main([*argv, "--save-every", "1", "--weight-decay", "1e6"])
    assert exit.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "epoch 1, step 1: the parameters are not finite; try a smaller --lr than 1e+38" in line
    assert not (tmp_path / "run" / "1.pt").exists()


def test_a_stopped_run_that_had_diverged_does_not_replace_its_checkpoint(tmp_path, patch, capsys):
    """Asked to stop two steps after the loss was nan, and before it is looked at."""
    cross_entropy, calls = training.losses.cross_entropy, []

    def diverging(*args):
        loss, output = cross_entropy(*args)
        calls.append(1)
        if len(calls) == 11:  # an epoch is six steps and one test
            os.kill(os.getpid(), signal.SIGINT)
        return (loss * float("nan") if len(calls) >= 9 else loss), output

    patch("cross_entropy", diverging)
    with pytest.raises(SystemExit) as exit:
        train_sgd.main([*DIGITS, "--save-every", "1", "--save-dir", str(tmp_path)])
    assert exit.value.code == 1
    assert "epoch 2, step 2" in capsys.readouterr().err
    assert read_tensors(tmp_path / "checkpoint.pt")["epoch"] == 1


def test_an_epoch_begun_continues_with_its_own_batches(tmp_path, patch, refused, capsys):
    def stopped(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return cross_entropy(*args)

    cross_entropy = training.losses.cross_entropy
    patch("cross_entropy", stopped)
    argv = [*DIGITS, "--save-dir", str(tmp_path), "--resume"]
    with pytest.raises(SystemExit):
        train_sgd.main(argv)
    capsys.readouterr()
    line = refused(train_sgd.main, [*argv, "--batch-size", "64"])
    assert "--batch-size: 64 here, 256 in" in line


def test_a_trial_that_is_not_finite_is_a_rejected_trial():
    """f(z) = z² for |z| < 1, else infinite or nan; the steps from 2 by hand: 2 − 4, 2 − 1.6, …"""
    z = torch.nn.Parameter(torch.tensor([2.0]))
    z.grad = torch.tensor([4.0])
    answers = iter([float("nan"), float("inf"), float("-nan"), 0.5])
    optimizer = train_pbfgs.PBFGS([z])
    assert optimizer.step(lambda: torch.tensor(next(answers)), torch.tensor(4.0)) == 3
    torch.testing.assert_close(z.data, torch.tensor([2 - 4 * 0.4**3]))


# Two runs in one directory

HOLD = """
import filelock, sys, time
with filelock.FileLock(sys.argv[1] + "/.lock"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_says_that_another_holds_the_directory(tmp_path, refused):
    directory = tmp_path / "run"
    directory.mkdir()
    command = [sys.executable, "-c", HOLD, str(directory)]
    argv = [*DIGITS, "--epochs", "1", "--save-dir", directory]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        line = refused(train_sgd.main, argv)
        assert f"{directory} is in use" in line
        assert [file.name for file in directory.iterdir()] == [".lock"]
        holder.kill()
    (directory / "0.pt.tmp").write_bytes(b"half")
    (directory / "mine.tmp").write_bytes(b"whole")
    assert (directory / ".lock").exists(), "a killed process leaves it"
    train_sgd.main([str(word) for word in argv])
    left = {file.name for file in directory.iterdir()}
    assert left == {
        "0.pt",
        "1.pt",
        "checkpoint.pt",
        "config.json",
        "metrics.jsonl",
        "mine.tmp",
        "model.th",
    }


FORK = """
import filelock, os, signal, sys, time
with filelock.FileLock(sys.argv[1] + "/.lock"):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_decodes_images_does_not_hold_the_directory_of_one_that_was_killed(tmp_path):
    command = [sys.executable, "-c", FORK, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as holder:
        child = int(holder.stdout.readline())
        holder.wait()
        try:
            with filelock.FileLock(tmp_path / ".lock", timeout=0):
                os.kill(child, 0)  # it is still there
        finally:
            os.kill(child, signal.SIGKILL)


def test_after_a_restart_a_run_resumes_from_its_own_checkpoint(
    sampled, tmp_path, monkeypatch, capsys
):
    """torchrun repeats the command, whatever --resume names in it."""
    argv = [*DIGITS, "--resume", str(sampled / "checkpoint.pt"), "--save-dir", str(tmp_path)]
    train_sgd.main([*argv, "--epochs", "7"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train_sgd.main([*argv, "--epochs", "8"])
    assert f"{tmp_path / 'checkpoint.pt'}: 7 epochs are done" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 9))


def test_subspace_runs_do_not_hold_each_other_up(sampled, tmp_path):
    save_dir = shutil.copytree(sampled, tmp_path / "run")
    argv = [*SUBSPACE, "--epochs", "1", "--save-dir", str(save_dir)]
    (save_dir / "psgd").mkdir()
    with filelock.FileLock(save_dir / "psgd" / ".lock"):
        train_pbfgs.main(argv)


def test_what_was_decided_is_in_the_config(sampled, tmp_path):
    save_dir = shutil.copytree(sampled, tmp_path / "run")
    argv = [*SUBSPACE, "--epochs", "1", "--params_stride", "2", "--n_components", "0.9"]
    train_psgd.main([*argv, "--save-dir", str(save_dir)])
    config = json.loads((save_dir / "psgd" / "config.json").read_text())
    assert config["samples"] == [0, 2, 4, 6]
    assert config["k"] == len(np.load(save_dir / "psgd" / "basis.npz")["basis"]) < 4
    assert config["arguments"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")


# Starting again


def end_early(run: Path, epochs: int) -> None:
    """Make a run of six epochs one that was killed after fewer, before a checkpoint was due."""
    (run / "model.th").unlink()
    begun = read_tensors(run / "checkpoint.pt") | {"rows": []}
    torch.save(begun, run / "checkpoint.pt")
    for number in range(epochs + 1, 7):
        (run / f"{number}.pt").unlink()
    rows = (run / "metrics.jsonl").read_text().splitlines()[:epochs]
    (run / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))


def test_a_run_that_diverged_can_be_started_again(tmp_path, capsys):
    """Oracle: a run in a directory of its own."""
    argv = [*DIGITS, "--smalldatasets", "0.2", "--epochs", "2", "--save-dir"]
    with pytest.raises(SystemExit):
        train_sgd.main([*argv, str(tmp_path / "run"), "--lr", "1e38"])
    assert "not finite" in capsys.readouterr().err
    assert (tmp_path / "run" / "0.pt").exists()
    for name in ("run", "oracle"):
        train_sgd.main([*argv, str(tmp_path / name), "--corrupt", "0.1", "--overwrite"])
    assert differences(tmp_path / "run", tmp_path / "oracle") == []


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0, 3])
def test_a_run_that_was_killed_early_can_be_started_again(epochs, copy):
    end_early(copy, epochs)
    (copy / "6.pt").write_bytes(b"")
    train_sgd.main([*DIGITS, "--epochs", "6", "--save-dir", str(copy)])
    assert (copy / "6.pt").stat().st_size > 300_000


KEPT = {
    "a broken checkpoint": lambda run: (run / "checkpoint.pt").write_text(""),
    "half an epoch": lambda run: add_progress(run / "checkpoint.pt"),
    "a run on its samples": lambda run: shutil.copytree(
        run, run / "psgd", ignore=shutil.ignore_patterns("*.pt")
    ),
    "samples of unknown origin": lambda run: (run / "checkpoint.pt").unlink(),
}


def add_progress(file: Path) -> None:
    torch.save(read_tensors(file) | {"progress": {"batches": 3}}, file)


@pytest.mark.parametrize("name", KEPT)
def test_what_may_be_of_value_is_not_overwritten(name, copy, refused):
    """Oracle: every file; with metrics.jsonl, and without."""
    end_early(copy, 3)
    KEPT[name](copy)
    for _ in range(2):
        before = files(copy)
        line = refused(train_sgd.main, [*DIGITS, "--epochs", "1", "--save-dir", copy])
        assert "holds a run" in line
        assert files(copy) == before
        (copy / "metrics.jsonl").unlink(missing_ok=True)


# Refused before data are read


def held(*arguments, **options):
    raise filelock.Timeout("")


EARLY = [
    (train_sgd, "", "holds a run"),
    (train_sgd, "--resume --corrupt 0.1", "--corrupt: 0.1 here, 0.0 in"),
    (train_sgd, "--resume --optimizer adam", "--optimizer: adam here, sgd in"),
    (train_sgd, "--overwrite --pretrained 3.pt", "/3.pt: there is no such file"),
    (train_sgd, "--overwrite --arch nowhere:network", "No module"),
    (train_sgd, "--evaluate --save-dir nowhere", "nowhere/model.th: there is no such"),
    (train_sgd, "--average 0 8", "lacks the snapshots 7"),
    (train_psgd, "", "psgd holds a run"),
    (train_psgd, "--overwrite --n_components 7", "--n_components: 7 of 7 snapshots; allowed"),
    (train_psgd, "--resume --run psgd --n_components 5", "--n_components: 5 here, 6 in"),
    (train_psgd, "--overwrite", "is in use by another process"),
]


@pytest.mark.parametrize("script", [train_sgd, train_psgd])
def test_what_can_be_is_refused_before_data_are_read(
    script, sampled, tmp_path, refused, patch, monkeypatch
):
    run = shutil.copytree(sampled, tmp_path / "run")
    if script is train_psgd:
        script.main([*DIGITS, "--epochs", "1", "--save-dir", str(run)])
    monkeypatch.chdir(tmp_path)
    patch("load_data", lambda args: pytest.fail("data are read"))
    before = files(tmp_path)
    for options, message in [case for of, *case in EARLY if of is script]:
        if "in use" in message:
            monkeypatch.setattr(filelock.FileLock, "acquire", held)
        assert message in refused(script.main, [*DIGITS, "--save-dir", run, *options.split()])
        assert files(tmp_path) == before
