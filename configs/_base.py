"""What all recipes share: the published BrgSA geometry, ViT-B and BERT-base sizes, objectives."""

from ml_collections import ConfigDict

from brgsa_jax.config import UserError
from brgsa_jax.registry import miss

POSITIVES = ("caption", "report")


def base() -> ConfigDict:
    """Returns the real-size model and training settings without any loss."""
    config = ConfigDict()
    config.name = "base"
    config.seed = 0

    config.model = ConfigDict({
        "embed_dim": 768,
        "dtype": "bfloat16",
        # A whole model to start from: a folder of one, a finished work directory, or a checkpoint
        # of BrgSA or MGCA. Towers may start from elsewhere by their own init_from.
        "init_from": "",
        # Network input: canonical LPS grid in voxels and mm; HU window mapped to [-1, 1], then
        # (x - mean) / std with the statistics the released weights were trained with.
        "input": {
            "shape": (256, 256, 128),
            "spacing": (1.5, 1.5, 3.0),
            "window": (-1000, 1000),
            # Size and HU clamp (low, high) of the data set's images; filled in from it.
            "stored": (),
            "clamp": (),
            "mean": 0.4978,
            "std": 0.2449,
        },
        "vision": {
            "name": "vit3d",
            # Weights to start from: a Hugging Face folder or id, a file of timm, torchvision,
            # BrgSA or MGCA, or a trained model; "" starts at random. 2-D weights become 3-D by
            # the "mean" over the depth of a patch, or at its "centre".
            "init_from": "",
            "inflate": "mean",
            "patch": (16, 16, 8),
            "width": 768,
            "depth": 12,
            "heads": 12,
            "mlp_width": 3072,
            "positions": "learned",
            # Patches per axis of the position table, (): those of input.shape.
            "base_grid": (),
            "pool": "cls",
            # () is one linear map per patch; see nn.vit.ViT.
            "stem": (),
            "remat": "full",
            # Blocks a turn of the loop over them; more compile longer and copy less.
            "unroll": 1,
            "implementation": "auto",
        },
        "text": {
            "name": "bert",
            # As vision.init_from; a Hugging Face folder brings its tokenizer along.
            "init_from": "",
            # A Hugging Face folder or id; "" trains a WordPiece vocabulary on the captions.
            "tokenizer": "",
            "max_tokens": 97,
            # Clean what Model.encode_text is given as reports are, which released models expect.
            "clean": False,
            # 0 is filled in from the tokenizer.
            "vocab": 0,
            "width": 768,
            "depth": 12,
            "heads": 12,
            "mlp_width": 3072,
            "positions": 512,
            "last_n_layers": 4,
            "aggregate": "sum",
            # "mean" over tokens, or "cls", the first token.
            "pool": "mean",
            # "zero" gives every token position 0, as MGCA's released text tower.
            "position_ids": "sequential",
            "token_types": 2,
            "norm_epsilon": 1e-12,
            # Constant divisor of the token sum; 0 divides by the number of real tokens.
            "divisor": 0,
            "remat": "full",
            # Blocks a turn of the loop over them; more compile longer and copy less.
            "unroll": 1,
            "implementation": "auto",
        },
        # Projection of the pooled vectors: "linear", or MGCA's two-layer "batchnorm".
        "head": {"name": "linear", "hidden": 2048},
        # Projection of patches and words for token-level losses; "" means none. Padding words
        # stay out of its batch statistics.
        "local_head": {"name": "", "hidden": 2048, "mask_padding": True},
        # Batch statistics of the whole batch, or of each device alone ("local").
        "batch_statistics": "global",
        # Word pieces to words; "next", True and "drop" are what MGCA's code does, see
        # nn.words.gather_words.
        "words": {"attention_of": "own", "separator": False, "truncated": "keep"},
        # rows=0 means no bank; scale multiplies its logits.
        "bank": {"rows": 0, "init": "orthogonal", "frozen": False, "scale": 1.0},
        # Prototypes of MGCA's CPA.
        "prototypes": 0,
        # Heads of a trained attention between patches and words in CTA; 0 is parameter-free.
        "cross_attention_heads": 0,
        # Where a learned logit scale (and SigLIP's bias) starts; scale=0 means none.
        "logit": {"scale": 0.0, "bias": 0.0},
    })

    config.data = ConfigDict({
        # Folder written by `brgsa data build`.
        "path": "",
        "crop": (224, 224, 112),
        "batch_size": 64,
        # "summary" is a sentence per canonical finding, "report" the whole text, "mixed" either.
        "captions": "summary",
        # Share of captions that are reports; only "mixed".
        "report_share": 0.5,
        # Summaries to train on in place of the data set's findings: what `brgsa summarize` wrote,
        # or any table with the columns id and findings.
        "summaries": "",
        # Sentences sampled per caption, in random order; 0 keeps all.
        "sentences": 5,
        # Share of each volume's sentences that training never sees, to test how robust it is.
        "drop": 0.0,
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
        # What "adamw" and "muon" decay: "matrices", or "all" weights.
        "decay": "matrices",
        "clip": 0.25,
        # "cosine" decays to 0 at the last step; "plateau" halves on a flat validation loss.
        "schedule": "cosine",
        "warmup": "5%",
        # Where the cosine schedule starts its warm-up and where it ends.
        "floor": 0.0,
        "plateau_factor": 0.5,
        "plateau_patience": 5,
        # (path regex, factor): learning-rate groups.
        "groups": (),
        # Path regexes of weights that do not train, as "params/text/.*": they cost no backward
        # pass and no moments, and a part frozen whole keeps its batch statistics.
        "freeze": (),
        # (path regex, duration): weights left as they are until then.
        "start": (),
        # Decay of the exponential moving average of weights and bank; 0 keeps none.
        "ema": 0.0,
    })

    config.train = ConfigDict({
        "steps": 30_000,
        "log_every": 10,
        # Steps between validation losses; 0 never validates.
        "eval_every": 1000,
        # Volumes of the split "valid", patients kept whole, whose zero-shot macro AUROC every
        # validation logs too; 0 is none.
        "eval_volumes": 0,
        "checkpoint_every": 500,
        "keep_checkpoints": 2,
        # Chunks the towers run in, on each device; losses still see the whole batch. 0 is none.
        "microbatch": 0,
        # "mesh", or "pmap": data parallel over the devices of one process.
        "parallel": "mesh",
        # First and last step to write a profile of, as (20, 24); () for none.
        "profile": (),
    })

    # -1 takes the devices that are left; rules are (path regex, (axis or None, …)).
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "rules": ()})
    return config


def without_argument(config: ConfigDict, arg: str) -> ConfigDict:
    """Returns the configuration of a recipe that takes no argument.

    Raises:
        UserError: one was given.
    """
    if arg:
        raise UserError(f"the recipe {config.name!r} takes no argument, and {arg!r} was given; "
                        f"write {config.name}")
    return config


def info_nce(temperature: float = 0.1) -> ConfigDict:
    """InfoNCE; the default is BrgSA's fixed logit scale of 10, MGCA's ITA takes 0.07.

    Temperature 0 takes the learned scale. `positives` names what else than the own pair matches
    (`config.GROUPS`): by default captions that say the same, and reconstructions of one scan.
    "sum" of both directions or their "mean".
    """
    return ConfigDict({"weight": 1.0, "temperature": temperature, "negatives": "global",
                       "positives": POSITIVES, "reduction": "sum"})


def sigmoid() -> ConfigDict:
    """SigLIP with learned scale and bias."""
    return ConfigDict({"weight": 1.0, "positives": POSITIVES})


def knowledge_interaction() -> ConfigDict:
    """BrgSA's three terms with the published weights β=1, γ=1, α=0.5."""
    return ConfigDict({
        "weight": 1.0, "contrast": 1.0, "contrast_reconstructed": 1.0, "reconstruction": 0.5,
        "temperature": 0.1, "negatives": "global", "positives": POSITIVES})


def token_alignment() -> ConfigDict:
    """MGCA's CTA, with padding masked and contexts normalised.

    Weights of words and patches are the clipped "attention" of CLS, or "uniform".
    """
    return ConfigDict({
        "weight": 1.0, "temperature": 0.1, "mask_padding": True, "normalize_patch_context": True,
        "bidirectional": True, "word_weights": "attention", "patch_weights": "attention",
        "low": 0.1, "high": 0.9, "reduction": "sum"})


def prototype_alignment() -> ConfigDict:
    """MGCA's CPA; "global" codes balance the whole batch."""
    return ConfigDict({
        "weight": 1.0, "temperature": 0.2, "epsilon": 0.05, "iterations": 3, "codes": "global",
        "normalized_gradient": False, "reduction": "mean"})


def local_alignment() -> ConfigDict:
    """GLoRIA's local loss with the factors of BrgSA's configuration."""
    return ConfigDict({"weight": 1.0, "temperatures": (4.0, 5.0, 10.0), "aggregate": "sum",
                       "reduction": "sum"})


def classification() -> ConfigDict:
    """Binary cross-entropy of `model.classes`.

    Positive labels weigh 1, or a number for each class in `positive_weights`; ("prevalence",)
    fills in negatives over positives of the training labels.
    """
    return ConfigDict({"weight": 1.0, "positive_weights": ()})


def with_objective(config: ConfigDict, recipe: str) -> ConfigDict:
    """Puts an objective and what it learns beside the towers into a configuration.

    Args:
        config: from `base`; changed and returned.
        recipe: "clip", "siglip", "brgsa", "mgca" or "brgsa_mgca".

    Raises:
        UserError: unknown recipe.
    """
    tokens = {"token_alignment": token_alignment(), "prototype_alignment": prototype_alignment()}
    choices = {
        "clip": {"info_nce": info_nce()},
        "siglip": {"sigmoid": sigmoid()},
        "brgsa": {"knowledge_interaction": knowledge_interaction()},
        "mgca": {"info_nce": info_nce(0.07), **tokens},
        # The contrast of the knowledge interaction is the instance-wise term.
        "brgsa_mgca": {"knowledge_interaction": knowledge_interaction(), **tokens},
    }
    if recipe not in choices:
        raise UserError(miss("recipe", recipe, choices))
    config.losses = ConfigDict(choices[recipe])
    config.name = recipe
    if recipe == "siglip":
        config.model.logit.update({"scale": 10.0, "bias": -10.0})
    if recipe in ("brgsa", "brgsa_mgca"):
        config.model.bank.rows = 2048
    if recipe in ("mgca", "brgsa_mgca"):
        config.model.local_head.name = "batchnorm"
        config.model.prototypes = 500
    if recipe == "brgsa_mgca":
        # BrgSA's text tower pools by the mean: nothing trains the CLS row that would weigh words.
        config.losses.token_alignment.word_weights = "uniform"
    if recipe == "mgca":
        config.model.head.name = "batchnorm"
        config.model.embed_dim = 128
        config.model.text.update({"max_tokens": 112, "last_n_layers": 1, "pool": "cls"})
    return config


def with_volumes(config: ConfigDict, tower: str = "vit3d") -> ConfigDict:
    """Chooses the encoder of volumes.

    Args:
        config: from `base`; changed and returned.
        tower: "vit3d" (ViT-B), "vit3d_s", "vit3d_l", or the cheap "resnet3d18" and "resnet3d50".

    Raises:
        UserError: unknown tower.
    """
    vits = {"vit3d_s": (384, 12, 6), "vit3d": (768, 12, 12), "vit3d_l": (1024, 24, 16)}
    resnets = ("resnet3d18", "resnet3d50")
    if tower in resnets:
        config.model.vision = ConfigDict({"name": tower, "init_from": "", "inflate": "mean",
                                          "norm": "batch"})
        if "token_alignment" in config.losses:
            # Without a CLS token there is no attention to weigh patches by.
            config.losses.token_alignment.patch_weights = "uniform"
    elif tower in vits:
        width, depth, heads = vits[tower]
        config.model.vision.update({"width": width, "depth": depth, "heads": heads,
                                    "mlp_width": 4 * width})
    else:
        raise UserError(miss("vision tower", tower, (*vits, *resnets)))
    return config


def with_radiographs(config: ConfigDict, tower: str = "vit2d") -> ConfigDict:
    """Turns a configuration to radiographs: 256 × 256 grey levels, crops of 224 × 224.

    Args:
        config: from `base`; changed and returned.
        tower: "vit2d", ViT-B/16, or "resnet50" on crops enlarged to 299 × 299.

    Raises:
        UserError: unknown tower.
    """
    config.model.input.update({"shape": (224, 224), "spacing": (), "window": (0, 255),
                               "mean": 0.0, "std": 1.0})
    config.data.crop = (224, 224)
    if tower == "resnet50":
        config.model.vision = ConfigDict({"name": "resnet50", "init_from": "", "inflate": "mean",
                                          "resize": 299, "norm": "batch"})
    elif tower == "vit2d":
        del config.model.vision["stem"]
        config.model.vision.update({"name": "vit2d", "patch": (16, 16), "norm_epsilon": 1e-6})
    else:
        raise UserError(miss("vision tower", tower, ("vit2d", "resnet50")))
    return config
