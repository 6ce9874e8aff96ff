"""Augmented training images a second, against torchvision's PIL pipeline with two workers."""

import argparse
import statistics
import warnings

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image
from timing import DEVICE, alternate, show

import utils


class Pictures(torch.utils.data.Dataset):
    """Images as torchvision's CIFAR10 hands them out."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        dataset = utils.DATASETS["CIFAR10"]
        crop = [T.RandomHorizontalFlip(), T.RandomCrop(32, 4)]
        self.transform = T.Compose([*crop, T.ToTensor(), T.Normalize(dataset.mean, dataset.std)])

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[position])), 0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    pixels = np.random.default_rng(0).integers(256, size=(args.images, 32, 32, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    split = utils.Split(images, torch.zeros(args.images, dtype=torch.long), [])
    ours = utils.TensorLoader(split, utils.DATASETS["CIFAR10"], args.batch_size, DEVICE, seed=1)
    theirs = torch.utils.data.DataLoader(
        Pictures(pixels), args.batch_size, shuffle=True, num_workers=2
    )
    seconds = alternate(
        {
            "PIL, DataLoader, 2 workers": lambda: [None for _ in theirs],
            "in memory, batched": lambda: [None for _ in ours.epoch(0)],
        },
        args.repetitions,
    )
    baseline = statistics.median(next(iter(seconds.values())))
    rows = []
    for name, values in seconds.items():
        rates = [
            args.images / value for value in (max(values), statistics.median(values), min(values))
        ]
        low, middle, high = (f"{rate:,.0f}" for rate in rates)
        ratio = f"{baseline / statistics.median(values):.1f}"
        rows.append([name, f"{middle} ({low}–{high})", ratio])
    columns = ["pipeline", "images/s", "× the first"]
    note = f"Median (range) of {args.repetitions} alternating epochs, {args.images:,} images."
    show("data: flip, pad 4, crop, normalize", columns, rows, note)


if __name__ == "__main__":
    main()
