"""What the commands share: the console, warnings, folders for results, types of arguments."""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from brgsa_jax.config import UserError

# add(name, run, text, *, into=…, overrides=False) -> parser of a new command.
Add = Callable[..., argparse.ArgumentParser]


def complain(message: object) -> None:
    """Prints one line on stderr; names of files may hold line breaks and terminal codes."""
    text = "".join(c if c.isprintable() else " " for c in str(message))
    print(f"brgsa: {text}", file=sys.stderr)


def terminal() -> Any:
    """The terminal, for tables and lines that may hold names of files."""
    from rich.console import Console

    # Names of files and prompts may hold brackets and colons, which are not markup.
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def results_folder(path: str | Path) -> Path:
    """Makes the folder for results before the work starts, so that no finished work is lost.

    Raises:
        UserError: no file can be written there.
    """
    place = Path(path)
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise UserError(f"nothing can be written into {place} ({error.strerror}); choose another "
                        "--out") from error
    return place


def numbers(kind: type) -> Callable[[str], tuple[Any, ...]]:
    """Type of an argument: three positive numbers X,Y,Z."""
    def parse(text: str) -> tuple[Any, ...]:
        values = tuple(kind(part) for part in text.split(","))
        if len(values) != 3 or min(values) <= 0:
            raise ValueError(text)
        return values

    parse.__name__ = "three positive numbers X,Y,Z"
    return parse


def natural(text: str) -> int:
    """Type of an argument: a whole number from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def positive(text: str) -> int:
    """Type of an argument: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value
