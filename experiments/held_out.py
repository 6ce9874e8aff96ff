"""Accuracy of weight averages on the training images that --smalldatasets left out.

    PYTHONPATH=. python experiments/held_out.py SAVE_DIR ...

Which samples to average is chosen on these, so that no test image has a say. As many of their
labels are corrupted as of those that were trained on.
"""

import argparse
import json
import sys
from pathlib import Path

import utils
from cli import pick_device
from engine import evaluate, recompute_statistics
from network import build_model, copy_into

FIRST = (11, 16, 21, 26, 30)  # samples that the averages begin with
LAST = 30


def accuracies(save_dir: Path) -> list[float]:
    """Of the averages from each of FIRST to LAST, in percent."""
    arguments = json.loads((save_dir / "config.json").read_text())["arguments"]
    args = argparse.Namespace(**arguments | {"device": pick_device("auto")})
    args.data_dir = Path(args.data_dir)
    data = utils.load_data(args)
    model, share, seed = build_model(args, data), args.smalldatasets, args.randomseed
    args.smalldatasets = None
    train, _ = utils.read_splits(args)
    order = utils.rng(seed, "subset").permutation(len(train.labels))
    rest = order[int(share * len(order)) :]
    labels = utils.corrupt_labels(train.labels[rest], args.corrupt, len(train.classes), seed)
    held_out = utils.make_loader(train._replace(images=train.images[rest], labels=labels), args)
    found = []
    for first in FIRST:
        copy_into(model, utils.average(utils.load_samples(save_dir, first, LAST + 1)))
        recompute_statistics(model, (images for images, _ in data.train.epoch()))
        found.append(evaluate(model, held_out.epoch(), args.half)["test_acc"])
    return found


if __name__ == "__main__":
    print("samples", *(f"{first}–{LAST}" for first in FIRST), sep="\t")
    for save_dir in map(Path, sys.argv[1:]):
        print(save_dir, *(f"{value:.2f}" for value in accuracies(save_dir)), sep="\t", flush=True)
