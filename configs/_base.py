"""What all recipes share: the published BrgSA geometry, ViT-B and BERT-base sizes."""

from ml_collections import ConfigDict

from brgsa_jax.config import UserError
from brgsa_jax.registry import miss


def base() -> ConfigDict:
    """Returns the real-size model and training settings without any loss."""
    config = ConfigDict()
    config.name = "base"
    config.seed = 0

    config.model = ConfigDict({
        "embed_dim": 768,
        "dtype": "bfloat16",
        # Network input: canonical LPS grid in voxels and mm; HU window mapped to [-1, 1], then
        # (x - mean) / std with the statistics the released weights were trained with.
        "input": {
            "shape": (256, 256, 128),
            "spacing": (1.5, 1.5, 3.0),
            "window": (-1000, 1000),
            "mean": 0.4978,
            "std": 0.2449,
        },
        "vision": {
            "name": "vit3d",
            "patch": (16, 16, 8),
            "width": 768,
            "depth": 12,
            "heads": 12,
            "mlp_width": 3072,
            "positions": "learned",
            "pool": "cls",
            # () is one linear map per patch; see nn.vit3d.ViT3D.
            "stem": (),
            "remat": "full",
            "implementation": "auto",
        },
        "text": {
            "name": "bert",
            # A Hugging Face folder or id; "" trains a WordPiece vocabulary on the captions.
            "tokenizer": "",
            "max_tokens": 97,
            # 0 is filled in from the tokenizer.
            "vocab": 0,
            "width": 768,
            "depth": 12,
            "heads": 12,
            "mlp_width": 3072,
            "positions": 512,
            "last_n_layers": 4,
            "aggregate": "sum",
            # Constant divisor of the token sum; 0 divides by the number of real tokens.
            "divisor": 0,
            "remat": "full",
            "implementation": "auto",
        },
        # rows=0 means no bank.
        "bank": {"rows": 0, "init": "orthogonal", "frozen": False},
    })

    config.data = ConfigDict({
        # Folder written by `brgsa data build`.
        "path": "",
        "crop": (224, 224, 112),
        "batch_size": 64,
        # Sentences sampled per caption, in random order; 0 keeps all.
        "sentences": 5,
        # Caption of a volume without findings.
        "normal_caption": "There is no abnormality",
        "threads": 8,
    })

    config.losses = ConfigDict()

    config.optim = ConfigDict({
        "name": "adamw",
        "learning_rate": 5e-5,
        "betas": (0.9, 0.999),
        # Only "muon": Adam's learning rate for what is no kernel, as a share of Muon's.
        "adam_share": 0.2,
        "weight_decay": 0.05,
        "clip": 0.25,
        # "cosine" decays to 0 at the last step; "plateau" halves on a flat validation loss.
        "schedule": "cosine",
        "warmup": "5%",
        "plateau_factor": 0.5,
        "plateau_patience": 5,
        # (path regex, factor): learning-rate groups; factor 0 freezes.
        "groups": (),
        # Decay of the exponential moving average of weights and bank; 0 keeps none.
        "ema": 0.0,
    })

    config.train = ConfigDict({
        "steps": 30_000,
        "log_every": 10,
        # Steps between validation losses; 0 never validates.
        "eval_every": 1000,
        "checkpoint_every": 500,
        "keep_checkpoints": 2,
    })

    # -1 takes the devices that are left; rules are (path regex, (axis or None, …)).
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "rules": ()})
    return config


def info_nce() -> ConfigDict:
    """InfoNCE, both directions summed, fixed temperature 0.1 as BrgSA's logit scale of 10."""
    return ConfigDict({"weight": 1.0, "temperature": 0.1, "negatives": "global",
                       "multi_positive": False})


def knowledge_interaction() -> ConfigDict:
    """BrgSA's three terms with the published weights β=1, γ=1, α=0.5."""
    return ConfigDict({
        "weight": 1.0, "contrast": 1.0, "contrast_reconstructed": 1.0, "reconstruction": 0.5,
        "temperature": 0.1, "scale": 1.0, "negatives": "global", "multi_positive": False})


def with_losses(config: ConfigDict, recipe: str) -> ConfigDict:
    """Puts the losses of a named recipe, "brgsa" or "clip", into a configuration."""
    choices = {"brgsa": {"knowledge_interaction": knowledge_interaction},
               "clip": {"info_nce": info_nce}}
    if recipe not in choices:
        raise UserError(miss("recipe", recipe, choices))
    config.losses = ConfigDict({name: make() for name, make in choices[recipe].items()})
    return config
