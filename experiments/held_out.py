"""Accuracy of weight averages on the training images that --smalldatasets left out.

    PYTHONPATH=. python experiments/held_out.py SAVE_DIR ...

Which samples to average is chosen on these, so that no test image has a say. The same fraction
of their labels is corrupted.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import utils
from training.network import build_model, copy_into
from training.run import evaluate, recompute_statistics
from training.setup import pick_device

FIRST = (11, 16, 21, 26, 30)  # samples that the averages begin with
LAST = 30


def accuracies(save_dir: Path) -> list[float]:
    """Of the averages from each of FIRST to LAST, in percent."""
    arguments = json.loads((save_dir / "config.json").read_text())["arguments"]
    args = argparse.Namespace(**arguments | {"device": pick_device("auto")})
    args.data_dir = Path(args.data_dir)
    share, seed, args.smalldatasets = args.smalldatasets, args.randomseed, None
    train, _ = utils.read_splits(args)
    classes = len(train.classes)

    def loader(which: np.ndarray, *training: int) -> utils.TensorLoader | utils.FileLoader:
        part = train._replace(images=train.images[which], labels=train.labels[which])
        part = part._replace(labels=utils.noisy_labels(args, part))
        return utils.make_loader(part, args, *training)

    kept, left_out = utils.subset(len(train.labels), share, seed)
    data = utils.Data(loader(kept, args.batch_size, seed), loader(left_out), classes)
    model, found = build_model(args, data), []
    for first in FIRST:
        copy_into(model, utils.average(utils.load_samples(save_dir, first, LAST + 1)))
        recompute_statistics(model, data.train.epoch(), args.half)
        found.append(evaluate(model, data.test.epoch(), args.half)["test_acc"])
    return found


if __name__ == "__main__":
    print("samples", *(f"{first}–{LAST}" for first in FIRST), sep="\t")
    for save_dir in map(Path, sys.argv[1:]):
        print(save_dir, *(f"{value:.2f}" for value in accuracies(save_dir)), sep="\t", flush=True)
