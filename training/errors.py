"""How a script ends: mistakes of the person at the terminal, and signals, in one line each.

Nothing here imports torch, so that options are checked before it is.
"""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

# What stops a run. SLURM's --signal=USR1@60 announces the end of a job.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class InputError(ValueError):
    """One line that says what is wrong and what is allowed, and the exit code it ends in."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


@contextlib.contextmanager
def blame(what: str = "", kinds: Any = (ValueError, OSError)) -> Iterator[None]:
    """Raise what fails inside as an InputError that names `what`, an option or a file."""
    try:
        yield
    except InputError:  # it has named its own
        raise
    except kinds as error:
        raise InputError(f"{what}: {error}" if what else str(error)) from error


def entry_point(main: Callable[[Sequence[str] | None], Any]) -> Callable:
    """Decorate a script's main: a user's mistake becomes one line on stderr and an exit code.

    The code is 2 for options and files, 1 for what went wrong later, and 128 + its number for one
    of SIGNALS.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> Any:
        import torch

        accept_any_encoding()
        with handling(stop):
            try:
                return main(argv)
            except InputError as error:
                exit_with(str(error), error.exit_code)
            except torch.OutOfMemoryError as error:
                sizes = "--batch-size or --test-batch-size"
                exit_with(f"{sizes}: too large for the memory of the GPU ({error})", 1)
            except RuntimeError as error:  # gloo has no class of its own
                if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
                    raise
                exit_with(f"communication between processes failed, one may be gone: {error}", 1)

    return wrapped


def accept_any_encoding() -> None:
    """Let characters that the terminal's encoding does not have be printed as `?`."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # replaced by something else
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def warnings_told() -> Iterator[None]:
    """Warnings inside become a line each on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        print(f"{Path(sys.argv[0]).name}: {warning.message}", file=sys.stderr)


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def exit_with(message: str, code: int) -> NoReturn:
    """End the program: one line on stderr that says what is wrong, and the exit code."""
    number = int(os.environ["RANK"]) if under_torchrun() else 0
    if number:
        time.sleep(15)  # if rank 0 says the same, torchrun ends this process meanwhile
        message = f"process {number}: {message}"
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def stop(number: int, frame: Any) -> NoReturn:
    """A signal handler that ends the program in a line."""
    if under_torchrun():
        raise SystemExit(128 + number)
    exit_with(f"stopped by {signal.Signals(number).name}", 128 + number)


def handle(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Handle SIGNALS, except what nohup ignores, with `handler`; returns the former handlers.

    Python lets the main thread alone do that: in others, signals keep what they have.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    nohup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    return {number: signal.signal(number, handler) for number in SIGNALS if number not in nohup}


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGNALS go to `handler`."""
    earlier = handle(handler)
    try:
        yield
    finally:
        for number, former in earlier.items():
            signal.signal(number, former)
