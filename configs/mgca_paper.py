"""MGCA as its released code runs: two devices, each with its own negatives, codes and statistics.

Not reproduced: dropout 0.1 of the text tower, early stopping.
"""

from brgsa_jax.configs._base import base, with_objective, with_radiographs
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe.

    Args:
        arg: "vit2d" (default) or "resnet50".
    """
    config = with_radiographs(with_objective(base(), "mgca"), arg or "vit2d")
    config.name = "mgca_paper"
    config.model.dtype = "float32"
    config.model.text.update({"depth": 6, "position_ids": "zero", "token_types": 0})
    config.model.batch_statistics = "local"
    config.model.local_head.mask_padding = False
    config.model.words.update({"attention_of": "next", "separator": True, "truncated": "drop"})
    config.losses.info_nce.update({"negatives": "local", "positives": ()})
    config.losses.prototype_alignment.codes = "local"
    config.losses.token_alignment.update({
        "mask_padding": False, "normalize_patch_context": arg == "resnet50",
        "patch_weights": "uniform" if arg == "resnet50" else "attention"})
    config.data.update({"batch_size": 144, "captions": "report", "sentences": 0})
    config.optim.update({
        "learning_rate": 2e-5, "weight_decay": 0.05, "decay": "all", "clip": 0.0,
        "warmup": "40%", "floor": 1e-8, "start": (("params/prototypes", "1epochs"),)})
    with config.ignore_type():
        config.train.update({"steps": "50epochs", "eval_every": "1epochs",
                             "checkpoint_every": "1epochs"})
    return config
