"""BrgSA at its published size: knowledge bank of 2048 rows, summaries as captions."""

from brgsa_jax.configs._base import base, with_objective, without_argument
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe; takes no argument."""
    return without_argument(with_objective(base(), "brgsa"), arg)
