"""Plain CLIP with projection heads: BrgSA's towers without the bank."""

from brgsa_jax.configs._base import base, with_losses
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; takes no argument."""
    config = with_losses(base(), "clip")
    config.name = "clip"
    return config
