"""What a plan is for: TPU slices by their topology, GPUs by their number."""

import contextlib
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from brgsa_jax.config import UserError
from brgsa_jax.hardware import CHIPS, Chip

# As the compiler calls them; it has no v4 as JAX shows it, with both cores in one device.
TOPOLOGIES = {"v5e": ("v5e", "16x16"), "v5p": ("v5p", "8x8x8"), "v6e": ("v6e", "16x16"),
              "v7x": ("tpu7x", "4x4x4")}
GPUS = tuple(name for name, chip in CHIPS.items() if not chip.is_tpu)

# Where no TPU is, libtpu asks a metadata server what it is on, and complains of no answer; two
# processes that load it abort on its lock file.
ENVIRONMENT = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1",
               "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
               "TPU_ACCELERATOR_TYPE": "v5litepod-4"}


class Target(NamedTuple):
    """Accelerators to plan for.

    Attributes:
        name: as it was asked for.
        chip: one of them.
        count: how many; of a TPU slice, the product of its axes.
        axes: of a TPU slice; () for GPUs.
    """

    name: str
    chip: Chip
    count: int
    axes: tuple[int, ...]


def target_of(name: str) -> Target:
    """Reads "v5e:16x16" or "h200:8".

    Raises:
        UserError: no such accelerator, no such form, or more chips than one slice can have.
    """
    kind, _, size = name.partition(":")
    known = (*TOPOLOGIES, *GPUS)
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=3)
        meant = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UserError(f"--topology={name} names no accelerator{meant}; choose a TPU slice of "
                        f"{', '.join(TOPOLOGIES)}, as v5e:16x16 or v5p:8x8x8, or a number of "
                        f"GPUs of {', '.join(GPUS)}, as h200:8")
    chip = CHIPS[kind]
    if not chip.is_tpu:
        if not re.fullmatch(r"[1-9]\d{0,5}", size):
            raise UserError(f"--topology={name} says no number of GPUs; write it as {kind}:8")
        return Target(name, chip, int(size), ())
    axes = tuple(int(n) for n in size.split("x")) if re.fullmatch(r"\d+(x\d+)*", size) else ()
    example = TOPOLOGIES[kind][1]
    if len(axes) != example.count("x") + 1 or min(axes) < 1:
        raise UserError(f"--topology={name} is no shape of a {kind} slice; write its chips along "
                        f"{example.count('x') + 1} axes, as {kind}:{example}")
    # A v7x chip is two devices.
    per_chip = 2 if kind == "v7x" else 1
    count = math.prod(axes) * per_chip
    if count > chip.island:
        raise UserError(f"--topology={name} has {math.prod(axes)} chips, and a {kind} slice has at "
                        f"most {chip.island // per_chip}; choose a smaller one, such as "
                        f"{kind}:{example}")
    return Target(name, chip, count, axes)


@contextlib.contextmanager
def without_accelerators() -> Iterator[None]:
    """Keeps eager work on the CPU, and libtpu quiet and alive, while plans are made."""
    import jax

    # JAX has read XLA_FLAGS once it has devices; libtpu ends the process at the first of them
    # that is for another backend.
    cpu = jax.devices("cpu")[0]
    flags = os.environ.pop("XLA_FLAGS", None)
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        with jax.default_device(cpu):
            yield
    finally:
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags


def tpu_devices(target: Target) -> list[Any]:
    """Returns devices of a TPU slice to compile for, inside `without_accelerators`.

    Raises:
        UserError: libtpu is not installed, or knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("plans for TPUs are compiled by libtpu, which is not installed; run "
                        "pip install 'brgsa-jax[tpu]'")
    import jax
    from jax.experimental import topologies

    kind, _, size = target.name.partition(":")
    try:
        found = topologies.get_topology_desc(platform="tpu",
                                             topology_name=f"{TOPOLOGIES[kind][0]}:{size}")
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(": ")[2] or str(error).splitlines()[0]
        raise UserError(f"--topology={target.name} is no {kind} slice ({reason}); take a shape "
                        f"that is sold, such as {kind}:{TOPOLOGIES[kind][1]}") from error
    return list(found.devices)
