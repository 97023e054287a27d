"""All terms of both papers on CT: contrast, knowledge bank, token and prototype alignment."""

from brgsa_jax.configs._base import base, with_objective
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; takes no argument."""
    return with_objective(base(), "brgsa_mgca")
