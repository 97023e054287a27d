"""The command line `brgsa`: one handler a command; errors are one sentence.

Exit codes: 0 success, 1 failure, 2 wrong use, 143 stopped by the platform with the state saved.
"""

import argparse
import glob
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from brgsa_jax.cli import data, evals, metrics, models, plan, probe, runs, summaries
from brgsa_jax.cli.common import complain
from brgsa_jax.config import UserError, parse_overrides
from brgsa_jax.stopping import ending_on_sigterm
from brgsa_jax.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parser = build_parser()
    choose_platform()
    options, rest = parser.parse_known_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return 2
    if rest and not options.overrides:
        parser.error(f"unknown arguments {' '.join(rest)}; see brgsa {options.command} --help")
    try:
        parse_overrides(rest)
    except UserError as error:
        parser.error(str(error))
    options.rest = rest
    # Only its tokenizers are used; the advice to install PyTorch would mislead.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        with ending_on_sigterm():
            return options.run(options) or 0
    except UserError as error:
        complain(error)
        return 1
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            place = f"{error.filename}: " if error.filename else ""
            complain(f"{place}{error.strerror or error}; check the path, its rights and the free "
                      "space")
        return 1
    except KeyboardInterrupt:
        print("brgsa: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT


ACCELERATORS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg")


def choose_platform() -> None:
    """Takes the CPU at once where Linux shows no accelerator.

    With libtpu installed but no TPU there, JAX asks a metadata server for a minute, prints its
    errors, and ends on the CPU all the same.
    """
    if sys.platform == "linux" and not any(map(glob.glob, ACCELERATORS)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = argparse.ArgumentParser(prog="brgsa", description=(
        "Align 3-D medical images with their reports, and read scans zero-shot."))
    parser.add_argument("--version", action="version", version=f"brgsa_jax {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")

    def command(name: str, run: Callable[..., Any], text: str, *, into: Any = commands,
                overrides: bool = False) -> argparse.ArgumentParser:
        epilog = "Change the configuration with --config.section.key=value." if overrides else None
        sub = into.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                              epilog=epilog, allow_abbrev=False)
        sub.set_defaults(run=run, overrides=overrides)
        return sub

    runs.add_demo(command)
    data.add(command, commands)
    summaries.add(command)
    runs.add(command)
    evals.add(command)
    metrics.add(command)
    probe.add(command)
    models.add(command)
    plan.add(command)
    return parser
