"""The page of results that gpu.py writes."""

import contextlib
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from timing import DEVICE, machine, processor, table_row

from checkpoint import git_commit

FAILED = "**failed**"


def environment() -> Iterator[str]:
    """Hardware and versions, an item each."""
    yield machine()
    if DEVICE == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        yield (
            f"GPU 0 of {torch.cuda.device_count()}: {gpu.total_memory / 2**30:.0f} GiB, compute "
            f"capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors; "
            f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
        query = "--query-gpu=driver_version,power.limit,memory.used,utilization.gpu"
        with contextlib.suppress(OSError):
            command = ["nvidia-smi", query, "--format=csv"]
            done = subprocess.run(command, capture_output=True, text=True)
            yield "nvidia-smi, before anything ran: " + "; ".join(done.stdout.splitlines())
    yield f"{processor()}, {os.cpu_count()} cores; {platform.platform()}"
    yield f"commit {git_commit() or 'unknown'}; {time.strftime('%Y-%m-%d')}"


class Page:
    """A Markdown page, printed and on the disk line by line: what fails later leaves it there."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        files = (directory / name for name in ("README.md", "log.txt"))
        self.file, self.log = (file.open("w", buffering=1, encoding="utf-8") for file in files)
        self.terminal, self.failed = sys.stdout, 0

    def line(self, text: str) -> None:
        """Write a line."""
        for stream in (self.terminal, self.file):
            print(text, file=stream, flush=True)

    def table(
        self, title: str, note: str, columns: Sequence[str],
        cases: Mapping[str, Callable[[], Iterator[Sequence[str]]]]
    ) -> None:  # fmt: skip
        """Write a table with the rows of each case, the last of which may be how it failed."""
        self.line(f"\n## {title}\n\n{note}\n\n{table_row(columns)}")
        self.line(table_row(["---"] * len(columns)))
        for name, case in cases.items():
            with contextlib.redirect_stdout(self.log):
                for row in self.attempt(name, case):
                    self.failed += any(FAILED in cell for cell in row)
                    self.line(table_row([*row, *[""] * (len(columns) - len(row))]))

    def attempt(
        self, name: str, case: Callable[[], Iterator[Sequence[str]]]
    ) -> Iterator[Sequence[str]]:
        """The rows of a case; an error becomes one."""
        try:
            yield from case()
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and error.code > 128:  # Ctrl-C and other signals
                raise
            traceback.print_exc(file=self.log)
            cause = error.__context__ if isinstance(error, SystemExit) else error
            text = f"{type(cause).__name__}: {cause}".replace("|", "\\|")
            yield [f"{name}: {FAILED}, {' '.join(text.split()[:40])}"]
