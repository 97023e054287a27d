"""Alignment of 3-D medical images with their reports (BrgSA, MGCA) in JAX/Flax.

The names below load on first use, so that `import brgsa_jax.data.volume` brings in no JAX.
"""

import importlib
from typing import Any

from brgsa_jax.version import __version__

_LAZY = {
    "ablate": "brgsa_jax.ablation",
    "get_config": "brgsa_jax.config",
    "load_model": "brgsa_jax.predict",
    "zero_shot": "brgsa_jax.predict",
}
__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'brgsa_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
