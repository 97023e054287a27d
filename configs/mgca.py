"""MGCA: instance, token and prototype alignment, with the flaws of its code mended.

"mgca" reads radiographs by a ViT-B/16, "mgca:resnet50" by a ResNet-50, "mgca:3d" CT volumes by
the 3-D ViT.
"""

from brgsa_jax.configs._base import base, with_objective, with_radiographs
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe.

    Args:
        arg: "vit2d" (default), "resnet50" or "3d".
    """
    config = with_objective(base(), "mgca")
    config.data.captions = "summary" if arg == "3d" else "report"
    if arg != "3d":
        with_radiographs(config, arg or "vit2d")
        config.data.sentences = 0
    if arg == "resnet50":
        config.losses.token_alignment.patch_weights = "uniform"
    return config
