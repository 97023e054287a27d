"""BrgSA at its published size: knowledge bank of 2048 rows, summaries as captions."""

from brgsa_jax.configs._base import base, with_losses
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; takes no argument."""
    config = with_losses(base(), "brgsa")
    config.name = "brgsa"
    config.model.bank.rows = 2048
    return config
