"""What a step asks of an accelerator: launches, copies and host syncs, of the scripts themselves.

Counted on the stand-in of tests/accelerator.py, so no GPU is needed and nothing is timed. Counted
are torch's operations: a GPU may take several kernels for one, as for BatchNorm.
"""

import argparse
import inspect
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timing import show

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import accelerator

import engine
import train_pbfgs
import train_psgd
import train_sgd

SUBSPACE = "--params_end 3 --n_components 2"
SCRIPTS = {
    "SGD": (train_sgd, "--overwrite"),
    "P-SGD": (train_psgd, SUBSPACE),
    "P-BFGS, one trial": (train_pbfgs, SUBSPACE),
    "P⁺-BFGS, one trial": (train_pbfgs, f"{SUBSPACE} --alpha 0.1 --run alpha"),
}


class Step(list):
    """The events of a step, and how many trials it rejected."""

    rejected = 0


def steps_of(script: Any, argv: Sequence[str]) -> list[Step]:
    """The steps of the first of two epochs, less the first, which makes the optimizer's state, and
    the last, which looks whether the loss is finite.
    """
    steps, log = [], engine.Run.log

    def logged(run: engine.Run, *args: Any, **details: Any) -> None:
        log(run, *args, **details)
        steps.append(Step(events))
        steps[-1].rejected = details.get("trials", 0)
        events.clear()

    engine.Run.log = logged
    try:
        with accelerator.recorded() as events:
            script.main(argv)
    finally:
        engine.Run.log = log
    return steps[1 : len(steps) // 2 - 1]


def part(event: accelerator.Event) -> str:
    """What asked for a launch: data, metrics or the step itself; else copy or sync."""
    lines, first = inspect.getsourcelines(engine.Run.log)
    metrics = {f"engine.py:{number}" for number in range(first, first + len(lines))}
    if event.kind != "launch":
        return event.kind
    if event.line.startswith("utils.py"):
        return "data"
    return "metrics" if event.line in metrics else "step"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--names", action="store_true", help="print each operation of a step, too")
    args = parser.parse_args()
    columns, rows = ["step", "data", "metrics", "copy", "sync"], []
    with tempfile.TemporaryDirectory() as save_dir:
        common = f"--datasets digits --arch {args.arch} --epochs 2 --print-freq 99"
        common += f" --device {accelerator.NAME} --save-dir {save_dir}"
        for name, (script, options) in SCRIPTS.items():
            steps = steps_of(script, f"{common} {options}".split())
            step = next(step for step in steps if step.rejected == 0)
            counts = Counter(map(part, step))
            rows.append([name, *(f"{counts[column]}" for column in columns)])
            if args.names:
                print(name)
                for (line, operation), count in sorted(
                    Counter((event.line, event.name) for event in step).items()
                ):
                    print(f"{count:6} {operation:30} {line}")
    title = f"launches: {args.arch}"
    show(title, ["one step of", *columns], rows, "Operations on the device.")


if __name__ == "__main__":
    main()
