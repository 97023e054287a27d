"""Golden vectors: what the reference implementations returned, and how close one must come.

The files hold numbers only (see README.md beside them). ``BRGSA_GOLDEN`` may name a folder with
further files of the same kinds; they are then checked too.
"""

import json
import os
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

HERE = Path(__file__).parent
DTYPES = ("float32", "float64")

# In float32: rtol, atol of values; largest error of a gradient over its largest entry.
VALUE = {"float32": (2e-5, 2e-6), "float64": (1e-9, 1e-12)}
GRADIENT = {"float32": 1e-4, "float64": 1e-9}


def files(*kinds: str) -> list[Path]:
    """Files of these kinds, by name."""
    found = {p.name: p for p in HERE.glob("*.npz")}
    extra = os.environ.get("BRGSA_GOLDEN")
    if extra:
        found |= {p.name: p for p in Path(extra).glob("*.npz") if p.name not in found}
    return [p for _, p in sorted(found.items()) if json.loads(_meta(p))["kind"] in kinds]


def _meta(path: Path) -> str:
    with np.load(path) as data:
        return str(data["meta_json"])


class Golden:
    """One file: inputs, expected outputs, and a list of the deviations measured so far."""

    def __init__(self, path: Path, dtype: str):
        with np.load(path) as data:
            self.arrays = dict(data)
        self.meta = json.loads(str(self.arrays.pop("meta_json")))
        self.dtype = dtype
        self.deviations: list[tuple[str, str, float, float]] = []

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def inputs(self, *names: str) -> dict[str, np.ndarray]:
        """Float inputs by name without ``in_``, in the dtype under test."""
        return {n: self[f"in_{n}"].astype(self.dtype) for n in names}

    def value(self, name: str, ours) -> None:
        """Holds ours against ``out_<name>``; the number kept is in units of the tolerance."""
        rtol, atol = VALUE[self.dtype]
        expected = self[f"out_{name}"]
        ours = np.asarray(ours, np.float64)
        assert ours.shape == expected.shape, (name, ours.shape, expected.shape)
        error = np.abs(ours - expected)
        worst = float(np.max(error / (atol + rtol * np.abs(expected))))
        relative = float(np.max(error) / max(np.max(np.abs(expected)), 1e-300))
        self.deviations.append(("value", name, relative, worst))

    def gradients(self, prefix: str, ours: dict[str, jax.Array], rename=None) -> None:
        """Holds each array of ours against ``grad_<prefix>__<name>``, where the file has it."""
        seen = 0
        for name, gradient in ours.items():
            key = f"grad_{prefix}__{(rename or {}).get(name, name)}"
            if key not in self.arrays:
                continue
            seen += 1
            expected = self[key]
            gradient = np.asarray(gradient, np.float64)
            assert gradient.shape == expected.shape, key
            error = float(np.max(np.abs(gradient - expected)) / np.max(np.abs(expected)))
            self.deviations.append(("grad", key, error, error / GRADIENT[self.dtype]))
        assert seen, f"no gradient of {prefix} in the file"

    def finish(self) -> None:
        """Fails with every deviation above its tolerance."""
        assert self.worst() <= 1.0, [d for d in self.deviations if not d[3] <= 1.0]

    def worst(self) -> float:
        """The largest deviation so far, in units of its tolerance; NaN is one of them."""
        assert self.deviations
        return float(np.max([deviation[3] for deviation in self.deviations]))


@cache
def quick_compile() -> dict:
    """Compiler options that cut the compile time of these small programs to a third.

    They are the compiler's own debug options, so those an installed version lacks are left out.
    """
    wanted = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    known = {}
    for option, value in wanted.items():
        try:
            jax.jit(lambda x: x, compiler_options={option: value}).lower(0.0).compile()
        except jax.errors.JaxRuntimeError:
            continue
        known[option] = value
    return known


def jit(function, **options):
    """``jax.jit``, compiled quickly rather than well."""
    return jax.jit(function, compiler_options=quick_compile(), **options)


def differentiate(function, inputs, cotangents):
    """Outputs, auxiliary outputs and vector-Jacobian products of ``inputs -> (dict, aux)``.

    Args:
        function: dict of arrays -> (dict of scalar losses, anything).
        inputs: dict of arrays.
        cotangents: name -> {loss: weight}; a loss left out has weight 0.

    Returns:
        (losses, aux, {name: dict of gradients}).
    """

    def run(inputs):
        losses, pull, aux = jax.vjp(function, inputs, has_aux=True)
        stacked = {
            k: jnp.asarray([c.get(k, 0.0) for c in cotangents.values()], v.dtype)
            for k, v in losses.items()
        }
        return losses, aux, jax.vmap(lambda c: pull(c)[0])(stacked)

    losses, aux, grads = jax.tree.map(np.asarray, jit(run)(inputs))
    return losses, aux, {
        name: jax.tree.map(lambda g, i=i: g[i], grads) for i, name in enumerate(cotangents)
    }
