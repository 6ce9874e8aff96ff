"""How a script ends: mistakes of the person at the terminal, and signals, in one line."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
    """Handle SIGNALS, except what nohup ignores, with `handler`; returns the former handlers."""
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
