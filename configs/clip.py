"""Plain CLIP with projection heads: BrgSA's towers without the bank."""

from brgsa_jax.configs._base import base, with_objective
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; takes no argument."""
    return with_objective(base(), "clip")
