"""Plain CLIP with projection heads: BrgSA's towers without the bank."""

from brgsa_jax.configs._base import base, with_objective, with_volumes
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe.

    Args:
        arg: encoder of volumes, see `_base.with_volumes`; "vit3d" by default.
    """
    return with_volumes(with_objective(base(), "clip"), arg or "vit3d")
