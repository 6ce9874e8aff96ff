"""Random combinations of options. Oracle: a run succeeds, or ends in one line with code 1 or 2."""

import random

import pytest

import train_pbfgs
import train_psgd
import train_sgd

TRAJECTORY = """--optimizer adam|--corrupt 0.3|--corrupt 0.2 --noise pair|--smalldatasets 0.1
--half|--no-augment|--sample-every 3|--momentum 0|--milestones|--schedule cosine|--save-every 1
--start-epoch 1|--test-batch-size 1|-b 2000|-b 1|--no-channels-last|--deterministic|--lr 1e30
--weight-decay 0|--randomseed 0|--print-freq 1|--no-flip|--workers 0|--image-size 9"""
SUBSPACE = """--basis random|--basis walk|--basis schmidt|--start mean|--start 1|--start 9
--bn-update
--basis-dtype bfloat16|--n_components 0.9|--n_components 2|--n_components 50|--params_stride 2
--params_end 99|--params_start 1|--resume|--overwrite|--half|--train-seed 5|--weight-decay 1e-3
--run other|--evaluate|--corrupt 0.7|--epochs 3|-b 700|--no-channels-last|--pretrained"""
METHOD = {
    train_psgd: "--optimizer adam|--schedule cosine|--lr 0|--milestones 1",
    train_pbfgs: "--alpha 0.1|--accumulate 3|--gamma 0",
}


def choose(draw, *texts):
    """A few of the options in texts, in a row."""
    options = [option for text in texts for option in text.replace("\n", "|").split("|")]
    return [word for option in draw.sample(options, draw.randint(0, 3)) for word in option.split()]


def attempt(script, argv, capsys):
    """Run a script: it has a result, or ends in one line."""
    try:
        assert 0 <= script.main(argv)["test_acc"] <= 100
    except SystemExit as end:
        assert end.code in (1, 2), argv
        assert ": " in capsys.readouterr().err.strip().splitlines()[-1], argv


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_any_combination_succeeds_or_is_refused_in_one_line(tmp_path, capsys, seed):
    draw, directory = random.Random(seed), str(tmp_path)
    argv = ["--datasets", "digits", "--arch", "resnet8", "--epochs", "2", "--save-dir", directory]
    attempt(train_sgd, [*argv, *choose(draw, TRAJECTORY)], capsys)
    for script, options in METHOD.items():
        attempt(script, [*argv, *choose(draw, SUBSPACE, options)], capsys)
