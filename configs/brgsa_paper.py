"""BrgSA as its released code runs, on one device in bfloat16 instead of float16.

Not reproduced: weights the towers start from, early stopping, random captions in validation.
"""

from brgsa_jax.configs._base import base, with_objective, without_argument
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; takes no argument."""
    config = with_objective(base(), "brgsa")
    config.name = "brgsa_paper"
    config.model.vision.positions = "frozen"
    config.model.text.divisor = 97
    config.losses.knowledge_interaction.positives = ()
    config.optim.update({"name": "adam", "betas": (0.5, 0.999), "weight_decay": 1e-6,
                         "schedule": "plateau", "warmup": "0%"})
    with config.ignore_type():
        config.train.update({"steps": "39epochs", "eval_every": "1epochs",
                             "checkpoint_every": "1epochs"})
    return without_argument(config, arg)
