"""examples/, docs/recipes.md and docs/adding.md do what they say."""

import copy
import importlib
import json
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import ROOT, in_processes
from torch.nn.functional import cross_entropy

import dldr
import train_psgd
import train_sgd

RECIPES = (ROOT / "docs" / "recipes.md").read_text()
ADDING = (ROOT / "docs" / "adding.md").read_text()
NOT_RUN = "Weights & Biases"


# ------------------------------------------------------------------------------------ examples


def example(name, *packages):
    """The module examples/NAME.py, if what it needs of examples/requirements.txt is installed."""
    for package in packages:
        pytest.importorskip(package, reason=f"needs {package}: examples/requirements.txt")
    return importlib.import_module(f"examples.{name}")


def test_method(capsys):
    """Oracles: chance, which a random basis does not leave by far; and SGD, which P-SGD reaches."""
    results = example("method").main(epochs=5, k=4)
    for row in results.values():
        assert min(row["P-SGD"], row["P-BFGS"]) > row["P-SGD, random basis"] + 20
    assert results[0.0]["P-SGD"] > results[0.0]["SGD"] - 5 > 85
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_method_runs_where_nothing_but_dldr_can_be_imported(tmp_path):
    """As after `pip install .`: the file alone, with the package in another directory."""
    shutil.copytree(ROOT / "dldr", tmp_path / "site" / "dldr")
    shutil.copy(ROOT / "examples" / "method.py", tmp_path)
    code = "import method; method.main(epochs=1, k=1)"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert "P-BFGS" in done.stdout


def test_adversarial():
    """Oracle: an attack of more steps is at least as strong, up to four images of 360."""
    results = example("adversarial").main(epochs=3, first=3)
    for clean, fgsm, pgd in results.values():
        assert clean > 50
        assert clean >= fgsm >= pgd - 1.2


def test_attacks_stay_within_the_radius():
    """Oracle: the definition of the ball, and of an image."""
    module, images = (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)),
        torch.rand(8, 1, 8, 8),
    )
    changed = example("adversarial").attack(module, images, torch.arange(8), 0.1, 3, 0.2)
    assert 0.09 < (changed - images).abs().max() < 0.1 + 1e-6
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_segmentation():
    """Oracle: an intersection over union that a random basis does not reach."""
    results = example("segmentation").main(epochs=4, count=96, k=3)
    assert results["P-SGD"] > results["P-SGD, random basis"]


@pytest.mark.slow
def test_language():
    """Oracle: eight bits, what a uniform guess takes; the Trainer ends below, and so does P-SGD."""
    results = example("language", "transformers", "accelerate").main(epochs=4, sequences=320, k=3)
    assert results["Trainer"] < 6
    assert results["P-SGD"] < 6 < results["P-SGD, random basis"]


@pytest.mark.slow
def test_lora():
    """Oracle: the network without adapters."""
    results = example("lora", "transformers", "peft").main(epochs=2, sequences=320, k=2)
    assert results["LoRA"] < results["before"]
    assert results["P-SGD"] < results["before"]


# ------------------------------------------------------------------------------------- recipes


def sections(page):
    """The Python blocks of each section of a page, by heading; the first are under ''."""
    heading, parts = "", {}
    for title, code in re.findall(r"^## ([^\n]*)|^```python\n(.*?)```", page, re.M | re.S):
        heading = title or heading
        parts.setdefault(heading, [])
        parts[heading] += [code] if code else []
    return parts


BLOCKS = sections(RECIPES)


def run_recipe(heading, names=None):
    """Run the first block of the page and then those of a section; returns their variables."""
    names = {} if names is None else names
    names["__name__"] = "recipe"
    for code in BLOCKS[""] + BLOCKS[heading]:
        exec(compile(code, f"docs/recipes.md, {heading}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def run_files(tmp_path_factory):
    """A directory with the folder `save` of a trajectory and P-SGD in it."""
    folder = tmp_path_factory.mktemp("recipes")
    save = ["--save-dir", str(folder / "save")]
    train_sgd.main(["--datasets", "digits", "--arch", "resnet8", "--epochs", "3", *save])
    train_psgd.main(["--arch", "resnet8", "--n_components", "2", "--epochs", "2", *save])
    return folder


def test_every_section_has_a_test():
    code = Path(__file__).read_text()
    missing = [name for name in BLOCKS if name and name != NOT_RUN and f'"{name}"' not in code]
    assert not missing


def test_recipe_hessian():
    """Oracle: differences of the gradient, computed by autograd."""
    names = run_recipe("The Hessian in the subspace")
    subspace, images, labels = names["subspace"].double(), names["images"].double(), names["labels"]
    columns = []
    for step in 1e-4 * torch.eye(5).double():
        gradients = []
        for sign in (1, -1):
            subspace.coordinates.data = sign * step
            loss = cross_entropy(subspace(images), labels)
            gradients += torch.autograd.grad(loss, subspace.coordinates)
        columns.append((gradients[0] - gradients[1]) / 2e-4)
    torch.testing.assert_close(names["matrix"].double(), torch.stack(columns), atol=1e-4, rtol=1e-3)
    assert names["in_parameters"].shape == names["basis"].shape
    assert (names["curvatures"].diff() >= 0).all()


def test_recipe_angles(capsys):
    """Oracle: scipy, in descending order."""
    from scipy.linalg import subspace_angles

    names = run_recipe("Principal angles between two trajectories")
    expected = subspace_angles(names["early"].double().numpy().T, names["late"].double().numpy().T)
    assert names["angles"].numpy() == pytest.approx(expected[::-1], abs=1e-5)
    assert "degrees" in capsys.readouterr().out


def test_recipe_tensorboard(run_files, monkeypatch):
    """Oracle: metrics.jsonl, from which the event files are read back."""
    pytest.importorskip("tensorboard", reason="needs tensorboard: examples/requirements.txt")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(run_files)
    heading = "TensorBoard"
    after, live = BLOCKS[heading]
    code = live.replace('follow(Path("save/psgd/metrics.jsonl"))', "rows_so_far()")
    assert code != live
    names = {}
    names["rows_so_far"] = lambda: islice(names["follow"](Path("save/psgd/metrics.jsonl")), 2)
    monkeypatch.setitem(BLOCKS, heading, [after, code])
    run_recipe(heading, names)
    names["writer"].close()
    rows = [json.loads(line) for line in Path("save/psgd/metrics.jsonl").read_text().splitlines()]
    for folder in ("tensorboard/psgd", "tensorboard/live"):
        events = EventAccumulator(folder).Reload()
        told = [event.value for event in events.Scalars("test_acc")]
        assert told == pytest.approx([row["test_acc"] for row in rows])


def test_recipe_pandas(run_files, monkeypatch, capsys):
    """Oracle: metrics.jsonl."""
    pytest.importorskip("pandas", reason="needs pandas: examples/requirements.txt")
    monkeypatch.chdir(run_files)
    run_recipe("pandas")
    last = json.loads(Path("save/psgd/metrics.jsonl").read_text().splitlines()[-1])["test_acc"]
    assert f"psgd  {last:.6f}" in capsys.readouterr().out


def test_recipe_figure(run_files, monkeypatch):
    """Oracles: the network's own parameters, and rows of length one."""
    monkeypatch.chdir(run_files)
    names = run_recipe("A figure from basis.npz and metrics.jsonl")
    shapes = {name: tuple(part.shape) for name, part in names["direction"].items()}
    (network,) = dldr.load_trajectory("save/0.pt")
    assert shapes == {name: tuple(network[name].shape) for name in shapes}
    assert list(shapes) == [
        name for name in network if "running" not in name and "num_" not in name
    ]
    assert names["shares"].sum(1) == pytest.approx(1, abs=1e-5)
    assert Path("path.png").stat().st_size > 1000


def test_recipe_checkpointing():
    """Oracle: the gradient of the network without checkpoints."""
    names = run_recipe("Gradient checkpointing")
    subspace = names["subspace"]
    subspace.coordinates.grad = None
    cross_entropy(subspace(names["images"]), names["labels"]).backward()
    torch.testing.assert_close(names["saving"].coordinates.grad, subspace.coordinates.grad)


def several_processes(rank, file):
    """What a process of the recipe does; rank 0 saves the coordinates."""
    names = run_recipe("Several processes")
    if rank == 0:
        torch.save(names["subspace"].coordinates.detach(), file)


@pytest.mark.slow
def test_recipe_several_processes(tmp_path):
    """Oracle: one process."""
    coordinates = {}
    for processes in (1, 2):
        in_processes(processes, several_processes, tmp_path / "z.pt")
        coordinates[processes] = torch.load(tmp_path / "z.pt")
    assert coordinates[1].norm() > 0.1
    torch.testing.assert_close(coordinates[1], coordinates[2], atol=1e-4, rtol=1e-4)


def test_recipe_landscape():
    """Oracle: a network with the parameters θ(z) of one point."""
    names = run_recipe("The landscape of any loss")
    subspace, points = names["subspace"], names["points"]
    network = copy.deepcopy(subspace).release()
    dldr.load_vector(subspace.origin + points[3] @ subspace.basis, network)
    expected = cross_entropy(network(names["images"]), names["labels"], reduction="none").max()
    torch.testing.assert_close(names["heights"].flatten()[3], expected.detach())


# -------------------------------------------------------------------------------------- adding


def apply(diff, tree):
    """Make the changes of a diff without line numbers; `@@` is between two places of a file."""
    for name, body in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", diff, re.M | re.S):
        file = tree / name
        for hunk in re.split(r"^@@\n", body, flags=re.M):
            lines = hunk.splitlines()
            old = "\n".join(line[1:] for line in lines if line[:1] != "+")
            new = "\n".join(line[1:] for line in lines if line[:1] != "-")
            text = file.read_text() if file.exists() else ""
            assert text.count(old) == 1 or not old, f"{name}: {old}"
            file.write_text(text.replace(old, new) if old else f"{text}{new}\n")


@pytest.mark.slow
def test_all_additions_together(tmp_path):
    """Oracle: the runs that the new experiment lists, with all the other additions in them."""
    kept = shutil.ignore_patterns(".*", "report", "save*", "__pycache__")
    tree = shutil.copytree(ROOT, tmp_path / "tree", ignore=kept)
    shutil.copy(tree / "train_psgd.py", tree / "train_psign.py")
    diffs = re.findall(r"^```diff\n(.*?)```", ADDING, re.M | re.S)
    assert len(diffs) == 7
    for diff in diffs:
        assert len(re.findall("^--- ", diff, re.M)) <= 2
        apply(diff, tree)
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    subprocess.run(
        ["bash", "run.sh", "stripes"],
        cwd=tree,
        check=True,
        capture_output=True,
        text=True,
        env={"PATH": path, "OMP_NUM_THREADS": "1", "seed": "1", "HOME": str(tmp_path)},
    )
    (save_dir,) = tree.glob("save_*")
    rows = [json.loads(line) for line in (save_dir / "psign" / "metrics.jsonl").open()]
    assert rows[-1]["test_acc"] > 90
    assert 50 <= rows[-1]["test_confidence"] <= 100
    table = (tree / "report" / "stripes" / "log.txt").read_text()
    assert "psign" in table
    assert "RMSprop" in table
