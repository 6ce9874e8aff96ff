"""What the engine options do: train_sgd.py on 32 × 32 images, images a second with each.

The images are noise in files, made here, so that it is the script itself that runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from timing import show

ROOT = Path(__file__).parent.parent
OPTIONS = (
    "--no-channels-last",
    "--channels-last",
    "--threads 1",
    "--deterministic",
    "--compile",
    "--half",
    "--half --compile",
)


def write_images(directory: Path, images: int, side: int = 32) -> None:
    """An ImageFolder of random images, in ten classes; as few to test on as there can be."""
    random = np.random.default_rng(0)
    for split, count in (("train", images), ("test", 10)):
        for number in range(count):
            folder = directory / split / str(number % 10)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(256, size=(side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")


def epochs(directory: str, options: str, count: int, arch: str) -> list[float]:
    """Seconds of each epoch of one process."""
    save_dir = Path(directory, "save")
    command = f"{sys.executable} train_sgd.py --datasets ImageFolder --data-dir {directory}"
    command += f" --arch {arch} --epochs {count} --overwrite --save-dir {save_dir} {options}"
    # An empty cache: the first epoch shows what compiling takes.
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(
            command.split(), cwd=ROOT, env=environment, capture_output=True, text=True
        )
    if done.returncode:
        sys.exit(done.stderr)
    rows = (save_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["seconds"] for row in rows]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--arch", default="resnet20")
    args = parser.parse_args()
    first: dict[str, list] = {options: [] for options in OPTIONS}
    later: dict[str, list] = {options: [] for options in OPTIONS}
    with tempfile.TemporaryDirectory() as directory:
        write_images(Path(directory), args.images)
        for number in range(args.rounds):
            for options in OPTIONS:
                if number and "compile" in options:
                    continue  # half a minute of compiling is enough once
                seconds = epochs(directory, options, args.epochs, args.arch)
                first[options].append(seconds[0])
                later[options] += seconds[1:]
    baseline = statistics.median(later[OPTIONS[0]])
    rows = []
    for options in OPTIONS:
        low, middle, high = (
            args.images / function(later[options]) for function in (max, statistics.median, min)
        )
        rate = f"{middle:,.0f} ({low:,.0f}–{high:,.0f})"
        ratio = f"{baseline / statistics.median(later[options]):.2f}"
        extra = f"{statistics.median(first[options]) - statistics.median(later[options]):.1f}"
        rows.append([f"`{options}`", rate, ratio, extra])
    columns = ["train_sgd.py with", "images/s", "× the first", "first epoch takes longer by s"]
    note = f"{args.arch}, batch 128, median (range) of epochs of {args.images:,} images."
    show("engine: 32 × 32 pixels", columns, rows, note)


if __name__ == "__main__":
    main()
