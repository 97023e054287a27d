"""The demo: phantom chest CT, small towers, minutes on two CPU cores.

"phantom" is BrgSA, "phantom:clip" the same towers without the bank; "siglip", "mgca" and
"brgsa_mgca" put the other objectives on them.
"""

from brgsa_jax.configs._base import base, with_objective
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the demo recipe.

    Args:
        arg: objective, "brgsa" (default), "clip", "siglip", "mgca" or "brgsa_mgca".
    """
    recipe = arg or "brgsa"
    config = with_objective(base(), recipe)
    config.name = f"phantom_{recipe}"
    config.model.embed_dim = 96
    config.model.dtype = "float32"
    # The second window is what emphysema and mosaic attenuation are read in. Mean and spread of
    # phantom voxels: the released statistics belong to the released weights.
    config.model.input.update({"shape": (64, 64, 32), "spacing": (6.0, 6.0, 12.0),
                               "window": ((-1000, 1000), (-1000, -700)),
                               "mean": -0.66, "std": 0.46})
    config.model.vision.update({"patch": (16, 16, 8), "stem": (((4, 4, 4), 32),), "width": 96,
                                "depth": 1, "heads": 3, "mlp_width": 384, "pool": "weighted",
                                "remat": "none"})
    config.model.text.update({"max_tokens": 12, "width": 96, "depth": 1, "heads": 3,
                              "mlp_width": 192, "positions": 64, "last_n_layers": 1,
                              "pool": "mean", "remat": "none"})
    config.model.head.hidden = config.model.local_head.hidden = 192
    config.model.bank.rows = min(config.model.bank.rows, 256)
    if recipe == "siglip":
        # The log-odds of a pair of this batch to match; -10 is meant for batches of thousands.
        config.model.logit.bias = -4.0
    config.model.prototypes = min(config.model.prototypes, 64)
    # One sentence a caption, as the prompts are: with several, the number of sentences is the
    # first thing the towers agree on, and it says nothing about which finding is there.
    config.data.update({"crop": (64, 64, 32), "batch_size": 48, "sentences": 1, "threads": 2})
    for term in config.losses.values():
        if "positives" in term:
            term.positives = ("caption",)
    # Towers that pool by the mean train no CLS token whose attention could weigh anything.
    if "token_alignment" in config.losses:
        config.losses.token_alignment.update({"word_weights": "uniform",
                                              "patch_weights": "uniform"})
    # Muon learns these small towers in far fewer steps than AdamW.
    config.optim.update({"name": "muon", "learning_rate": 2e-2, "weight_decay": 0.05, "clip": 1.0,
                         "ema": 0.98})
    config.train.update({"steps": 900, "eval_every": 0, "checkpoint_every": 300, "log_every": 10})
    return config
