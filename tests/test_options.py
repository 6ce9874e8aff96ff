"""Bad input: exit code 2, one line that names the flag or file and what is allowed, no file."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import names
import pytest
import torch
import torchvision
from conftest import DIGITS
from PIL import Image

import models
import report
import train_pbfgs
import train_psgd
import train_sgd
import utils

SGD, PSGD, PBFGS = train_sgd, train_psgd, train_pbfgs
ALL = (SGD, PSGD, PBFGS)
ROOT = Path(__file__).parent.parent

# (scripts, options, what the line says beside a flag)
BAD_VALUES = [
    ((SGD,), "--arch nowhere:network", "--arch: nowhere:network: No module named 'nowhere'"),
    ((SGD,), "--arch math:network", "--arch: math:network: module 'math' has no attribute"),
    ((SGD,), "--arch math:sqrt", "--arch: "),
    ((SGD,), "--arch builtins:dict", "--arch: builtins:dict: gives a dict, not a torch.nn.Module"),
    (ALL, "--arch a:b:c", "there is no network 'a:b:c'"),
    (ALL, "--arch resnet21", "--arch: there is no network 'resnet21'; did you mean"),
    (ALL, "--arch xyzzy", "allowed: resnet8, resnet20"),
    (ALL, "--datasets CIFAR11", "did you mean CIFAR10"),
    (ALL, "--datasets cats", "allowed: digits, CIFAR10, CIFAR100"),
    (ALL, "--corrupt 1.01", "--corrupt: '1.01' is not a number from 0 to 1"),
    (ALL, "--corrupt -0.1", "--corrupt: '-0.1' is not a number from 0 to 1"),
    (ALL, "--corrupt nan", "--corrupt: 'nan' is not a number from 0 to 1"),
    (ALL, "--corrupt some", "--corrupt: 'some' is not a number from 0 to 1"),
    (ALL, "--smalldatasets 0", "--smalldatasets: '0' is not a number above 0, at most 1"),
    (ALL, "--smalldatasets 2", "--smalldatasets: '2' is not a number above 0, at most 1"),
    ((SGD,), "--smalldatasets 1e-9", "--smalldatasets 1e-09: keeps none of 1437 images"),
    (ALL, "--epochs 0", "--epochs: '0' is not a whole number from 1"),
    (ALL, "--epochs 2.5", "--epochs: '2.5' is not a whole number from 1"),
    (ALL, "--test-batch-size 0", "--test-batch-size: '0' is not a whole number from 1"),
    (ALL, "--batch-size 0", "--batch-size: '0' is not a whole number from 1"),
    (ALL, "--start-epoch -1", "--start-epoch: '-1' is not a whole number from 0"),
    (ALL, "--epochs 3 --start-epoch 3", "--epochs 3: allowed: above --start-epoch 3"),
    (ALL, "--workers -1", "--workers: '-1' is not a whole number from 0"),
    (ALL, "--save-every 0", "--save-every: '0' is not a whole number from 1"),
    (ALL, "--randomseed -1", "--randomseed: '-1' is not a whole number from 0"),
    (ALL, "--randomseed 99999999999999999999", "is not a whole number from 0 to 2³¹ − 1"),
    (ALL, "--batch-size 99999999999999999999", "is not a whole number from 1 to 2³¹ − 1"),
    (ALL, "--weight-decay inf", "--weight-decay/--wd: 'inf' is not a number from 0"),
    (ALL, "--device tpu", "--device tpu: torch sees no such device here; allowed: auto, cpu"),
    (ALL, "--mean 0.5", "--mean: expected 3 arguments"),
    (ALL, "--std 0 1 1", "--std: '0' is not a number above 0, at most 1"),
    (ALL, "--no-augment=1", "ignored explicit argument '1'"),
    (ALL, "--no-flip=1", "ignored explicit argument '1'"),
    ((PSGD, PBFGS), "--mean 0 0 0", "--mean: [0.0, 0.0, 0.0] here, None in"),
    ((PSGD, PBFGS), "--no-flip", "--no-flip: True here, None in"),
    (ALL, "--image-size 0", "--image-size: '0' is not a whole number from 1"),
    ((SGD,), "--image-size 32", "--image-size 32: allowed with digits: 8"),
    ((PSGD, PBFGS), "--image-size 32", "--image-size: 32 here, 8 in"),
    (ALL, "--nonsense", "unrecognized arguments: --nonsense"),
    (ALL, "--batch 3", "unrecognized arguments: --batch 3; did you mean --batch-size?"),
    (ALL, "--Dataset=digits", "unrecognized arguments: --Dataset=digits; did you mean --datasets?"),
    ((PSGD, PBFGS), "--n_component 3", "did you mean --n_components?"),
    (ALL, "--pretrained nowhere.th", "--pretrained: nowhere.th: there is no such file"),
    (ALL, "--resume nowhere.pt", "--resume: nowhere.pt: there is no such file"),
    (ALL, "--resume --overwrite", "--overwrite: not with --resume"),
    (ALL, "--evaluate --save-dir nowhere", "--evaluate: nowhere"),
    ((SGD,), "--datasets ImageFolder --data-dir nowhere", "has no directory nowhere/train"),
    ((SGD, PSGD), "--lr -1", "--lr/--learning-rate: '-1' is not a number from 0"),
    ((SGD, PSGD), "--lr nan", "'nan' is not a number from 0"),
    ((SGD, PSGD), "--momentum 2", "--momentum: '2' is not a number from 0 to 1"),
    ((SGD, PSGD), "--milestones 3.5", "--milestones: '3.5' is not a whole number from 0"),
    ((SGD,), "--optimizer lbfgs", "there is no optimizer 'lbfgs'; allowed: sgd, adam, adamw"),
    ((SGD,), "--pretrained", "torchvision has no weights for resnet8; name a file"),
    ((SGD, PSGD), "--schedule step", "--schedule: there is no schedule 'step'; allowed: cosine"),
    ((SGD, PSGD), "--schedule cosine --milestones 3", "--milestones: not allowed with argument"),
    ((SGD,), "--arch alexnet", "--arch alexnet: cannot take images of 8 × 8 pixels"),
    ((PSGD, PBFGS), "--n_components 0", "is not a whole number from 1, or a fraction"),
    ((PSGD, PBFGS), "--n_components 1.5", "is not a whole number from 1, or a fraction"),
    ((PSGD, PBFGS), "--n-components all", "is not a whole number from 1, or a fraction"),
    ((PSGD, PBFGS), "--n_components 7", "--n_components: 7 of 7 samples; allowed: at most 6"),
    ((PSGD, PBFGS), "--n_components 3 --params_stride 3", "3 of 3 samples; allowed: at most 2"),
    ((PSGD, PBFGS), "--params_end 8", "lacks the samples 7; there are 0, 1, …, 6"),
    ((PSGD, PBFGS), "--params_end 51", "lacks the samples 7, 8, …, 50; there are 0, 1, …, 6"),
    ((PSGD, PBFGS), "--params_start 7", "--params_end 7: allowed: above --params_start 7"),
    ((PSGD, PBFGS), "--params_stride 0", "'0' is not a whole number from 1"),
    ((PSGD, PBFGS), "--arch resnet20", "--arch: resnet20 here, resnet8 in"),
    ((PSGD, PBFGS), "--datasets MNIST", "--datasets: MNIST here, digits in"),
    ((PSGD, PBFGS), "--corrupt 0.2", "--corrupt: 0.2 here, 0.0 in"),
    ((PSGD, PBFGS), "--randomseed 2", "--randomseed: 2 here, 1 in"),
    ((PSGD, PBFGS), "--smalldatasets 0.5", "--smalldatasets: 0.5 here, None in"),
    ((PSGD, PBFGS), "--save-dir nowhere", "--save-dir nowhere: there is no such directory"),
    ((PBFGS,), "--alpha -1", "--alpha: '-1' is not a number from 0"),
    ((PBFGS,), "--gamma 2", "--gamma: '2' is not a number from 0 to 1"),
    ((PBFGS,), "--accumulate 0", "--accumulate: '0' is not a whole number from 1"),
    ((PBFGS,), "--lr 1", "unrecognized arguments: --lr 1"),
    (ALL, "--arch ResNet21", "there is no network 'ResNet21'; did you mean resnet"),
    (ALL, "--datasets Cifar-10", "there is no dataset 'Cifar-10'; did you mean CIFAR10"),
    ((SGD,), "--optimizer AdamWW", "there is no optimizer 'AdamWW'; did you mean adamw or adam?"),
    (ALL, "--arch ''", "there is no network ''; allowed: resnet8"),
    (ALL, "--arch", "expected one argument"),
    (ALL, "--datasets ''", "there is no dataset ''; allowed: digits, CIFAR10"),
    (ALL, "--datasets digit", "did you mean digits?"),
    (ALL, "--data-dir", "expected one argument"),
    (ALL, "--save-dir", "expected one argument"),
    (ALL, "--epochs", "expected one argument"),
    (ALL, "--start-epoch 200", "--epochs 2: allowed: above --start-epoch 200"),
    ((SGD,), "--image-size 9", "--image-size 9: allowed with digits: 8"),
    ((PSGD, PBFGS), "--image-size 9", "--image-size: 9 here, 8 in"),
    (ALL, "--resume .", "--resume: .: there is no such file"),
    (ALL, "--resume=nowhere.pt --overwrite", "--overwrite: not with --resume; allowed: one of"),
    (ALL, "--pretrained .", "--pretrained: .: there is no such file"),
    (ALL, "--evaluate --pretrained nowhere.th", "--pretrained: nowhere.th: there is no such file"),
    (ALL, "--evaluate --resume nowhere.pt", "--resume: nowhere.pt: there is no such file"),
    (ALL, "--evaluate --resume --save-dir nowhere", "--evaluate: nowhere"),
    (ALL, "--device ''", "--device : torch sees no such device here"),
    (ALL, "--device cuda:0", "--device cuda:0: torch sees no such device here"),
    (ALL, "--half=yes", "ignored explicit argument 'yes'"),
    (ALL, "--half yes", "unrecognized arguments: yes"),
    (ALL, "--tf32=1", "ignored explicit argument '1'"),
    (ALL, "--compile=yes", "ignored explicit argument 'yes'"),
    (ALL, "--deterministic=1", "ignored explicit argument '1'"),
    (ALL, "--evaluate=1", "ignored explicit argument '1'"),
    (ALL, "--overwrite=no", "ignored explicit argument 'no'"),
    (ALL, "--channels-last=no", "ignored explicit argument 'no'"),
    (ALL, "extra", "unrecognized arguments: extra"),
    (ALL, "--save-dir /dev/null", "--save-dir /dev/null: not a directory"),
    ((SGD,), "--save-dir /dev/null/run", "Not a directory: '/dev/null/run'"),
    ((SGD,), "--datasets ImageFolder --data-dir /dev/null", "/dev/null: not a directory"),
    ((SGD,), "--datasets ImageNet --data-dir nowhere", "has no directory nowhere/train"),
    ((SGD,), "--datasets CIFAR10 --image-size 8", "--image-size 8: allowed with CIFAR10: 32"),
    ((SGD,), "--optimizer ''", "there is no optimizer ''; allowed: sgd, adam, adamw"),
    ((SGD,), "--milestones 3 x", "'x' is not a whole number from 0"),
    ((SGD,), "--params_end 5", "unrecognized arguments: --params_end 5"),
    ((SGD, PSGD), "--alpha 1", "unrecognized arguments: --alpha 1"),
    ((PSGD, PBFGS), "--optimizer adam", "unrecognized arguments: --optimizer adam"),
    ((PSGD, PBFGS), "--basis-dtype float16", "there is no type 'float16'; did you mean"),
    ((PSGD, PBFGS), "--basis-dtype ''", "there is no type ''; allowed: float32, bfloat16"),
    ((PSGD, PBFGS), "--params_end 0", "--params_end 0: allowed: above --params_start 0"),
    ((PSGD, PBFGS), "--params_start 5 --params_end 3", "allowed: above --params_start 5"),
    ((PSGD, PBFGS), "--params_start 5", "--n_components: 3 of 2 samples; allowed: at most 1"),
    ((PSGD, PBFGS), "--params_stride 2147483647", "3 of 1 samples; allowed: at most 0"),
    ((PSGD, PBFGS), "--params_end 1 --n_components 0.5", "0.5 of 1 samples; allowed: at most 0"),
    ((PSGD, PBFGS), "--n_components 99999999999999999999", "allowed: at most 6"),
    ((PSGD, PBFGS), "--save-dir .", ". lacks the samples 0, 1, …, 6; there are none"),
    ((PSGD, PBFGS), "--basis nowhere.npz", "--basis: nowhere.npz: there is no such file"),
    ((PSGD, PBFGS), "--basis pcb", "there is no basis 'pcb'; did you mean pca?"),
    ((PSGD, PBFGS), "--basis foo", "allowed: pca, schmidt, random or a file, .npz or .npy"),
    ((PSGD, PBFGS), "--basis ''", "allowed: pca, schmidt, random or a file, .npz or .npy"),
    ((PSGD, PBFGS), "--basis .", "there is no basis '.'; allowed: pca, schmidt, random or a file"),
    ((PSGD,), f"--basis {300 * 'x'}.npz", "is not a path; its names have 1 to 255 bytes"),
    ((PSGD, PBFGS), "--basis random --n_components 0.5", "0.5: allowed with --basis random: a"),
    (
        (PSGD, PBFGS),
        "--basis random --n_components 2147483647",
        "2147483647: allowed with --basis random: a",
    ),
    ((PSGD, PBFGS), "--start 7", "7.pt: there is no such file"),
    ((PSGD, PBFGS), "--bn-update=1", "ignored explicit argument '1'"),
    ((SGD,), "--sample-every", "argument --sample-every: expected one argument"),
    ((SGD,), "--sample-every 0", "--sample-every: '0' is not a whole number from 1"),
    (ALL, "--sync-bn=1", "argument --sync-bn: ignored explicit argument"),
    (ALL, "--sync-bn", "--sync-bn: allowed on CUDA"),
    ((PSGD, PBFGS), "--shard-basis=1", "argument --shard-basis: ignored explicit argument"),
    ((PSGD, PBFGS), "--shard-basis --basis random", "--shard-basis: not with --basis random"),
    ((SGD,), "--average 3", "expected 2 arguments"),
    ((SGD,), "--run mine", "--run: only with --average; allowed: --save-dir"),
    ((SGD,), "--average 3 3", "[3, 3]: allowed: START below END"),
    ((SGD,), "--average 0 3", "new: there is no such directory"),
    ((SGD,), "--average x 3", "'x' is not a whole number from 0"),
    ((PBFGS,), "--momentum 0.9", "unrecognized arguments: --momentum 0.9"),
    ((PBFGS,), "--milestones 3", "unrecognized arguments: --milestones 3"),
    ((report,), "", "the following arguments are required: SAVE_DIR"),
    ((report,), "nowhere", "nothing to report: nowhere: there is no config.json"),
    ((report,), ".", "nothing to report: .: there is no config.json"),
    ((report,), "/dev/null", "nothing to report: /dev/null: there is no config.json"),
    ((report,), "--nonsense .", "unrecognized arguments: --nonsense"),
    ((report,), "--out", "argument --out: expected one argument"),
    ((report,), "--out= .", "argument --out: '' is not a path; its names have 1 to 255 bytes"),
    ((report,), "--arch", "argument --arch: expected one argument"),
    ((report,), "--data-dir", "argument --data-dir: expected one argument"),
    (
        (report,),
        "--device xpu .",
        "--device xpu: torch sees no such device here; allowed: auto, cpu",
    ),
    ((report,), "--no-data=1 .", "argument --no-data: ignored explicit argument '1'"),
    ((report,), "--seeds=3 .", "unrecognized arguments: --seeds=3"),
    ((report,), "--help=all", "ignored explicit argument 'all'"),
    ((SGD,), "--resume ''", "--resume"),
    ((SGD,), "--resume '' --overwrite", "--resume"),
    ((SGD,), "--pretrained ''", "--pretrained"),
    ((SGD,), "--save-dir ''", "--save-dir"),
    ((SGD,), f"--save-dir {300 * 'x'}", "--save-dir"),
    ((PSGD,), f"--save-dir {300 * 'x'}", "--save-dir"),
    ((SGD,), f"--datasets ImageFolder --data-dir {300 * 'x'}", "--data-dir"),
    ((SGD,), f"--datasets MNIST --data-dir {300 * 'x'}", "--data-dir"),
    ((PSGD,), "--lr 1e39", "'1e39' is not a number from 0"),
    ((PBFGS,), "--alpha 1e39", "'1e39' is not a number from 0"),
    (ALL, "--threads 0", "'0' is not a whole number from 1 to 1024"),
    (ALL, "--threads 2147483647", "is not a whole number from 1 to 1024"),
    (ALL, "--threads many", "is not a whole number from 1 to 1024"),
    ((SGD,), "--average 0 2147483647", "--save-dir new: there is no such directory"),
    ((PSGD,), "--params_end 2147483647", "lacks the samples 7, 8, …, 2147483646"),
    ((PSGD,), "--basis random --n_components 75291", "75291"),
    ((SGD,), "--arch resnet18 --batch-size 1", "--batch-size 1"),
    ((SGD,), "--arch resnet18 --smalldatasets 0.001", "--smalldatasets 0.001"),
    ((SGD,), "--evaluate --pretrained RUN/model.th --resume nowhere.pt", "--resume"),
    ((PSGD,), "--start mean --pretrained RUN/model.th", "--start"),
]

# (scripts, options, what each of them allows, values that are not that)
WHOLE = "1.5 1e3 0x10 inf nan many '' 2147483648"
NUMBER = "nan inf some 40% 0,4 ''"
BAD_TYPES = [
    (
        ALL, "--epochs --batch-size --print-freq --save-every --image-size",
        "a whole number from 1 to 2³¹ − 1", f"0 -1 {WHOLE}",
    ),
    (
        ALL, "--start-epoch --workers --randomseed",
        "a whole number from 0 to 2³¹ − 1", f"-1 {WHOLE}",
    ),
    (ALL, "--corrupt", "a number from 0 to 1", f"-0.1 1.01 {NUMBER}"),
    (ALL, "--smalldatasets", "a number above 0, at most 1", f"-0.5 0 1.01 {NUMBER}"),
    (ALL, "--weight-decay", "a number from 0", f"-1 1e999 {NUMBER}"),
    ((SGD, PSGD), "--lr", "a number from 0", f"-1 1e999 {NUMBER}"),
    ((SGD, PSGD), "--momentum", "a number from 0 to 1", f"-0.1 1.01 {NUMBER}"),
    ((SGD, PSGD), "--milestones", "a whole number from 0 to 2³¹ − 1", f"-1 1,2 {WHOLE}"),
    (
        (PSGD, PBFGS), "--params_start --params_end",
        "a whole number from 0 to 2³¹ − 1", f"-1 {WHOLE}",
    ),
    ((PSGD, PBFGS), "--params_stride", "a whole number from 1 to 2³¹ − 1", f"0 -1 {WHOLE}"),
    (
        (PSGD, PBFGS), "--n_components",
        "a whole number from 1, or a fraction of the variance between 0 and 1",
        f"0 -1 0.0 -0.5 1.0 1.5 1e2 {NUMBER}",
    ),
    ((PSGD, PBFGS), "--start", "the number of a sample, or mean", f"-1 median {WHOLE}"),
    ((SGD, PSGD, PBFGS), "--run", "a name like psgd_random", "'' . .. ../x a/b /tmp 1 _ -1 'a b'"),
    ((PBFGS,), "--alpha", "a number from 0", f"-1 1e999 {NUMBER}"),
    ((PBFGS,), "--gamma", "a number from 0 to 1", f"-0.1 1.01 {NUMBER}"),
    ((PBFGS,), "--accumulate", "a whole number from 1 to 2³¹ − 1", f"0 -1 {WHOLE}"),
]  # fmt: skip
CASES = [(script, *case) for scripts, *case in BAD_VALUES for script in scripts]
TYPES = [
    (script, option, *case)
    for scripts, options, *case in BAD_TYPES
    for script in scripts
    for option in options.split()
]


def files(directory: Path) -> list:
    """Everything below a directory; of files the time of change and a hash of the content."""
    return sorted(
        (file, file.stat().st_mtime_ns, hash(file.read_bytes())) if file.is_file() else (file,)
        for file in directory.rglob("*")
    )


@pytest.fixture(scope="module")
def save_dir(sampled, tmp_path_factory):
    """The trajectory alone: no test may add to it."""
    return shutil.copytree(sampled, tmp_path_factory.mktemp("bad") / "run")


@pytest.fixture
def refuse(save_dir, tmp_path, refused, monkeypatch):
    """Call a script with bad options on good ones; its line says what is wrong with which.

    SGD gets a new save dir, the others one with a trajectory; nothing is written in either.
    """
    monkeypatch.chdir(tmp_path)
    base = [*DIGITS, "--epochs", "2", "--save-dir", str(save_dir)]
    samples = ["--params_end", "7", "--n_components", "3"]
    bases = {SGD: [*base[:-1], "new"], PSGD: base + samples, PBFGS: base + samples, report: []}
    before = files(save_dir)

    def call(script, options: str, message: str) -> None:
        given = [*bases[script], *shlex.split(options)]
        line = refused(script.main, given)
        assert message in line
        flags = [word.partition("=")[0] for word in given if word[:2] == "--"]
        assert "arguments" in line or not flags or any(flag in line for flag in flags)
        assert files(save_dir) == before
        assert list(tmp_path.iterdir()) == []

    return call


@pytest.mark.parametrize(("script", "options", "message"), CASES)
def test_refused(script, options, message, refuse):
    refuse(script, options, message)


@pytest.mark.parametrize(("script", "option", "allowed", "values"), TYPES)
def test_values_of_another_type_or_out_of_range(script, option, allowed, values, refuse):
    for value in shlex.split(values):
        refuse(script, f"{option} {shlex.quote(value)}", f"{value!r} is not {allowed}")


@pytest.mark.parametrize("script", [*ALL, report])
def test_every_option_is_tried(script):
    """Oracle: --help; an option without a bad value in the tables fails here."""
    words = [word for case in CASES + TYPES if case[0] is script for word in case[1].split()]
    tried = {word.partition("=")[0] for word in words}
    for action in script.get_options()._actions[1:]:
        assert not action.option_strings or tried & set(action.option_strings), action


@pytest.mark.parametrize(
    "options",
    [
        "--corrupt 2",
        "--epochs 2 --start-epoch 2",
        "--smalldatasets 1e-9",
        "--arch alexnet",
        "--pretrained nowhere.th",
        "--pretrained",
        "--datasets ImageFolder --data-dir nowhere",
        "--resume",
    ],
)
def test_what_is_refused_overwrites_nothing(options, save_dir, refused, monkeypatch, tmp_path):
    """Also what is refused late, once --overwrite is known to be asked for."""
    monkeypatch.chdir(tmp_path)
    before = files(save_dir)
    line = refused(SGD.main, [*DIGITS, "--save-dir", save_dir, "--overwrite", *options.split()])
    assert any(word in line for word in options.split() if word.startswith("--"))
    assert files(save_dir) == before


def test_compile_is_refused_where_there_is_no_compiler(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    options = ["--device", "cpu", "--compile", "--save-dir", tmp_path / "new"]
    assert "--compile: needs a C++ compiler" in refused(SGD.main, [*DIGITS, *options])
    assert list(tmp_path.iterdir()) == []


# (arguments of run.sh, its settings, what the line says)
RUN_SH = [
    ("cats", "", "run.sh: there is no experiment 'cats'; allowed: cifar, cifar-dimensions, "),
    ("--seed", "", "run.sh: there is no experiment '--seed'; allowed: cifar, cifar-dimensions, "),
    ("digits cifar", "", "run.sh: takes one experiment"),
    ("cifar cifar", "c=2", "run.sh: takes one experiment"),
    ("digits", "c=2", "--corrupt: '2' is not a number from 0 to 1"),
    ("cifar", "seed=-1", "--randomseed: '-1' is not a whole number from 0"),
    ("digits", "model=resnet21", "--arch: there is no network 'resnet21'; did you mean"),
]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """All of RUN_SH, on a copy of the project: they run at once, most of each is starting torch."""
    project = tmp_path_factory.mktemp("run_sh")
    for name in ("run.sh", "requirements.txt", *(file.name for file in ROOT.glob("*.py"))):
        shutil.copy(ROOT / name, project)
    for name in ("models", "experiments"):
        shutil.copytree(ROOT / name, project / name)
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    kept |= {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    before = files(project)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = []
    for words, settings, _ in RUN_SH:
        environment = kept | dict(word.split("=") for word in shlex.split(settings))
        command = ["bash", "run.sh", *words.split()]
        processes.append(subprocess.Popen(command, cwd=project, env=environment, **pipes))
    yield project, before, processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", range(len(RUN_SH)))
def test_run_sh_refuses(number, started):
    """What a script refuses is on stdout, after the command, as a log would have it."""
    project, before, processes = started
    out, error = processes[number].communicate(timeout=200)
    assert processes[number].returncode == 2, out + error
    lines, message = (out + error).splitlines(), RUN_SH[number][-1]
    assert message in lines[-1]
    if message.startswith("run.sh: "):
        assert (len(lines), out) == (1, "")
    else:
        assert (len(lines), error) == (2, "")
        assert lines[0].startswith("[1/")
    assert files(project) == before


@pytest.mark.parametrize("option", ["--save-dir", "--data-dir"])
def test_a_directory_that_one_may_not_enter(option, refused, tmp_path, monkeypatch):
    """Root may enter any, so the system's answer is made up."""
    secret, exists = tmp_path / "secret", Path.exists

    def entered(path):
        if path == secret:
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", entered)
    line = refused(SGD.main, [*DIGITS, "--save-dir", tmp_path / "run", option, secret])
    assert f"{option}: " in line
    assert "Permission denied" in line


def test_cuda_is_refused_where_there_is_none(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused(SGD.main, [*DIGITS, "--device", "cuda", "--save-dir", tmp_path / "new"])
    assert "--device cuda" in line
    assert "allowed: auto, cpu" in line
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_run_is_not_overwritten(save_dir, refused):
    before = files(save_dir)
    line = refused(SGD.main, [*DIGITS, "--epochs", "1", "--save-dir", save_dir])
    assert "--resume" in line
    assert "--overwrite" in line
    assert files(save_dir) == before


class Exploit:
    """What a pickle would run when it is read by a loader that is not weights-only."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def broken(name: str, file: Path) -> None:
    """Put a file in place of a good one that is broken in the way of the name."""
    content = torch.load(file, weights_only=True)
    if name == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif name == "empty":
        file.write_bytes(b"")
    elif name == "text":
        file.write_text("weights")
    elif name == "code":
        torch.save({"state_dict": Exploit()}, file)
    elif name == "number":
        torch.save(3, file)
    elif name == "arch":
        network = models.build("resnet20", 10).state_dict()
        states = {"model": network}
        torch.save(content | {"state_dict": network, "states": states, **network}, file)


BROKEN = {
    "truncated": "cannot be read",
    "empty": "cannot be read",
    "text": "cannot be read",
    "code": "cannot be read",
    "number": "",
    "arch": "does not fit --arch resnet8",
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("what", ["3.pt", "checkpoint.pt", "model.th"])
def test_broken_files(what, name, sampled, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(sampled, tmp_path / "run")
    broken(name, run / what)
    before = files(tmp_path)
    script, options = {
        "3.pt": (PSGD, ["--params_end", "7", "--n_components", "3"]),
        "checkpoint.pt": (SGD, ["--resume", "--epochs", "9"]),
        "model.th": (SGD, ["--evaluate"]),
    }[what]
    line = refused(script.main, [*DIGITS, "--save-dir", run, *options])
    assert str(run / what) in line
    assert BROKEN[name] in line
    assert files(tmp_path) == before, "nothing written, and no code run"


def test_resume_of_another_experiment(sampled, refused, tmp_path):
    run = shutil.copytree(sampled, tmp_path / "run")
    before = files(run)
    line = refused(SGD.main, [*DIGITS, "--corrupt", "0.1", "--save-dir", run, "--resume"])
    assert "--corrupt: 0.1 here, 0.0 in" in line
    assert files(run) == before


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (SGD, "--optimizer adam", "--optimizer: adam here, sgd in"),
        (SGD, "--momentum 0", "--momentum: 0.0 here, 0.9 in"),
        (PSGD, "--n_components 2", "--n_components: 2 here, 3 in"),
        (PSGD, "--params_end 6", "--params_end: 6 here, 7 in"),
        (PBFGS, "--alpha 0.1", "--alpha: 0.1 here, 0.0 in"),
    ],
)
def test_resume_with_other_options(script, options, message, sampled, refused, tmp_path):
    run = shutil.copytree(sampled, tmp_path / "run")
    base = [*DIGITS, "--save-dir", str(run), "--epochs", "7"]
    if script is not SGD:
        base += ["--params_end", "7", "--n_components", "3"]
        script.main([*base, "--epochs", "1"])
    before = files(run)
    assert message in refused(script.main, [*base, *options.split(), "--resume"])
    assert files(run) == before


def test_resume_after_the_trajectory_changed(sampled, refused, tmp_path):
    run = shutil.copytree(sampled, tmp_path / "run")
    options = [*DIGITS, "--save-dir", str(run), "--params_end", "4", "--n_components", "3"]
    PSGD.main([*options, "--epochs", "1"])
    SGD.main([*options[:-4], "--epochs", "3", "--lr", "0.02", "--overwrite"])
    assert "made from other samples" in refused(PSGD.main, [*options, "--epochs", "2", "--resume"])


def test_resume_from_elsewhere_does_not_write_over_a_run(sampled, refused, tmp_path):
    run = shutil.copytree(sampled, tmp_path / "run")
    before = files(run)
    options = [*DIGITS, "--epochs", "9", "--save-dir", run, "--resume", sampled / "checkpoint.pt"]
    assert "holds a run" in refused(SGD.main, options)
    assert files(run) == before


def test_a_run_knows_its_own_checkpoint_by_any_path(sampled, tmp_path, monkeypatch):
    run = shutil.copytree(sampled, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    own = str(run / "checkpoint.pt")
    last = SGD.main([*DIGITS, "--epochs", "7", "--save-dir", "run", "--resume", own])
    assert last["epoch"] == 7


def test_resume_does_not_remove_samples_it_knows_nothing_of(sampled, refused, tmp_path):
    run = shutil.copytree(sampled, tmp_path / "run")
    for name in ("config.json", "checkpoint.pt", "metrics.jsonl", "model.th"):
        (run / name).unlink()
    before = files(run)
    assert "holds a run" in refused(SGD.main, [*DIGITS, "--save-dir", run, "--resume"])
    assert files(run) == before


def test_report_does_not_mix_experiments(sampled, tmp_path, capsys):
    run = shutil.copytree(sampled, tmp_path / "run")
    options = [*DIGITS, "--save-dir", str(run)]
    PSGD.main([*options, "--params_end", "4", "--n_components", "3", "--epochs", "1"])
    SGD.main([*options, "--epochs", "1", "--corrupt", "0.5", "--overwrite"])
    table = report.main([str(run), "--no-data", "--out", str(tmp_path / "out")])
    assert [row["method"] for row in table] == ["SGD"]
    assert "psgd: not of the experiment" in capsys.readouterr().err


def test_samples_alone_are_not_overwritten_and_other_files_never(sampled, refused, tmp_path):
    run = shutil.copytree(sampled, tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "notes.pt").write_text("mine")
    options = [*DIGITS, "--epochs", "1", "--save-dir", run]
    assert "--overwrite" in refused(SGD.main, options)
    SGD.main([str(option) for option in options] + ["--overwrite"])
    assert {file.name for file in run.glob("*.pt")} == {"0.pt", "1.pt", "checkpoint.pt", "notes.pt"}


def test_a_config_that_is_no_json(sampled, refused, tmp_path):
    run = shutil.copytree(sampled, tmp_path / "run")
    for content in ("{", "[]", json.dumps({"arch": "resnet8"})):
        (run / "config.json").write_text(content)
        line = refused(PSGD.main, [*DIGITS, "--save-dir", run, "--params_end", "7"])
        assert str(run / "config.json") in line


def test_without_a_network_the_way_out_is_said(refused, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    for name in ("CIFAR10", "CIFAR100", "MNIST"):
        options = [
            "--datasets",
            name,
            "--data-dir",
            tmp_path / "data",
            "--save-dir",
            tmp_path / "a",
        ]
        line = refused(SGD.main, options)
        assert "--data-dir" in line
        assert "--datasets digits" in line
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / part / name / "0.png")
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [8, 80])
def test_image_folders_that_are_not_whole(size, workers, folder, refused, tmp_path):
    options = ["--datasets", "ImageFolder", "--data-dir", folder, "--image-size", size]
    options += ["--arch", "resnet8", "--save-dir", tmp_path / "run", "--workers", workers]
    image = folder / "train" / "dog" / "0.png"
    image.write_text("no image")
    (folder / "train" / "cat" / "1.png").write_bytes(b"")
    assert refused(SGD.main, options).endswith(".png: not a readable image")
    image.unlink()
    assert "dog" in refused(SGD.main, options)
    (folder / "train" / "dog").rmdir()
    assert "in training or test only: dog" in refused(SGD.main, options)
    shutil.rmtree(folder / "test")
    assert f"{folder}/test or {folder}/val" in refused(SGD.main, options)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_report_of_nothing(refused, tmp_path):
    assert "nothing to report" in refused(report.main, [tmp_path])


def test_the_line_is_all_that_a_terminal_shows(tmp_path):
    command = [sys.executable, Path(SGD.__file__), "--corrupt", "2"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == ""
    start = "train_sgd.py: argument --corrupt: '2' is not a number from 0 to 1"
    assert run.stderr == start + " (--help lists the options)\n"


@pytest.mark.parametrize("script", [*ALL, report])
@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--help"], 0, "show this help"),
        (["--nonsense"], 2, "unrecognized arguments: --nonsense"),
        (["--arch", "resnet21"], 2, "there is no network 'resnet21'"),
        (["--datasets", "cats"], 2, "there is no dataset 'cats'"),
        (["--corrupt", "2"], 2, "'2' is not a number from 0 to 1"),
        ([], 130, "stopped by SIGINT"),
    ],
)
def test_answers_do_not_wait_for_torch(options, code, says, script, tmp_path):
    """Oracle: a torch that is Ctrl-C at its import, as it comes while one waits for it."""
    if script is report and code:
        options = ["."] if code == 130 else [".", "--nonsense"]
        says = says if code == 130 else "unrecognized arguments: --nonsense"
    for package in ("torch", "jinja2"):
        code_of = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
        (tmp_path / f"{package}.py").write_text(code_of)
    command = [sys.executable, Path(script.__file__), *options]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    assert says in run.stdout + run.stderr
    assert len(run.stderr.splitlines()) == (code > 0)


def test_names_known_without_torch_are_all_there_are():
    """Oracles: torchvision's list, and the datasets that can be read."""
    assert torchvision.models.list_models(module=torchvision.models) == names.LARGE
    assert tuple(utils.DATASETS) == names.DATASETS


def test_case_does_not_matter():
    words = "--datasets cifar10 --arch ResNet20 --optimizer AdamW --schedule Cosine --device CPU"
    args = train_sgd.get_options().parse_args(words.split())
    found = args.datasets, args.arch, args.optimizer, args.milestones, args.device
    assert found == ("CIFAR10", "resnet20", "adamw", "cosine", "cpu")
    words = "--basis PCA --start Mean --basis-dtype BFloat16"
    args = train_psgd.get_options().parse_args(words.split())
    assert (args.basis, args.start, args.basis_dtype) == ("pca", "mean", "bfloat16")


@pytest.mark.parametrize("script", ALL)
def test_help_groups_its_options(script):
    text = script.get_options().format_help()
    groups = ["data", "network", "training", "subspace", "run", "machine"]
    expected = [group for group in groups if script is not SGD or group != "subspace"]
    assert re.findall(r"^(\w.*):$", text, re.MULTILINE) == ["options", *expected]
    ungrouped = text.split("options:")[1].split("data:")[0]
    assert re.findall(r"--\S+", ungrouped) == ["--help"]


@pytest.mark.parametrize("script", ALL)
def test_help_tells_every_default(script, capsys):
    with pytest.raises(SystemExit) as exit:
        script.main(["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for action in script.get_options()._actions[1:]:
        assert action.help
        if action.nargs != 0 and action.default is not None:
            assert f"(default: {action.default})" in text
    assert "(default: 128)" in text
