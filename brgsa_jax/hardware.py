"""What the vendors publish of accelerators: arithmetic, memory and links of one JAX device."""

import re
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One accelerator as JAX shows it: a TPU chip (half of a v7x chip), or a GPU.

    Attributes:
        name: the name `CHIPS` lists it by.
        kind: regex that `jax.Device.device_kind` has in it.
        flops: dense bfloat16 FLOP/s.
        memory: bytes of device memory.
        usable: bytes of it that one program can have; the rest is XLA's.
        bandwidth: bytes/s between memory and the arithmetic.
        link: bytes/s one device can send to its neighbours, over all its links together.
        island: devices that such links join, a whole pod or the GPUs of one node.
        network: bytes/s a device can send beyond its island.
    """

    name: str
    kind: str
    flops: float
    memory: float
    usable: float
    bandwidth: float
    link: float
    island: int
    network: float

    @property
    def is_tpu(self) -> bool:
        """Whether programs for it can be compiled without having one."""
        return "TPU" in self.kind


def _tpu(name: str, kind: str, tera: float, memory: float, usable: float, *rest: float) -> Chip:
    return Chip(name, kind, tera * 1e12, memory * GIB, usable * GIB, *rest)


def _gpu(name: str, kind: str, tera: float, memory: float, bandwidth: float, link: float,
         network: float) -> Chip:
    # JAX takes three quarters of a GPU's memory at the start unless told otherwise.
    return Chip(name, kind, tera * 1e12, memory * 1e9, 0.75 * memory * 1e9, bandwidth, link, 8,
                network)


# The usable memory of TPUs is what their compiler says is available. Of alike kinds the more
# specific comes first.
CHIPS: dict[str, Chip] = {chip.name: chip for chip in (
    _tpu("v4", r"TPU v4$", 275, 32, 30.75, 1228e9, 300e9, 4096, 6.25e9),
    _tpu("v5e", r"TPU v5 ?(lite|e)", 197, 16, 15.75, 819e9, 200e9, 256, 3.125e9),
    _tpu("v5p", r"TPU v5(p|$)", 459, 96, 95.73, 2765e9, 600e9, 8960, 6.25e9),
    _tpu("v6e", r"TPU v6 ?(lite|e)", 918, 32, 31.24, 1638e9, 400e9, 256, 12.5e9),
    _tpu("v7x", r"TPU ?v?7x", 1153.5, 96, 94.74, 3690e9, 300e9, 18432, 6.25e9),
    _gpu("a100-40", r"A100.*40GB", 312, 40, 1555e9, 300e9, 25e9),
    _gpu("a100", r"A100", 312, 80, 2039e9, 300e9, 25e9),
    _gpu("h100-pcie", r"H100 PCIe", 756, 80, 2000e9, 64e9, 50e9),
    _gpu("h100", r"H100", 989, 80, 3350e9, 450e9, 50e9),
    _gpu("h200", r"H200", 989, 141, 4800e9, 450e9, 50e9),
    _gpu("b200", r"B200", 2250, 180, 8000e9, 900e9, 50e9),
    _gpu("l4", r"L4$", 121, 24, 300e9, 32e9, 12.5e9),
    _gpu("l40s", r"L40S", 362, 48, 864e9, 32e9, 25e9),
)}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip of a `jax.Device.device_kind`, as "NVIDIA H200"; None if not listed."""
    return next((chip for chip in CHIPS.values() if re.search(chip.kind, device_kind)), None)
