"""The pages. Oracles: the code, the networks and the measured numbers that they speak of."""

import json
import re
import shlex
import statistics
import sys

import pytest
import tables
import torch
import torch.nn.functional as F
from conftest import ROOT
from sklearn.datasets import load_digits

import models
import report
import train_pbfgs
import train_psgd
import train_sgd
import trajectory

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/*.md"))]
README, OWN, OPTIONS, DISTRIBUTED = (
    (ROOT / page).read_text()
    for page in ("README.md", "docs/own.md", "docs/options.md", "docs/distributed.md")
)


def code_blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def run(code, names=None):
    names = names or {}
    exec(compile(code, "page", "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Oracles: the files, and GitHub's rule for the anchors of headings."""
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in anchors


@pytest.mark.slow
def test_custom_network(tmp_path, monkeypatch):
    """The page's file and its commands, with fewer epochs."""
    file, *_ = code_blocks(OWN, "python")
    (tmp_path / "mine.py").write_text(file)
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # another test's
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (commands,) = (block for block in code_blocks(OWN, "bash") if "mine:network" in block)
    for command, script, fewer in zip(
        commands.splitlines(),
        (train_sgd, train_psgd),
        (["--epochs", "3"], ["--params_end", "4", "--n_components", "2", "--epochs", "1"]),
        strict=True,
    ):
        python, name, *arguments = shlex.split(command)
        assert (python, name) == ("python", f"{script.__name__}.py")
        assert script.main([*arguments, *fewer])["test_acc"] > 15


@pytest.mark.parametrize("page", [README, OWN], ids=["README", "own"])
def test_custom_loop(page):
    """With a network that has BatchNorm. Oracle: the digits, of which nine in ten are learned."""
    loop, *update = [code for code in code_blocks(page, "python") if "mine.py" not in code]
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    layers = torch.nn.Linear(64, 100), torch.nn.BatchNorm1d(100), torch.nn.ReLU()
    network = torch.nn.Sequential(*layers, torch.nn.Linear(100, 10))

    def train(module, parameters):
        optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(module.train()(images), labels).backward()
            optimizer.step()

    names = run(loop, {"network": network, "train": train})
    assert names["basis"].shape == (5, 7_710)
    network = names["network"]
    for code in update:
        run(code, {"torch": torch, "network": network, "batches": [images]})
    assert (network.eval()(images).argmax(1) == labels).float().mean() > 0.9


def test_every_option_is_told():
    for script in (train_sgd, train_psgd, train_pbfgs, report, trajectory):
        for action in script.get_options()._actions:
            for flag in [flag for flag in action.option_strings if flag.startswith("--")][:1]:
                assert flag == "--help" or f"`{flag}" in OPTIONS, flag


def test_bytes_a_step_are_those_of_the_networks():
    """Oracle: the networks themselves; what is sent is counted in test_scale.py."""
    names = {"ResNet-20": ("resnet20", 10), "ResNet-18": ("resnet18", 1000)}
    names |= {"ResNet-50": ("resnet50", 1000), "ViT-B/16": ("vit_b_16", 1000)}
    for name, (arch, classes) in names.items():
        with torch.device("meta"):
            network = models.build(arch, classes, image_size=224)
        n = sum(parameter.numel() for parameter in network.parameters())
        (cells,) = re.findall(rf"^\| {name} \|(.*)\|$", DISTRIBUTED, re.MULTILINE)
        n_told, k, subspace, all_of_them, ratio = (
            int(c.replace(",", "")) for c in cells.split("|")
        )
        assert (n_told, subspace, all_of_them, ratio) == (n, 4 * k, 4 * n, round(n / k))


def test_tables_are_those_of_the_measured_numbers():
    """Oracles: experiments/tables.py, which fills them; and a column, from the JSON file."""
    for page in tables.PAGES:
        assert page.read_text() == tables.filled(page.read_text())
    lines = json.loads((tables.HERE / "digits-full.json").read_text())["results"]
    header, _, *rows = re.search(r"<!-- table main -->\n(.*?)<!-- end -->", README, re.S)[1].split(
        "\n"
    )
    names = {"SGD": "SGD", "P-SGD, k random dimensions": "P-SGD, random basis, BN update"}
    column = [cell.strip() for cell in header.split("|")].index("digits, c = 0.4")
    told = {row.split("|")[1].strip(): row.split("|")[column].strip() for row in rows if row}
    for name, method in names.items():
        final = next(
            line["final"] for line in lines if (line["noise"], line["title"]) == (0.4, method)
        )
        assert told[name].startswith(f"{statistics.mean(final):.2f} ± ")
