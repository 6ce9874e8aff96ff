"""The README's own code block runs, and what it names is there."""

import re
from pathlib import Path

import torch

import report
import train_pbfgs
import train_psgd
import train_sgd

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_code_block_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
    accuracy = float(capsys.readouterr().out.split("%")[0])
    assert accuracy > 90, "the plane of a short training holds a network that reads digits"


def test_every_option_is_told():
    for script in (train_sgd, train_psgd, train_pbfgs, report):
        for action in script.options()._actions:
            for flag in [flag for flag in action.option_strings if flag.startswith("--")][:1]:
                assert re.search(rf"(?<![\w-]){flag}(?![\w-])", README), flag
