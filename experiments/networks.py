"""Take every network of models.SMALL through the chain once: one epoch of 256 images, k = 1.

    PYTHONPATH=. python experiments/networks.py DIR

DIR has the folders train/CLASS and test/CLASS. What is measured goes to networks.json beside it; a
network that is there already is left as it is. The weights are not kept.
"""

import json
import sys
import tempfile
from pathlib import Path

import models
import report
import train_pbfgs
import train_psgd
import train_sgd

FILE = Path(__file__).parent / "networks.json"
IMAGES = {"train": 256, "test": 64}


def few_images(source: Path, target: Path, images: dict[str, int]) -> None:
    """Links to so many images of each part, evenly from its classes."""
    for part, count in images.items():
        files = sorted(source.glob(f"{part}/*/*"))
        for file in files[:: len(files) // count][:count]:
            place = target / part / file.parent.name
            place.mkdir(parents=True, exist_ok=True)
            (place / file.name).symlink_to(file.resolve())


def through_the_chain(arch: str, data: Path, save_dir: Path) -> dict:
    """What the table tells of a network, each method's seconds and loss an epoch."""
    common = ["--datasets", "ImageFolder", "--data-dir", str(data), "--arch", arch, "--epochs", "1"]
    common += ["--batch-size", "64", "--half", "--save-dir", str(save_dir)]
    plane = ["--params_end", "2", "--n_components", "1"]
    rows = {
        "SGD": train_sgd.main([*common, "--lr", "0.01"]),
        "P-SGD": train_psgd.main([*common, *plane, "--lr", "0.1"]),
        "P-BFGS": train_pbfgs.main([*common, *plane]),
    }
    lines = report.lines_of(save_dir)
    return {
        "arch": arch,
        "n": lines[0].experiment.n,
        "seconds": {method: row["seconds"] for method, row in rows.items()},
        "train_loss": {method: row["train_loss"] for method, row in rows.items()},
        "machine": report.machine(lines),
    }


def main(directory: Path) -> None:
    """Measure the networks that experiments/networks.json does not have."""
    done = json.loads(FILE.read_text()) if FILE.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary, "images")
        few_images(directory, data, IMAGES)
        for arch in models.SMALL:
            if arch in [line["arch"] for line in done]:
                continue
            with tempfile.TemporaryDirectory(dir=temporary) as save_dir:
                done.append(through_the_chain(arch, data, Path(save_dir)))
            FILE.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
