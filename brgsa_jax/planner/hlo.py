"""Collectives of a compiled program, read from its text."""

import math
import re
from collections import defaultdict
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Loop counters and masks take less; sub-byte types do not travel here.
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLS = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_CHAIN = re.compile(r'chain_id="(\d+)"')


class Traffic(NamedTuple):
    """Collectives of one kind in one step.

    Attributes:
        count: how many one device takes part in.
        sent: bytes one device sends for them, on rings.
    """

    count: int
    sent: float


def collectives(text: str, devices: int) -> dict[str, Traffic]:
    """Counts the collectives of one run of a compiled program by kind, loops turned out.

    A ring of n devices sends 2(n - 1)/n of what is reduced by an all-reduce, (n - 1)/n of the
    whole for a gather, a scatter or an exchange, and all of what is permuted.

    Args:
        text: `jax.stages.Compiled.as_text()`.
        devices: of the whole program, for collectives that name no groups.
    """
    bodies, entry = _computations(text)
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    chains: set[str] = set()
    for name, times in _executions(bodies, entry).items():
        for line in bodies[name]:
            match = _COLLECTIVE.search(line)
            if not match:
                continue
            chain = _CHAIN.search(line)
            if chain:
                # A collective that runs beside other work is spelled out in each of its parts.
                if chain[1] in chains:
                    continue
                chains.add(chain[1])
            result, kind, asynchronous = match.groups()
            found[kind][0] += times
            found[kind][1] += times * _sent(kind, result, bool(asynchronous),
                                            _group(line, devices))
    return {kind: Traffic(int(found[kind][0]), found[kind][1]) for kind in KINDS if kind in found}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation by name, and the name of the first to run."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header[2]
            bodies[name] = []
            entry = name if header[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _executions(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often every computation runs."""
    times: dict[str, int] = defaultdict(int)

    def run(name: str, count: int) -> None:
        times[name] += count
        for line in bodies.get(name, ()):
            loop = _WHILE.search(line)
            if loop:
                run(loop[2], count * _trips(line, bodies.get(loop[1], ())))
            for called in _CALLS.findall(line):
                run(called, count)
            branches = _BRANCHES.search(line)
            for called in re.findall(r"[\w.\-]+", branches[1]) if branches else ():
                run(called, count)

    run(entry, 1)
    return {name: count for name, count in times.items() if name in bodies}


def _trips(line: str, condition: list[str] | tuple[()]) -> int:
    """Turns of a loop: as annotated, else the bound its condition compares the counter with."""
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    return max((int(n) for inside in condition for n in _CONSTANT.findall(inside)), default=1)


def _sent(kind: str, result: str, asynchronous: bool, group: int) -> float:
    """Bytes a device sends for a collective whose instruction has this type."""
    sizes = [BYTES.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n)
             for dtype, shape in _ARRAY.findall(result)]
    if asynchronous and kind in ("all-gather", "collective-permute") and len(sizes) > 1:
        # (input, output, context …)
        sizes = sizes[1:2]
    whole, others = sum(sizes), (group - 1) / group
    return {"all-reduce": 2 * whole * others, "all-gather": whole * others,
            "reduce-scatter": whole * (group - 1), "all-to-all": whole * others,
            "collective-permute": whole}[kind]


def _group(line: str, devices: int) -> int:
    """Devices that a collective joins."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if iota:
        return int(iota[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'(\w+)'", named[2]))
    return devices
