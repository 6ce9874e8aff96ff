"""What a step asks of an accelerator: launches, copies and host syncs, of the scripts themselves.

Counted on the stand-in of tests/accelerator.py, so no GPU is needed and nothing is timed. Counted
are torch's operations: a GPU may take several kernels for one, as for BatchNorm.
"""

import inspect
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from checks import METHODS
from page import Page

import engine

COLUMNS = ["step", "data", "metrics", "copy", "sync"]
SUBSPACE = "--params_end 3 --n_components 2"
RUNS = {
    "SGD": ("SGD", "--overwrite"),
    "P-SGD": ("P-SGD", SUBSPACE),
    "P-BFGS, one trial": ("P-BFGS", SUBSPACE),
    "P⁺-BFGS, one trial": ("P-BFGS", f"{SUBSPACE} --alpha 0.1 --run alpha"),
}


def accepted_step(method: str, argv: Sequence[str]) -> list[Any]:
    """The events of a step that rejects no trial, of the first of two epochs: not of its first
    step, which makes the optimizer's state, nor its last, which looks whether the loss is finite.
    """
    import accelerator  # registers a device, for the whole process

    steps, log = [], engine.Run.log

    def logged(run: engine.Run, *args: Any, **details: Any) -> None:
        log(run, *args, **details)
        steps.append((details.get("trials", 0), list(events)))
        events.clear()

    with mock.patch.object(engine.Run, "log", logged), accelerator.recorded() as events:
        METHODS[method].main(argv)
    steps = steps[1 : len(steps) // 2 - 1]
    return next(events for rejected, events in steps if rejected == 0)


def part(event: Any) -> str:
    """What asked for a launch: data, metrics or the step itself; else copy or sync."""
    lines, first = inspect.getsourcelines(engine.Run.log)
    metrics = {f"engine.py:{number}" for number in range(first, first + len(lines))}
    if event.kind != "launch":
        return event.kind
    if event.line.startswith("utils.py"):
        return "data"
    return "metrics" if event.line in metrics else "step"


def count(arch: str = "resnet20") -> Iterator[list[str]]:
    """A row a script; prints how often each line asks for which operation, too."""
    with tempfile.TemporaryDirectory() as save_dir:
        common = f"--datasets digits --arch {arch} --epochs 2 --print-freq 99"
        common += f" --device standin --save-dir {save_dir}"
        for name, (method, options) in RUNS.items():
            step = accepted_step(method, f"{common} {options}".split())
            print(name)
            for event, times in sorted(Counter((e.line, e.name) for e in step).items()):
                print(f"{times:6} {event[1]:30} {event[0]}")
            counts = Counter(map(part, step))
            yield [name, *(f"{counts[column]}" for column in COLUMNS)]


def tables(page: Page) -> None:
    """Write the table; the stand-in becomes one of the process's devices."""
    with mock.patch.object(sys, "path", [*sys.path, str(Path(__file__).parent.parent / "tests")]):
        page.table(
            "launches: resnet20", "Operations on the device.", ["one step of", *COLUMNS],
            {"launches": count},
        )  # fmt: skip
