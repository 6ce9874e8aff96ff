"""Bad input: exit code 2, one line that names the option or file and what is allowed, no file."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DIGITS, SCRIPTS

import report
import trajectory
from training import options
from training.errors import InputError

SGD, PSGD, PBFGS = SCRIPTS
ALL = (*SCRIPTS, report, trajectory)

# A type of options.py, what it takes and makes of it, what it refuses, words of its message.
WORDS = "1.5 1e3 0x10 inf nan many ''"
TYPES = {
    "positive": (
        options.positive,
        {"1": 1, "2147483647": 2**31 - 1},
        f"0 -1 2147483648 {WORDS}",
        "whole number from 1 to 2³¹",
    ),
    "natural": (options.natural, {"0": 0, "7": 7}, f"-1 2147483648 {WORDS}", "from 0 to 2³¹"),
    "nonnegative": (
        options.nonnegative,
        {"0": 0.0, "1e-4": 1e-4},
        "-1 nan inf 1e39 some 0,4 ''",
        "a number from 0",
    ),
    "fraction": (
        options.fraction,
        {"0": 0.0, "0.4": 0.4, "1": 1.0},
        "-0.1 1.01 nan inf 40% ''",
        "a number from 0 to 1",
    ),
    "above": (
        options.between(float, 0, 1, above=True),
        {"0.1": 0.1, "1": 1.0},
        "0 -1 1.01 nan ''",
        "above 0, at most 1",
    ),
    "components": (
        options.components,
        {"40": 40, "0.99": 0.99},
        "0 -1 0.0 1.0 1.5 1e2 nan inf all ''",
        "whole number from 1, or a fraction",
    ),
    "sample": (options.sample_or_mean, {"0": 0, "Mean": "mean"}, f"-1 median {WORDS}", "or mean"),
    "name": (
        options.run_name,
        {"psgd_random": "psgd_random", "a.b-1": "a.b-1"},
        "'' . .. ../x a/b /tmp 1 _ -1 'a b'",
        "a name like",
    ),
    "path": (
        options.path,
        {"a/b": Path("a/b"), ".": Path()},
        f"'' {'x' * 256} a/{'ä' * 128}",
        "1 to 255 bytes",
    ),
    "basis": (
        options.basis,
        {"PCA": "pca", "/a/mine.npz": "/a/mine.npz"},
        "pcb foo . mine.txt ''",
        "",
    ),
    "one of": (
        options.one_of("dataset", options.DATASETS),
        {"cifar10": "CIFAR10"},
        "CIFAR11 digit ''",
        "",
    ),
}


@pytest.mark.parametrize("name", TYPES)
def test_types(name):
    """Oracle: by hand, at the ends of what is allowed and beyond."""
    parse, taken, refused, words = TYPES[name]
    assert {text: parse(text) for text in taken} == taken
    for text in shlex.split(refused):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(text))) as error:
            parse(text)
        assert words in str(error.value)


def test_near_misses_are_answered_with_the_nearest():
    for text, answer in (("CIFAR11", "did you mean CIFAR10"), ("cats", "allowed: digits, CIFAR10")):
        with pytest.raises(argparse.ArgumentTypeError, match=answer):
            options.one_of("dataset", options.DATASETS)(text)


def test_a_file_is_the_same_from_another_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert options.basis("basis.npy") == f"{tmp_path}/basis.npy"
    assert options.noise("labels.pt:worse") == f"{tmp_path}/labels.pt:worse"


# Of options whose type has a range, a value that is out of it; to all others the text is empty.
OUT_OF_RANGE = """
    --names (; --datasets cats; --image-size 0; --mean 0 0 2; --std 0 1 1; --corrupt 1.01
    --smalldatasets 0; --epochs 0; --start-epoch -1; --batch-size 0
    --weight-decay inf; --randomseed -1; --train-seed -1; --save-every 0; --print-freq 0
    --threads 0; --workers -1; --test-batch-size 0; --run ../x; --lr -1; --momentum 2
    --milestones 3.5; --schedule step; --optimizer lbfgs; --average x 3; --sample-every 0
    --n_components 1.5; --params_start -1; --params_end 1.5; --params_stride 0; --basis foo
    --start best; --basis-dtype float16; --alpha -1; --gamma 2; --accumulate 0
"""


@pytest.mark.parametrize("script", ALL)
def test_every_option_refuses_what_is_not_of_its_type(script):
    """Also a missing value, and one that a flag does not take; the message names the option."""
    parser, bad = script.get_options(), {}
    for words in map(shlex.split, re.split(r"[;\n]", OUT_OF_RANGE.strip())):
        bad[words[0]] = words[1:]
    given = ["."] if script in (report, trajectory) else []
    for action in parser._actions[1:]:
        flag = next((flag for flag in action.option_strings if flag[:2] == "--"), None)
        if flag is None:
            continue
        tries = [[f"{flag}=1"]] if action.nargs == 0 else []
        if action.nargs not in (0, "?", "*"):
            tries.append([flag])
        if action.type not in (None, str.lower):
            tries.append([flag, *bad.get(flag, [""])])
        for words in tries:
            with pytest.raises(InputError) as error:
                parser.parse_args([*given, *words])
            assert flag in str(error.value), words
            assert "\n" not in str(error.value)


# (scripts, options, what the line says beside a flag)
REFUSED = [
    (SGD, "--arch nowhere:network", "No module named 'nowhere'"),
    (SGD, "--arch math:network", "no attribute"),
    (SGD, "--arch builtins:dict", "gives a dict, not a torch.nn.Module"),
    (PSGD, "--arch resnet21", "did you mean resnet"),
    (SGD, "--arch xyzzy", "allowed: resnet8, resnet20"),
    (SGD, "--arch alexnet", "images of 8 × 8"),
    (SGD, "--arch resnet18 --batch-size 1", "--batch-size 1"),
    (SGD, "--smalldatasets 1e-9", "keeps none of 1437 images"),
    (SGD, "--epochs 3 --start-epoch 3", "allowed: above --start-epoch 3"),
    (PBFGS, "--device tpu", "allowed: auto, cpu"),
    (SGD, "--image-size 32", "allowed with digits: 8"),
    (PSGD, "--image-size 32", "32 here, 8 in"),
    (PSGD, "--mean 0 0 0", "[0.0, 0.0, 0.0] here, None in"),
    (PBFGS, "--arch resnet20", "resnet20 here, resnet8 in"),
    (PSGD, "--corrupt 0.2", "0.2 here, 0.0 in"),
    (SGD, "--nonsense", "unrecognized arguments: --nonsense"),
    (SGD, "--batch 3", "did you mean --batch-size?"),
    (PSGD, "--n_component 3", "did you mean --n_components?"),
    (PBFGS, "--lr 1", "unrecognized arguments: --lr 1"),
    (SGD, "extra", "unrecognized arguments: extra"),
    (SGD, "--pretrained nowhere.th", "nowhere.th: there is no such file"),
    (SGD, "--pretrained", "torchvision has no weights for resnet8; name a file"),
    (SGD, "--resume nowhere.pt", "nowhere.pt: there is no such file"),
    (SGD, "--resume --overwrite", "not with --resume"),
    (PSGD, "--evaluate --save-dir nowhere", "nowhere"),
    (SGD, "--evaluate --pretrained RUN/model.th --resume RUN/model.th", "not with both"),
    (SGD, "--datasets ImageFolder --data-dir nowhere", "nowhere/train"),
    (SGD, "--save-dir /dev/null", "/dev/null: not a directory"),
    (SGD, "--save-dir /dev/null/run", "Not a directory"),
    (SGD, "--schedule cosine --milestones 3", "not allowed with argument"),
    (SGD, "--run mine", "only with --average"),
    (SGD, "--average 3 3", "allowed: START below END"),
    (SGD, "--average 0 3", "new: there is no such directory"),
    (SGD, "--sync-bn", "allowed on CUDA"),
    (PSGD, "--n_components 7", "7 of 7 snapshots; allowed: at most 6"),
    (PSGD, "--n_components 3 --params_stride 3", "allowed: at most 2"),
    (PBFGS, "--params_end 8", "lacks the snapshots 7; there are 0, 1, …, 6"),
    (PSGD, "--params_end 2147483647", "lacks the snapshots 7, 8, …, 2147483646"),
    (PSGD, "--params_start 7", "allowed: above --params_start 7"),
    (PBFGS, "--save-dir nowhere", "nowhere: there is no such directory"),
    (PSGD, "--save-dir .", "there are none"),
    (PSGD, "--start 7", "7.pt: there is no such file"),
    (PSGD, "--start mean --pretrained RUN/model.th", "not with --pretrained"),
    (PSGD, "--basis schmidt --params_end 1", "--params_end: 1 of 1 snapshots"),
    (PSGD, "--basis nowhere.npz", "nowhere.npz: there is no such file"),
    (PSGD, "--basis random --n_components 0.5", "a whole number up to 75290"),
    (PSGD, "--basis random --n_components 75291", "a whole number up to 75290"),
    (report, "", "required: SAVE_DIR"),
    (report, "nowhere", "nowhere: there is no config.json"),
    (report, "--device xpu .", "allowed: auto, cpu"),
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


@pytest.mark.parametrize("script", [*SCRIPTS, report])
def test_refused(script, save_dir, tmp_path, refused, monkeypatch):
    """SGD has a new save dir, the others one with a trajectory; nothing is written in either."""
    monkeypatch.chdir(tmp_path)
    own = [] if script is report else [*DIGITS, "--epochs", "2", "--save-dir"]
    own += {SGD: ["new"], report: []}.get(
        script, [save_dir, "--params_end", "7", "--n_components", "3"]
    )
    before = files(save_dir)
    for words, message in [case for of, *case in REFUSED if of is script]:
        given = shlex.split(words.replace("RUN", str(save_dir)))
        line = refused(script.main, [*own, *given])
        assert message in line
        assert "--" in line or script is report
        assert files(save_dir) == before
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["--corrupt 2", "--smalldatasets 1e-9", "--arch alexnet"])
def test_what_is_refused_overwrites_nothing(words, save_dir, refused, tmp_path, monkeypatch):
    """Early, when the data are there, and when the network is."""
    monkeypatch.chdir(tmp_path)
    before = files(save_dir)
    line = refused(SGD.main, [*DIGITS, "--save-dir", save_dir, "--overwrite", *words.split()])
    assert words.split()[0] in line
    assert files(save_dir) == before


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


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (SGD, "--optimizer adam", "--optimizer: adam here, sgd in"),
        (SGD, "--momentum 0", "--momentum: 0.0 here, 0.9 in"),
        (PSGD, "--run psgd --n_components 2", "--n_components: 2 here, 3 in"),
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


@pytest.mark.slow
def test_report_does_not_mix_experiments(sampled, tmp_path, capsys):
    run = shutil.copytree(sampled, tmp_path / "run")
    options = [*DIGITS, "--save-dir", str(run)]
    PSGD.main([*options, "--params_end", "4", "--n_components", "3", "--epochs", "1"])
    SGD.main([*options, "--epochs", "1", "--corrupt", "0.5", "--overwrite"])
    table = report.main([str(run), "--no-data", "--out", str(tmp_path / "out")])
    assert [row["title"] for row in table] == ["SGD"]
    assert "psgd: not of the experiment" in capsys.readouterr().err


def test_samples_alone_are_not_overwritten_and_other_files_never(sampled, refused, tmp_path):
    run = shutil.copytree(sampled, tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "notes.pt").write_text("mine")
    options = [*DIGITS, "--epochs", "1", "--save-dir", run]
    assert "--overwrite" in refused(SGD.main, options)
    SGD.main([str(option) for option in options] + ["--overwrite"])
    assert {file.name for file in run.glob("*.pt")} == {"0.pt", "1.pt", "checkpoint.pt", "notes.pt"}


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


@pytest.mark.parametrize("script", ALL)
def test_answers_do_not_wait_for_torch(script, tmp_path):
    """Oracle: a torch that is Ctrl-C at its import, as it comes while one waits for it."""
    for package in ("torch", "jinja2"):
        code = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
        (tmp_path / f"{package}.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    own = ["."] if script in (report, trajectory) else []
    for words, code, says in (
        (["--help"], 0, "show this help"),
        (["--out=", "--save-dir=", "--nonsense"], 2, "--"),
        ([], 130, "stopped by SIGINT"),
    ):
        command = [sys.executable, script.__file__, *own, *words]
        pipes = {"capture_output": True, "text": True}
        done = subprocess.run(command, cwd=tmp_path, env=environment, **pipes)
        assert done.returncode == code, done.stderr
        assert says in done.stdout + done.stderr
        if code:
            assert done.stdout == ""
            assert re.fullmatch(rf"{script.__name__}\.py: .*\n", done.stderr)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_groups_its_options_and_tells_every_default(script):
    """Oracle: the parser's own list."""
    parser = script.get_options()
    text = parser.format_help()
    groups = [group for group in options.GROUPS if script is not SGD or group != "subspace"]
    assert re.findall(r"^(\w.*):$", text, re.MULTILINE) == ["options", *groups]
    assert re.findall(r"--\S+", text.split("options:")[1].split("data:")[0]) == ["--help"]
    told = " ".join(text.split())
    for action in parser._actions[1:]:
        assert action.help
        if action.nargs != 0 and action.default is not None:
            assert f"(default: {action.default})" in told
