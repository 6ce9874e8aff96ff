"""Mistakes of the person at the terminal: raised where found, printed by cli.entry_point."""

import contextlib
from collections.abc import Iterator
from typing import Any


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
