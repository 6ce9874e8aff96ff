"""run.sh and experiments/*.sh, on a copy with stub scripts.

Oracles: the published commands, exit codes, a real venv.
"""

import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import train_sgd

ROOT = Path(__file__).parent.parent
STUB = """
import os, sys
options = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
os.makedirs(options["--save-dir"], exist_ok=True)
name = os.path.basename(sys.argv[0]).removesuffix(".py")
print(f"{name} by {sys.executable}")
sys.stderr.write(f"errors on a terminal: {sys.stderr.isatty()}\\n")
print("bars as", os.environ["TQDM_BAR_FORMAT"])
sys.exit(int(os.environ.get(name, 0)))
"""
METADATA = "Metadata-Version: 2.1\nName: tiny\nVersion: 1.5\n"


@pytest.fixture
def project(tmp_path):
    """run.sh and the experiments, stub scripts, and requirements of one package called tiny."""
    shutil.copy(ROOT / "run.sh", tmp_path)
    (tmp_path / "experiments").mkdir()
    for file in ROOT.glob("experiments/*.sh"):
        shutil.copy(file, tmp_path / "experiments")
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


def settings(environment: dict[str, object]) -> dict[str, str]:
    """The environment of ./run.sh with this interpreter as python3."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    kept["PATH"] = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return kept | {name: str(value) for name, value in environment.items()}


def run(project: Path, *arguments: str, **environment: object) -> subprocess.CompletedProcess:
    """./run.sh with the settings given."""
    command = ["bash", project / "run.sh", *arguments]
    return subprocess.run(command, env=settings(environment), capture_output=True, text=True)


def commands(output: str) -> list[list[str]]:
    """The echoed commands, each sorted: the order of options is free."""
    lines = re.findall(r"^\[\d+/\d+\] \S+ -u (\S+) (.*)$", output, re.MULTILINE)
    return [[name, *sorted(options.replace("=", " ").split(" --"))] for name, options in lines]


def reported(output: str) -> list[str]:
    """The save dirs of the report, which is the last line."""
    report, of, _, *save_dirs = output.splitlines()[-1].split()
    assert (report, of) == ("report", "of")
    return save_dirs


def check_baselines(psgd: list[str], baselines: list[list[str]], averaged: str) -> None:
    """The random subspace is trained as that of the samples, and the average is of `averaged`."""
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
[1/3] python -u train_sgd.py {same} --lr 0.1 --epochs 150
[2/3] python -u train_pbfgs.py {same} --epochs 20 {subspace} --batch-size 1024
[3/3] python -u train_psgd.py {same} --epochs 40 --lr 1 {subspace} --batch-size 128
"""

    def normal(lines):
        return [
            [first, *sorted(part.removeprefix("--") for part in rest)] for first, *rest in lines
        ]

    lines = commands(done.stdout)
    assert normal(lines[:3]) == normal(commands(published))
    check_baselines(lines[2], lines[3:5], "41 81")
    others = [" ".join(line) for line in lines[5:]]
    assert ["average 61 81" in line for line in others] == [True, *[False] * 5]
    assert ["average 80 81" in line for line in others] == [False, True, *[False] * 4]
    assert ["start mean" in line for line in others] == [*[False] * 2, *[True] * 3, False]
    last = "--pretrained save_labelnoise0.2_resnet20/80.pt --start-epoch 80 --milestones 80 "
    assert f"{last}--epochs 120\n" in done.stdout
    assert reported(done.stdout) == [
        f"save_labelnoise0.2_resnet20{end}" for end in ("", "_from_80")
    ]
    logs = [project / name / "log.txt" for name in (*reported(done.stdout), "report/cifar")]
    assert "".join(log.read_text() for log in logs) == done.stdout


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
    noises = [name.split("_")[1] for name in reported(done.stdout)]
    assert noises == ["labelnoise0", "labelnoise0.4"]


def test_digits_full_runs_five_noise_levels_over_five_seeds_and_a_curve_over_k(project, tiny):
    done = run(project, "digits-full", seed="4 5", c="0.4 0.6", PYTHONPATH=tiny)
    lines = [" ".join(command) for command in commands(done.stdout)]
    assert len(lines) == 4 * 5 + 2 * 5, "the curve is for c = 0.4 alone"
    assert sum("run psgd_k40" in line and "n_components 40" in line for line in lines) == 2
    assert len(reported(done.stdout)) == 4
    for part in ({"seed": 4}, {"c": 0.6}):
        assert len(reported(run(project, "digits-full", **part, PYTHONPATH=tiny).stdout)) == 5


def test_cifar_small_takes_its_images_from_anywhere(project, tiny):
    options = {"datasets": "ImageFolder", "data_dir": "/data", "options": "--threads 1"}
    done = run(project, "cifar-small", **options, PYTHONPATH=tiny)
    lines = [" ".join(command) for command in commands(done.stdout)]
    assert len(lines) == 4 * 11
    for line in lines:
        assert "datasets ImageFolder" in line
        assert "smalldatasets 0.1" in line
        assert "threads 1" in line
        assert "compile" not in line, "given options take the place of the target's own"
    assert (project / "save_labelnoise0.4_resnet20_0.1_ImageFolder_seed2").is_dir()
    done = run(project, "cifar-small", c=0, seed=1, PYTHONPATH=tiny)
    for command in commands(done.stdout):
        assert {"--datasets CIFAR10", "half", "compile"} <= set(command)


def test_cifar_dimensions_trains_in_the_samples_of_cifar(project, tiny):
    """Oracles: cifar's own lines, and the issue's numbers of dimensions and of sampled epochs."""
    done = run(project, "cifar", c=0.4, PYTHONPATH=tiny)
    sgd, average = commands(done.stdout)[0], commands(done.stdout)[4]
    done = run(project, "cifar-dimensions", c=0.4, PYTHONPATH=tiny)
    assert commands(done.stdout)[:2] == [sgd, average]
    runs = re.findall(r"--params_end (\d+) --n_components (\d+) --run (\S+)", done.stdout)
    fewer = {f"psgd_of_{last}": (last + 1, 20) for last in (20, 40, 60)}
    assert {name: (int(end), int(k)) for end, k, name in runs} == fewer
    assert re.findall(r"--n_components (\d+) --run psgd_k\1\n", done.stdout) == (
        ["2", "5", "10", "20", "40", "80"]
    )
    halves = re.findall(r"--average (\d+) (\d+) --run average_of_(\d+)", done.stdout)
    assert halves == [("11", "21", "20"), ("21", "41", "40"), ("31", "61", "60")]
    assert done.stdout.count("--epochs 10 ") == 9


def test_finetune_starts_from_public_networks(project, tiny, tmp_path):
    """Oracle: the file that is named, and the snapshot that ordinary training goes on from."""
    (tmp_path / "resnet20-1.th").touch()
    settings = {"c": 0.4, "seed": 3, "weights": tmp_path, "PYTHONPATH": tiny}
    lines = [" ".join(command) for command in commands(run(project, "finetune", **settings).stdout)]
    name = "save_labelnoise0.4_resnet20_seed3_finetune_lr0.005"
    first, *others = [line for line in lines if name in line]
    assert f"pretrained {tmp_path}/resnet20-1.th" in first
    assert f"pretrained {name}/30.pt" in others[-1]
    scripts = [line.split()[0] for line in others[1:-1]]
    assert scripts == ["train_psgd.py", "train_pbfgs.py"] * 2 + ["train_pbfgs.py"]


def test_imagenet_is_the_published_experiment(project, tiny):
    done = run(project, "imagenet", data_dir="/data", PYTHONPATH=tiny)
    lines = commands(done.stdout)
    check_baselines(lines[2], lines[3:], "121 241")
    sgd, pbfgs = (" ".join(command) for command in lines[:2])
    for part in ("datasets ImageNet", "arch resnet18", "epochs 90", "sample-every 1000", "lr 0.1"):
        assert part in sgd
    for part in (
        "params_start 0",
        "params_end 241",
        "params_stride 2",
        "n_components 120",
        "epochs 4",
        "batch-size 256",
        "data-dir /data",
    ):
        assert part in pbfgs


def test_tiny_imagenet_has_the_published_schedule_of_cifar_100(project, tiny):
    done = run(project, "tiny-imagenet", data_dir="/data", PYTHONPATH=tiny)
    lines = commands(done.stdout)
    check_baselines(lines[2], lines[3:5], "9 17")
    for line in [" ".join(command) for command in lines]:
        for part in ("datasets ImageFolder", "arch resnet32", "data-dir /data"):
            assert part in line
    milestones = " ".join(map(str, train_sgd.MILESTONES["CIFAR100"]))
    assert {"lr 0.1", f"milestones {milestones}"} <= set(lines[0])
    last = "save_labelnoise0_resnet32_ImageFolder/16.pt --start-epoch 16 --milestones 16"
    assert f"{last} --epochs 21\n" in done.stdout


def test_finetune_imagenet_has_samples_enough(project, tiny):
    """1,281,167 images in batches of 256 are 5,005 steps an epoch."""
    done = run(project, "finetune-imagenet", PYTHONPATH=tiny)
    sgd, *subspaces = (" ".join(command) for command in commands(done.stdout))
    every = int(sgd.split("sample-every ")[1].split()[0])
    assert "pretrained" in sgd
    assert len(subspaces) == 3
    for line, epochs in zip(subspaces, (5, 10, 15), strict=True):
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
def test_without_an_experiment_it_says_which_it_takes(cuda, project, tiny):
    (tiny / "torch.py").write_text(f"class cuda:\n    is_available = lambda: {cuda}")
    done = run(project, PYTHONPATH=tiny)
    first = done.stdout.splitlines()[0]
    assert ("runs cifar" if cuda else "runs digits") in first
    assert "./run.sh --help" in first
    assert ("CIFAR10" in done.stdout) == cuda


def test_a_failing_step_stops_the_chain_with_its_code(project, tiny):
    done = run(project, "digits", train_pbfgs=7, PYTHONPATH=tiny)
    assert done.returncode == 7
    assert [command[0] for command in commands(done.stdout)] == ["train_sgd.py", "train_pbfgs.py"]
    assert "report of" not in done.stdout


def test_another_experiment_is_refused(project, tiny):
    for name in ("cats", "--seed", "common", "../run", "cifar cost"):
        done = run(project, name, PYTHONPATH=tiny)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert f"there is no experiment '{name}'" in line
        assert "allowed: cifar, cifar-dimensions, " in line


def test_gpu_runs_its_program_with_the_modules_beside_run_sh(project, tiny):
    (project / "benchmarks").mkdir()
    program = "import sys, train_sgd; print(*sys.argv); sys.exit(3)"
    (project / "benchmarks" / "gpu.py").write_text(program)
    (project / "train_sgd.py").write_text("")
    (project / "tests").mkdir()
    (project / "tests" / "requirements.txt").write_text("tiny>=1.2\n")
    (tiny / "pytest.py").write_text("import sys; print(*sys.argv[1:])")
    done = run(project, "gpu", PYTHONPATH=tiny)
    assert done.stdout == "--numprocesses 0 -m gpu\nbenchmarks/gpu.py\n"
    assert (done.returncode, done.stderr) == (3, "")


def test_two_experiments_are_refused(project, tiny):
    done = run(project, "digits", "cifar", PYTHONPATH=tiny)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_tells_every_experiment_setting_and_command(option, project):
    """Oracles: the files, and the names they read; what is asked for is not installed for that."""
    done = run(project, option)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (project / ".venv").exists()
    files = [file for file in project.glob("experiments/*.sh") if file.stem != "common"]
    assert len(files) > 10
    for file in files:
        about = file.read_text().splitlines()[0].removeprefix("# ")
        assert re.search(rf"^  {file.stem} +{re.escape(about)}$", done.stdout, re.MULTILINE)
    texts = "".join(file.read_text() for file in project.glob("experiments/*.sh"))
    for setting in set(re.findall(r"\$\{([a-z_]+):?[-+]", texts)) - {"small"}:
        assert re.search(rf"^  {setting} ", done.stdout, re.MULTILINE), setting
    for command in ("test", "bench", "gpu", "lint"):
        assert command in done.stdout.split("experiments")[0]


def test_a_new_experiment_is_a_new_file(project, tiny):
    """Oracle: the settings in the file, and as many runs as it lists."""
    (project / "experiments" / "mine.sh").write_text("""# my data, two learning rates
datasets=ImageFolder
for seed in 1 2; do
    c=0 && trajectory
    for lr in 0.1 0.01; do run train_sgd.py "${common[@]}" --lr $lr --run "it's $lr"; done
done
""")
    assert "  mine               my data, two learning rates\n" in run(project, "--help").stdout
    done = run(project, "mine", PYTHONPATH=tiny, data_dir="/my data")
    lines = [line for line in done.stdout.splitlines() if line[0] == "["]
    assert [line.split()[0] for line in lines] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]", "[report]"]
    assert "--data-dir=/my data --lr 0.01 --run it's 0.01" in lines[1]
    assert len(reported(done.stdout)) == 2


def test_a_finished_experiment_says_so(project, tiny):
    """Oracle: no script starts, and the report is shown, until something has changed."""
    first = run(project, "digits", PYTHONPATH=tiny)
    again = run(project, "digits", PYTHONPATH=tiny)
    assert (again.returncode, commands(again.stdout)) == (0, [])
    assert again.stdout.splitlines()[0] == "run.sh: all 10 runs of digits are finished"
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]

    (project / reported(first.stdout)[0] / "model.th").write_text("another")
    assert len(commands(run(project, "digits", PYTHONPATH=tiny).stdout)) == 10
    assert commands(run(project, "digits", PYTHONPATH=tiny).stdout) == []
    shutil.rmtree(project / reported(first.stdout)[1])
    assert len(commands(run(project, "digits", PYTHONPATH=tiny).stdout)) == 10
    assert len(commands(run(project, "digits", c=0.4, PYTHONPATH=tiny).stdout)) == 5
    assert run(project, "digits", train_pbfgs=7, options="--lr 1", PYTHONPATH=tiny).returncode == 7
    assert len(commands(run(project, "digits", options="--lr 1", PYTHONPATH=tiny).stdout)) == 10


def test_errors_and_bars_are_on_the_terminal(project, tiny):
    """Oracle: what the stub says of its stderr; without a terminal it is in the log."""
    done = run(project, "digits", c=0, PYTHONPATH=tiny)
    assert "errors on a terminal: False\n" in done.stdout
    log = project / reported(done.stdout)[0] / "log.txt"
    assert "errors on a terminal: False\n" in log.read_text()
    ours, its = pty.openpty()
    command = ["bash", project / "run.sh", "digits"]
    environment = settings({"c": 0, "seed": 2, "PYTHONPATH": tiny})
    subprocess.run(command, env=environment, stdout=its, stderr=its, check=True)
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # a terminal whose other side is closed has no end of file
        while part := os.read(ours, 100_000):
            shown += part
    os.close(ours)
    shown = shown.decode()
    assert shown.count("errors on a terminal: True\r\n") == 5
    assert "\r\x1b[K[1/5] " in shown, "a line takes the place of the bar"
    bars = re.findall(r"bars as (.*)\r\n", shown)
    assert bars == [f"[{number}/5] {{l_bar}}{{bar}}{{r_bar}}" for number in range(1, 6)]
    log = project / "save_labelnoise0_resnet20_digits_seed2" / "log.txt"
    assert "\x1b" not in log.read_text()
    assert "train_sgd by" in log.read_text()


@pytest.mark.parametrize("floor", ["1.2", "1.5.0"])
def test_a_current_interpreter_that_has_all_is_used(floor, project, tiny):
    (project / "requirements.txt").write_text(f"tiny>={floor}\n")
    done = run(project, "digits", PYTHONPATH=tiny)
    assert done.returncode == 0, done.stderr
    assert not (project / ".venv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("there", [None, "a .venv as uv makes it"])
def test_a_fresh_machine_gets_a_venv_with_what_is_needed(there, project):
    """tiny is not installed, only to be had from a wheel that pip's settings tell of."""
    if there:
        venv.create(project / ".venv", with_pip=False)
    with zipfile.ZipFile(project / "tiny-1.6-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny-1.6.dist-info/METADATA", METADATA.replace("1.5", "1.6"))
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr("tiny-1.6.dist-info/WHEEL", tags)
        wheel.writestr("tiny-1.6.dist-info/RECORD", "")
    (project / "requirements.txt").write_text("tiny>=1.6\n")
    (project / "pip.conf").write_text(f"[global]\nfind-links = {project}\n")
    offline = {"PIP_NO_INDEX": 1, "PIP_CONFIG_FILE": project / "pip.conf"}
    for installs, c in ((True, 0), (False, 0.4)):
        done = run(project, "digits", c=c, **offline)
        assert done.returncode == 0, done.stderr
        assert f"train_sgd by {project}/.venv/bin/python" in done.stdout
        assert ("installing" in done.stdout) == installs, "the second time it is there"


def test_an_old_python_is_named(project):
    """Oracle: a made-up python3 that says it is 3.9."""
    for name in ("python3", "python"):
        (project / name).write_text("#!/bin/sh\n[ $1 = --version ] && echo Python 3.9.1\n")
        (project / name).chmod(0o755)
    done = run(project, "digits", PATH=f"{project}:/usr/bin:/bin")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "run.sh: needs Python 3.10 or newer; python3 is Python 3.9.1\n"


def test_a_requirement_that_cannot_be_had_stops_it(project, tiny):
    """tiny 1.5 is installed, and a newer one is asked for."""
    (project / "requirements.txt").write_text("tiny>=1.10\n")
    offline = {"PIP_NO_INDEX": 1, "PIP_CONFIG_FILE": os.devnull}
    done = run(project, "digits", PYTHONPATH=tiny, **offline)
    assert done.returncode != 0
    assert "tiny" in done.stderr
    assert "train_sgd" not in done.stdout


def test_a_python_that_the_system_manages_is_asked(tmp_path):
    """PEP 668. Oracle: pip itself, which is installed there."""
    python = Path("/usr/bin/python3")
    if not list(Path("/usr/lib").glob("python3*/EXTERNALLY-MANAGED")):
        pytest.skip("the system manages no Python here")
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("the system's Python has no pip")
    functions = (
        (ROOT / "run.sh").read_text().partition("is_recent()")[2].partition("# Set $python")[0]
    )
    for requirement, code in (("pip>=20", 0), ("pip>=2000", 1)):
        (tmp_path / "needed.txt").write_text(requirement)
        script = f"is_recent(){functions}\nhas {python} --requirement {tmp_path}/needed.txt"
        assert subprocess.run(["bash", "-c", script]).returncode == code
