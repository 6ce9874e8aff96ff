"""The README's own code block runs, and what it names is there."""

import json
import re
import statistics
from pathlib import Path

import tables
import torch

import models
import report
import train_pbfgs
import train_psgd
import train_sgd

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_code_block_runs(capsys):
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[-1]
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
    accuracy = float(capsys.readouterr().out.split("%")[0])
    assert accuracy > 90, "the plane of a short training holds a network that reads digits"


def test_every_option_is_told():
    for script in (train_sgd, train_psgd, train_pbfgs, report):
        for action in script.options()._actions:
            for flag in [flag for flag in action.option_strings if flag.startswith("--")][:1]:
                assert re.search(rf"(?<![\w-]){flag}(?![\w-])", README), flag


def test_bytes_a_step_are_those_of_the_networks():
    """Oracle: the networks themselves; what is sent is counted in test_scale.py."""
    names = {"ResNet-20": ("resnet20", 10), "ResNet-18": ("resnet18", 1000)}
    names |= {"ResNet-50": ("resnet50", 1000), "ViT-B/16": ("vit_b_16", 1000)}
    for name, (arch, classes) in names.items():
        with torch.device("meta"):
            network = models.build(arch, classes, image_size=224)
        n = sum(parameter.numel() for parameter in network.parameters())
        (cells,) = re.findall(rf"^\| {name} \|(.*)\|$", README, re.MULTILINE)
        n_told, k, plane, all_of_them, ratio = (int(c.replace(",", "")) for c in cells.split("|"))
        assert (n_told, plane, all_of_them, ratio) == (n, 4 * k, 4 * n, round(n / k))


def test_tables_are_those_of_the_measured_numbers():
    """Oracles: tables.py, which fills them in; and a column of them, from the JSON file."""
    for page in tables.PAGES:
        assert page.read_text() == tables.filled(page.read_text())
    lines = json.loads((tables.HERE / "digits-full.json").read_text())["lines"]
    header, _, *rows = re.search(r"<!-- table main -->\n(.*?)<!-- end -->", README, re.S)[1].split(
        "\n"
    )
    names = {"SGD, to its end": "SGD"}
    names["P-SGD in a random plane"] = "P-SGD, random basis, BatchNorm re-estimated"
    for noise in (0, 0.4, 0.8):
        column = [cell.strip() for cell in header.split("|")].index(f"digits, c = {noise:g}")
        told = {row.split("|")[1].strip(): row.split("|")[column].strip() for row in rows if row}
        for name, method in names.items():
            final = next(
                line["final"]
                for line in lines
                if (line["noise"], line["method"]) == (noise, method)
            )
            assert told[name].startswith(f"{statistics.mean(final):.2f} ± ")
