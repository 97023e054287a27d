"""The demo: phantom chest CT, small towers, minutes on two CPU cores.

"phantom" is BrgSA, "phantom:clip" the same towers without the bank.
"""

from brgsa_jax.configs._base import base, with_losses
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the demo recipe.

    Args:
        arg: losses, "brgsa" (default) or "clip".
    """
    recipe = arg or "brgsa"
    config = with_losses(base(), recipe)
    config.name = f"phantom_{recipe}"
    config.model.embed_dim = 96
    config.model.dtype = "float32"
    config.model.input.update({"shape": (64, 64, 32), "spacing": (6.0, 6.0, 12.0)})
    config.model.vision.update({"patch": (8, 8, 8), "width": 96, "depth": 3, "heads": 3,
                                "mlp_width": 384, "pool": "mean", "remat": "none"})
    config.model.text.update({"max_tokens": 48, "width": 96, "depth": 2, "heads": 3,
                              "mlp_width": 192, "positions": 64, "last_n_layers": 1,
                              "remat": "none"})
    config.model.bank.rows = 256 if recipe == "brgsa" else 0
    config.data.update({"crop": (64, 64, 32), "batch_size": 64, "threads": 2})
    config.optim.update({"learning_rate": 1e-3, "weight_decay": 0.05, "clip": 1.0})
    config.train.update({"steps": 400, "eval_every": 0, "checkpoint_every": 100, "log_every": 5})
    return config
