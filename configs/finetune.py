"""A classifier on the image tower of a trained model, by labels instead of reports.

"finetune:FOLDER" starts from a model, of the sizes it has: the work directory of a run that has
finished, or a folder of one. "finetune" is a 3-D ViT, with weights from `model.vision.init_from`,
"finetune:2d" MGCA's protocol for radiographs, a linear head on a frozen tower ("2d/resnet50" is its
other tower), and "finetune:phantom" the demo's small towers, for `model.init_from`.
"""

import json
from pathlib import Path

from brgsa_jax.configs import phantom
from brgsa_jax.configs._base import base, classification, with_radiographs
from ml_collections import ConfigDict

from brgsa_jax.config import UserError, from_tree

# What does not train. A linear probe trains the classifier alone.
TUNED = ("params/(?!vision/|classifier/).*",)
PROBED = ("params/(?!classifier/).*",)

CHEXPERT_5 = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe.

    Args:
        arg: "", "2d", "2d/resnet50", "phantom", or a folder of a trained model.

    Raises:
        UserError: no model at the folder, or an unknown argument.
    """
    if arg == "phantom":
        config = phantom.get_config()
        config.optim.update({"name": "adamw", "learning_rate": 1e-4, "warmup": "5%"})
        config.train.update({"steps": 300, "checkpoint_every": 100})
        config = _classifier(config, arg)
        # The tower has learned these patients; the head has few steps to come from nothing.
        config.optim.groups = (("params/classifier/.*", 100.0),)
        return config
    config = base()
    config.optim.update({"learning_rate": 2e-5, "clip": 1.0})
    with config.ignore_type():
        config.train.update({"steps": "10epochs", "eval_every": "1epochs",
                             "checkpoint_every": "1epochs"})
    if arg in ("", "2d", "2d/resnet50"):
        # Nothing reads texts: a text tower of no size stands in for one.
        config.model.text.update({"width": 16, "depth": 1, "heads": 1, "mlp_width": 16,
                                  "last_n_layers": 1, "remat": "none"})
    else:
        _take_model(config, Path(arg))
    config = _classifier(config, arg)
    if arg.startswith("2d"):
        with_radiographs(config, arg.partition("/")[2] or "vit2d")
        config.model.classes = CHEXPERT_5
        config.data.batch_size = 48
        # Its learning rate stays as it is: a plateau cannot last longer than the run.
        config.optim.update({"learning_rate": 5e-4, "weight_decay": 1e-6, "decay": "all",
                             "clip": 0.0, "schedule": "plateau", "warmup": "0%",
                             "plateau_patience": 50, "freeze": PROBED, "groups": ()})
        config.train.steps = "50epochs"
    return config


def _classifier(config: ConfigDict, arg: str) -> ConfigDict:
    """Puts a classifier, its labels and its objective into a configuration."""
    config.name = "_".join(["finetune", *arg.split("/")]) if arg in (
        "2d", "2d/resnet50", "phantom") else "finetune"
    # Names of findings; () is filled in with those of the data set.
    config.model.classes = ()
    config.data.captions = "summary"
    # Labels in place of the data set's findings: a table with the column id and one for each
    # class, of 1, 0, and -1 or nothing for what is not known.
    config.data.labels = ""
    # Share of the patients whose labels are used; a smaller share is part of a larger one.
    config.data.label_fraction = 1.0
    config.losses = ConfigDict({"classification": classification()})
    config.model.bank.update({"init": "orthogonal", "frozen": True})
    config.optim.freeze = TUNED
    config.optim.groups = (("params/classifier/.*", 10.0),)
    return config


def _take_model(config: ConfigDict, folder: Path) -> None:
    """Gives a configuration the sizes of a trained model, and its weights to start from."""
    try:
        found = from_tree(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        model = found.model.unlock()
        model.text.update({"tokenizer": "", "init_from": ""})
        model.vision.init_from = ""
        config.model = model
        config.model.init_from = str(folder)
        config.data.crop = tuple(found.data.crop if "data" in found else model.input.shape)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"finetune:{folder} names no trained model ({error}); give a work "
                        "directory of brgsa train, a folder of a model, phantom, 2d or "
                        "2d/resnet50") from error
