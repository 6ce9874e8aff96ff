"""The runs that experiments/*.sh list. Oracle: the scripts' parsers, and the runs before them."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS

import models

PARSERS = {f"{script.__name__}.py": script.get_options() for script in SCRIPTS}
EXPERIMENTS = sorted(set(ROOT.glob("experiments/*.sh")) - {ROOT / "experiments" / "common.sh"})
LIST = '. experiments/common.sh; . "$0"; printf "%s\\n" "${runs[@]}"'
SETTINGS = ("c", "seed", "model", "datasets", "data_dir", "options")  # of whoever runs the tests


def listed(experiment: Path) -> list[list[str]]:
    """The words of each run of an experiment: its save dir, the script, the options."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = ["bash", "-euc", LIST, str(experiment)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_run_is_a_command_of_the_scripts(experiment):
    """It parses, its network exists, and earlier runs leave the samples that it takes."""
    trajectories, runs = {}, listed(experiment)
    assert runs
    for save_dir, script, *words in runs:
        args = PARSERS[script].parse_args(words)
        assert str(args.save_dir) == save_dir
        assert args.arch in models.ARCHITECTURES
        assert args.epochs > args.start_epoch
        if args.method == "sgd" and not args.average:
            trajectories[save_dir] = args
            continue
        of = trajectories[save_dir]
        assert (args.datasets, args.corrupt, args.randomseed, args.smalldatasets) == (
            of.datasets,
            of.corrupt,
            of.randomseed,
            of.smalldatasets,
        )
        numbers = range(args.params_start, args.params_end or 51, args.params_stride)
        if args.average:
            numbers = range(*args.average)
        assert of.sample_every or numbers.stop <= of.epochs + 1
        assert len(numbers) > (args.n_components or 0) or args.basis == "random"
