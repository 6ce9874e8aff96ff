"""The tables of README.md, on any device: ./run.sh bench writes them to report/bench."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import bench_data
import bench_engine
import bench_launches
import bench_pca
import bench_step
from page import Page

TABLES = {
    "data": bench_data.tables, "pca": bench_pca.tables, "step": bench_step.tables,
    "engine": bench_engine.tables, "launches": bench_launches.tables,
}  # fmt: skip
LARGE = {"pca-large": partial(bench_pca.tables, large=True)}  # 5 GiB of files


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; returns 1 where a measurement failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=TABLES | LARGE, help="default: all but pca-large")
    parser.add_argument("--out", type=Path, default=Path("report/bench"), metavar="DIR")
    args = parser.parse_args(argv)
    page = Page(args.out, "./run.sh bench")
    for name in [args.only] if args.only else TABLES:
        (TABLES | LARGE)[name](page)
    return page.end()


if __name__ == "__main__":
    sys.exit(main())
