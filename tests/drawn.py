"""Weights and states of runs drawn by NumPy: to compile an initialisation takes seconds."""

import jax
import numpy as np
import optax

from brgsa_jax.train.step import make_training


def weights(shapes, seed=0):
    """Arrays of usual sizes for a tree of shapes, without a one or zero that could hide a fault."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return rng.uniform(0.7, 1.3, leaf.shape).astype("f4")
        stacked = any(key.key == "blocks" for key in path)
        fan_in = np.prod(leaf.shape[stacked:-1]) if name == "kernel" else 25.0
        return (rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype("f4")

    return jax.tree.map_with_path(fill, shapes)


def state(training, model=None):
    """A new state of an Adam on its devices, of given or drawn {params, bank, stats}."""
    abstract = training.abstract
    model = weights(abstract.model) if model is None else model
    made = abstract.replace(
        **model, step=np.int32(0), ema=None if abstract.ema is None else model,
        opt=jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract.opt),
        lr_scale=optax.contrib.reduce_on_plateau().init(None))
    # One buffer each, so that donation never sees one twice.
    return jax.tree.map(lambda x, leaf: jax.device_put(np.array(x), leaf.sharding, may_alias=False),
                        made, abstract)


def training(*args, **options):
    """`make_training` of a run whose new state is drawn."""
    made = make_training(*args, **options)
    return made._replace(init=lambda seed: state(made))
