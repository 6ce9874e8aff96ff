"""Whether training on the device is what it is on the CPU: the checks of gpu.py."""

import json
import statistics
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import DEVICE, FAILED

import train_pbfgs
import train_psgd
import train_sgd
from dldr.trajectory import load_state_dict
from training import run as engine
from training.network import build_model
from training.run import cross_entropy
from training.setup import parse_args
from utils import load_data

ROOT = Path(__file__).parent.parent
METHODS = {"SGD": train_sgd, "P-SGD": train_psgd, "P-BFGS": train_pbfgs}
RANDOM = "--basis random --n_components 40 --params_end 1"  # needs no trajectory


def place(method: str, directory: Path, part: str = "") -> Path:
    """Where a run is: those in a subspace are in the directory of SGD's, with the trajectory."""
    return directory / f"SGD{part}" if method == "SGD" else directory / "SGD" / f"{method}{part}"


def run(method: str, options: str, directory: Path) -> list[dict]:
    """The metrics rows of a script's run in its `place`."""
    save_dir, own = directory, []
    if method != "SGD":
        save_dir, own = directory.parent, ["--run", directory.name]
    METHODS[method].main([*options.split(), *own, "--save-dir", str(save_dir)])
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def steps_of(method: str, options: str, directory: Path, events: list) -> list[tuple[int, list]]:
    """The trials of each step of a run, and what the step added to `events`.

    Not of the first step, which makes the optimizer's state, nor of the last, which looks whether
    the loss is finite.
    """
    steps, log = [], engine.Run.log

    def logged(self: engine.Run, *args: Any, **details: Any) -> None:
        log(self, *args, **details)
        steps.append((1 + details.get("trials", -1), list(events)))  # the last is not rejected
        events.clear()

    with mock.patch.object(engine.Run, "log", logged):
        run(method, f"{options} --print-freq 1000", directory)
    return steps[1:-1]


def check(name: str, cpu: str, device: str, difference: float, allowed: float) -> list[str]:
    """A row of the table of checks; NaN fails."""
    result = "ok" if difference <= allowed else FAILED
    return [name, cpu, device, f"{difference:.1e}", f"{allowed:g}", result]


# Relative errors allowed to logits and gradient. ReLUs that rounding switches on or off make the
# gradient jump, while the logits are continuous: in TensorFloat-32 theirs would be above 1e-4.
ALLOWED = {"--half": (0.05, 0.3), "--tf32": (0.01, 0.1), "": (1e-4, 0.01)}


def precision(options: str) -> Iterator[list[str]]:
    """The errors of a batch's logits and gradient, against the CPU's in float64."""
    results = []
    for device in ("cpu", "cpu", f"{DEVICE} {options}"):
        argv = f"--datasets digits --arch resnet8 --device {device}".split()
        args = parse_args(train_sgd.get_options(), argv)
        data = load_data(args)
        model, (images, labels) = build_model(args, data).train(), next(data.train.epoch())
        if not results:
            model, images = model.double(), images.double()
        if args.compile:
            model.compile()
        loss, logits = cross_entropy(model, images, labels, args.half)
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        results.append([logits.detach().cpu().double(), gradient.cpu().double()])
    allowed = next(pair for option, pair in ALLOWED.items() if option in options)
    for name, limit, (exact, *others) in zip(
        ("logits", "gradient"), allowed, zip(*results, strict=True), strict=True
    ):
        cpu, own = (float((other - exact).norm() / exact.norm()) for other in others)
        name = f"relative error of {name}, {options or 'float32'}"
        yield check(name, f"{cpu:.1e}", f"{own:.1e}", own, limit)


def training(directory: Path) -> Iterator[list[str]]:
    """Three steps of each method against the CPU's, and a resumed run against an unbroken one."""
    digits = "--datasets digits --arch resnet8 --batch-size 256 --smalldatasets 0.5 --deterministic"
    subspace = f"{digits} --params_end 7 --n_components 5"
    options = {"SGD": f"{digits} --lr 0.05 --sample-every 1"}
    options |= {"P-SGD": f"{subspace} --lr 0.3", "P-BFGS": subspace}
    for method, same in options.items():
        # P-SGD and P-BFGS all train from the CPU's samples, in the basis that the first computes.
        parts = ("", "-unbroken", "-resumed")
        cpu, unbroken, resumed = (place(method, directory, part) for part in parts)
        first, *_ = run(method, f"{same} --epochs 2 --device cpu --no-channels-last", cpu)
        own, *_ = run(method, f"{same} --epochs 2", unbroken)
        losses = [row["train_loss"] for row in (first, own)]
        difference = abs(losses[1] / losses[0] - 1)
        texts = (f"{loss:.6f}" for loss in losses)
        allowed = 1e-2 if method == "P-BFGS" else 1e-3  # rounding can decide a trial
        yield check(f"{method}: training loss of epoch 1", *texts, difference, allowed)
        for more in ("--epochs 1", "--epochs 2 --resume"):
            run(method, f"{same} {more}", resumed)
        one, other = (load_state_dict(path / "model.th") for path in (unbroken, resumed))
        difference = max(float((one[name].double() - v).abs().max()) for name, v in other.items())
        yield check(f"{method}: resumed minus unbroken", "", "", difference, 0)


def digits(directory: Path) -> Iterator[list[str]]:
    """`c=0 ./run.sh digits` with seed 1 on the device, against the CPU's means over five seeds."""
    shell = '. experiments/common.sh; digits_settings; echo "${sgd[@]}"'
    shell += '; echo "${psgd[@]}"; echo "${pbfgs[@]}"'
    done = subprocess.run(
        ["bash", "-c", shell], cwd=ROOT, check=True, capture_output=True, text=True
    )
    recorded = json.loads((ROOT / "experiments" / "digits-full.json").read_text())["results"]
    finals = {line["method"]: line["final"] for line in recorded if line["noise"] == 0}
    for method, options in zip(METHODS, done.stdout.splitlines(), strict=True):
        same = "--datasets digits --arch resnet20"
        rows = run(method, f"{same} {options}", place(method, directory))
        cpu = statistics.mean(finals[method if method == "SGD" else f"{method}, BN update"])
        own = rows[-1]["test_acc"]
        name = f"{method}: test accuracy in percent, `./run.sh digits`"
        yield check(name, f"{cpu:.2f}", f"{own:.2f}", abs(own - cpu), 1.5)


def host_syncs(options: str, directory: Path) -> Iterator[list[str]]:
    """Host syncs per step that CUDA reports, less one per trial."""
    for method in METHODS:
        same = f"{options} --epochs 1 {RANDOM if method != 'SGD' else ''}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                steps = steps_of(method, same, place(method, directory), caught)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        extra = [
            abs(sum("called a synchronizing" in str(event.message) for event in events) - trials)
            for trials, events in steps
        ]
        yield check(f"{method}: host syncs a step, trials apart", "", "", max(extra), 0)
