"""run.sh, on a copy with stub scripts. Oracles: the published commands, exit codes, a real venv."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STUB = """
import os, sys
from pathlib import Path
options = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
Path(options["--save-dir"]).mkdir(exist_ok=True)
name = Path(sys.argv[0]).stem
print(f"{name} by {sys.executable}")
sys.exit(int(os.environ.get(name, 0)))
"""
METADATA = "Metadata-Version: 2.1\nName: tiny\nVersion: 1.5\n"


@pytest.fixture
def project(tmp_path):
    """A directory with run.sh, stub scripts, and requirements of one package called tiny."""
    shutil.copy(ROOT / "run.sh", tmp_path)
    for name in ("train_sgd", "train_pbfgs", "train_psgd"):
        (tmp_path / f"{name}.py").write_text(STUB)
    (tmp_path / "report.py").write_text("import sys; print('report of', *sys.argv[1:])")
    (tmp_path / "requirements.txt").write_text("tiny>=1.2\n")
    return tmp_path


@pytest.fixture
def tiny(tmp_path):
    """A directory that, on PYTHONPATH, is an installation of tiny 1.5."""
    info = tmp_path / "site" / "tiny-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(METADATA)
    return info.parent


def run(project: Path, *arguments: str, **environment: object) -> subprocess.CompletedProcess:
    """./run.sh with this interpreter as python3 and the settings given."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    kept["PATH"] = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    kept |= {name: str(value) for name, value in environment.items()}
    command = ["bash", project / "run.sh", *arguments]
    return subprocess.run(command, env=kept, capture_output=True, text=True)


def commands(output: str) -> list[list[str]]:
    """The echoed commands, each sorted: the order of options is free."""
    lines = [line.split(" -u ")[1].split() for line in output.splitlines() if line[:2] == "+ "]
    lines = [line for line in lines if line[0] != "report.py"]
    return [[line[0], *sorted(" ".join(line[1:]).replace("=", " ").split(" --"))] for line in lines]


def check_baselines(psgd: list[str], baselines: list[list[str]], averaged: str) -> None:
    """The random plane is trained as the samples' is, and the mean is that of `averaged`."""
    random, mean = baselines
    assert sorted([*psgd, "basis random"]) == sorted(random)
    assert f"average {averaged}" in mean


def test_cifar_is_the_published_experiment_with_baselines(project, tiny):
    done = run(project, "cifar", c=0.2, PYTHONPATH=tiny)
    assert done.returncode == 0, done.stderr
    ours = "--randomseed 1 --resume --save-dir save_labelnoise0.2_resnet20"
    same = f"--datasets CIFAR10 --corrupt 0.2 --arch resnet20 {ours}"
    subspace = "--params_start 0 --params_end 81 --n_components 40"
    published = f"""
+ python -u train_sgd.py {same} --lr 0.1 --epochs 150
+ python -u train_pbfgs.py {same} --epochs 20 {subspace} --batch-size 1024
+ python -u train_psgd.py {same} --epochs 40 --lr 1 {subspace} --batch-size 128
"""

    def normal(lines):
        return [
            [first, *sorted(part.removeprefix("--") for part in rest)] for first, *rest in lines
        ]

    lines = commands(done.stdout)
    assert normal(lines[:3]) == normal(commands(published))
    check_baselines(lines[2], lines[3:], "41 81")
    assert done.stdout.endswith("report of save_labelnoise0.2_resnet20\n")
    log = (project / "save_labelnoise0.2_resnet20" / "log.txt").read_text()
    assert log == done.stdout


def test_settings_are_the_published_variables(project, tiny):
    options = {"model": "resnet32", "c": 0.4, "datasets": "CIFAR100", "seed": 2}
    done = run(project, "cifar", **options, data_dir="/data", PYTHONPATH=tiny)
    for command in commands(done.stdout):
        line = " ".join(command)
        assert "arch resnet32" in line
        assert "corrupt 0.4" in line
        assert "datasets CIFAR100" in line
        assert "randomseed 2" in line
        assert "data-dir /data" in line
    assert (project / "save_labelnoise0.4_resnet32_CIFAR100_seed2").is_dir()


def test_digits_runs_clean_and_noisy_labels(project, tiny):
    done = run(project, "digits", PYTHONPATH=tiny)
    assert done.returncode == 0, done.stderr
    lines = commands(done.stdout)
    chain = ["train_sgd.py", "train_pbfgs.py", "train_psgd.py"]
    baselines = ["train_psgd.py", "train_sgd.py"]
    assert [command[0] for command in lines] == (chain + baselines) * 2
    check_baselines(lines[2], lines[3:5], "16 31")
    reported = done.stdout.splitlines()[-1].split()[2:]
    assert [name.split("_")[1] for name in reported] == ["labelnoise0", "labelnoise0.4"]


def test_digits_full_runs_five_noise_levels_over_five_seeds_and_a_curve_over_k(project, tiny):
    done = run(project, "digits-full", seed="4 5", c="0.4 0.6", PYTHONPATH=tiny)
    lines = [" ".join(command) for command in commands(done.stdout)]
    assert len(lines) == 4 * 5 + 2 * 5, "the curve is for c = 0.4 alone"
    assert sum("run psgd_k40" in line and "n_components 40" in line for line in lines) == 2
    assert len(done.stdout.splitlines()[-1].split()[2:]) == 4
    done = run(project, "digits-full", PYTHONPATH=tiny)
    assert len(done.stdout.splitlines()[-1].split()[2:]) == 25


def test_cifar_small_takes_its_images_from_anywhere(project, tiny):
    options = {"datasets": "ImageFolder", "data_dir": "/data", "options": "--threads 1"}
    done = run(project, "cifar-small", **options, PYTHONPATH=tiny)
    lines = [" ".join(command) for command in commands(done.stdout)]
    assert len(lines) == 4 * 5
    for line in lines:
        assert "datasets ImageFolder" in line
        assert "smalldatasets 0.1" in line
        assert "threads 1" in line
        assert "compile" not in line, "given options take the place of the target's own"
    assert (project / "save_labelnoise0.4_resnet20_0.1_ImageFolder_seed2").is_dir()
    done = run(project, "cifar-small", c=0, seed=1, PYTHONPATH=tiny)
    for command in commands(done.stdout):
        assert {"--datasets CIFAR10", "half", "compile"} <= set(command)


def test_finetune_starts_from_what_was_trained(project, tiny):
    done = run(project, "finetune", c=0.4, seed=3, PYTHONPATH=tiny)
    lines = [" ".join(command) for command in commands(done.stdout)]
    trained, *further = lines
    name = "save_labelnoise0.4_resnet20_0.1_seed3"
    assert f"save-dir {name} " in f"{trained} "
    assert all(f"save-dir {name}_finetune" in line for line in further)
    assert f"pretrained {name}/model.th" in further[0]
    assert [line.split()[0] for line in further] == [
        "train_sgd.py", "train_pbfgs.py", "train_psgd.py", "train_sgd.py"
    ]  # fmt: skip
    epochs = [int(line.split("epochs ")[1].split()[0]) for line in further[:3]]
    sampled = int(further[1].split("params_end ")[1].split()[0]) - 1
    assert epochs[0] == sampled + epochs[1] == sampled + epochs[2], "all train as long"


def test_imagenet_is_the_published_experiment(project, tiny):
    done = run(project, "imagenet", data_dir="/data", PYTHONPATH=tiny)
    lines = commands(done.stdout)
    check_baselines(lines[2], lines[3:], "121 241")
    sgd, pbfgs = (" ".join(command) for command in lines[:2])
    for part in ("datasets ImageNet", "arch resnet18", "epochs 90", "sample-every 1000", "lr 0.1"):
        assert part in sgd
    for part in ("params_start 0", "params_end 241", "params_stride 2", "n_components 120",
                 "epochs 4", "batch-size 256", "data-dir /data"):  # fmt: skip
        assert part in pbfgs


def test_finetune_imagenet_has_samples_enough(project, tiny):
    """1,281,167 images in batches of 256 are 5,005 steps an epoch."""
    done = run(project, "finetune-imagenet", PYTHONPATH=tiny)
    sgd, *planes = (" ".join(command) for command in commands(done.stdout))
    every = int(sgd.split("sample-every ")[1].split()[0])
    assert "pretrained" in sgd
    assert len(planes) == 3
    for line, epochs in zip(planes, (5, 10, 15), strict=True):
        end = int(line.split("params_end ")[1].split()[0])
        assert (end - 1) * every == pytest.approx(epochs * 5005, rel=0.01)
        assert (end - 1) * every <= epochs * 5005, "the samples of these epochs"
        assert int(line.split("n_components ")[1].split()[0]) < end


def test_cost_samples_less_and_less(project, tiny):
    done = run(project, "cost", c=0, seed=4, PYTHONPATH=tiny)
    lines = [" ".join(command) for command in commands(done.stdout)]
    for last, k in ((5, 4), (10, 9), (20, 20)):
        own = [line for line in lines if f"_of_{last}" in line]
        assert len(own) == 2
        # The last value of an option counts.
        assert all(f"params_end {last + 1}" in line for line in own)
        assert all(f"n_components {k}" in line for line in own)


@pytest.mark.parametrize("cuda", [True, False])
def test_without_a_target_it_says_which_it_takes(cuda, project, tiny):
    (tiny / "torch.py").write_text(f"class cuda:\n    is_available = lambda: {cuda}")
    done = run(project, PYTHONPATH=tiny)
    first = done.stdout.splitlines()[0]
    assert ("runs cifar" if cuda else "runs digits") in first
    assert "./run.sh [digits|cifar|digits-full" in first
    assert ("CIFAR10" in done.stdout) == cuda


def test_a_failing_step_stops_the_chain_with_its_code(project, tiny):
    done = run(project, "digits", train_pbfgs=7, PYTHONPATH=tiny)
    assert done.returncode == 7
    assert [command[0] for command in commands(done.stdout)] == ["train_sgd.py", "train_pbfgs.py"]
    assert "report of" not in done.stdout


@pytest.mark.parametrize("arguments", [["cats"], ["digits", "cats"], ["--help"]])
def test_another_target_is_refused(arguments, project, tiny):
    done = run(project, *arguments, PYTHONPATH=tiny)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "./run.sh [digits|cifar|digits-full" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("floor", ["1.2", "1.5.0"])
def test_a_current_interpreter_that_has_all_is_used(floor, project, tiny):
    (project / "requirements.txt").write_text(f"tiny>={floor}\n")
    done = run(project, "digits", PYTHONPATH=tiny)
    assert done.returncode == 0, done.stderr
    assert not (project / ".venv").exists()


def test_a_fresh_machine_gets_a_venv_with_what_is_needed(project, tiny):
    """tiny 1.5 is on PYTHONPATH, 1.6 is asked for: it is installed, from a wheel beside."""
    with zipfile.ZipFile(project / "tiny-1.6-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny-1.6.dist-info/METADATA", METADATA.replace("1.5", "1.6"))
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr("tiny-1.6.dist-info/WHEEL", tags)
        wheel.writestr("tiny-1.6.dist-info/RECORD", "")
    (project / "requirements.txt").write_text("tiny>=1.6\n")
    offline = {"PIP_NO_INDEX": 1, "PIP_FIND_LINKS": project, "PIP_CONFIG_FILE": os.devnull}
    for _ in range(2):
        done = run(project, "digits", **offline)
        assert done.returncode == 0, done.stderr
        assert "train_sgd by" in done.stdout
        assert f"{project}/.venv/bin/python" in done.stdout
        installing = "installing" in done.stdout
        assert installing == (_ == 0), "the second time it is there"


def test_a_requirement_that_cannot_be_had_stops_it(project):
    offline = {"PIP_NO_INDEX": 1, "PIP_CONFIG_FILE": os.devnull}
    done = run(project, "digits", **offline)
    assert done.returncode != 0
    assert "tiny" in done.stderr
    assert "train_sgd" not in done.stdout
