"""Ablations of both papers, one line each: "ablations:NAME", or "ablations:phantom/NAME"."""

from ml_collections import ConfigDict

from brgsa_jax.config import UserError, override
from brgsa_jax.config import get_config as load
from brgsa_jax.registry import miss

KI, ITA = "losses.knowledge_interaction", "losses.info_nce"
CTA, CPA = "losses.token_alignment", "losses.prototype_alignment"

# Name -> (recipe, what differs from it).
ABLATIONS = {
    "no_bank": ("clip", {}),
    "bank_128": ("brgsa", {"model.bank.rows": 128}),
    "bank_512": ("brgsa", {"model.bank.rows": 512}),
    "bank_1024": ("brgsa", {"model.bank.rows": 1024}),
    "bank_4096": ("brgsa", {"model.bank.rows": 4096}),
    "bank_frozen": ("brgsa", {"model.bank.frozen": True}),
    "bank_gaussian": ("brgsa", {"model.bank.init": "gaussian"}),
    "bank_xavier": ("brgsa", {"model.bank.init": "xavier"}),
    "bank_uniform": ("brgsa", {"model.bank.init": "uniform"}),
    "bank_kmeans": ("brgsa", {"model.bank.init": "kmeans"}),
    "bank_scaled": ("brgsa", {"model.bank.scale": 768 ** -0.5}),
    "no_bridged_contrast": ("brgsa", {f"{KI}.contrast_reconstructed": 0.0}),
    "no_reconstruction": ("brgsa", {f"{KI}.reconstruction": 0.0}),
    "reconstruction_1": ("brgsa", {f"{KI}.reconstruction": 1.0}),
    "bridged_contrast_0.5": ("brgsa", {f"{KI}.contrast_reconstructed": 0.5}),
    "no_summary": ("brgsa", {"data.captions": "report", "data.sentences": 0}),
    "one_sentence": ("brgsa", {"data.sentences": 1}),
    "temperature_0.05": ("brgsa", {f"{KI}.temperature": 0.05}),
    "temperature_0.2": ("brgsa", {f"{KI}.temperature": 0.2}),
    "temperature_learned": ("brgsa", {f"{KI}.temperature": 0.0, "model.logit.scale": 10.0}),
    "own_pair_only": ("brgsa", {f"{KI}.positives": ()}),
    "no_ita": ("mgca", {f"{ITA}.weight": 0.0}),
    "no_cta": ("mgca", {f"{CTA}.weight": 0.0}),
    "no_cpa": ("mgca", {f"{CPA}.weight": 0.0}),
    "ita_only": ("mgca", {f"{CTA}.weight": 0.0, f"{CPA}.weight": 0.0}),
    "cta_from_words_only": ("mgca", {f"{CTA}.bidirectional": False}),
    "cta_trained_attention": ("mgca", {"model.cross_attention_heads": 1}),
    "cta_padding_competes": ("mgca", {f"{CTA}.mask_padding": False}),
    "prototypes_100": ("mgca", {"model.prototypes": 100}),
    "prototypes_1000": ("mgca", {"model.prototypes": 1000}),
    "ita_temperature_0.1": ("mgca", {f"{ITA}.temperature": 0.1}),
    "local_negatives": ("mgca", {f"{ITA}.negatives": "local", f"{CPA}.codes": "local",
                                 "model.batch_statistics": "local"}),
}
# Overrides that make a recipe of the demo small enough to try a sweep in seconds; nothing of note
# is learned at this size. Volumes are 32×32×16 voxels over the phantoms' field of view.
SMALL = {
    "model.input.shape": (32, 32, 16), "model.input.spacing": (12.0, 12.0, 24.0),
    "data.crop": (32, 32, 16), "model.vision.patch": (16, 16, 8), "model.vision.stem": (),
    "model.embed_dim": 24, "model.vision.width": 24, "model.vision.mlp_width": 48,
    "model.text.width": 24, "model.text.mlp_width": 48, "model.head.hidden": 48,
    "model.local_head.hidden": 48, "data.batch_size": 16, "optim.name": "adamw",
    "optim.learning_rate": 3e-3, "optim.ema": 0.0}
# What a change needs besides on the demo's small towers.
ON_PHANTOMS = {"no_summary": {"model.text.max_tokens": 64}}


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe of an ablation.

    Args:
        arg: a name of `ABLATIONS`, or "phantom/NAME" for the same change of the demo's recipe.

    Raises:
        UserError: unknown name; the choices are listed.
    """
    where, _, name = arg.rpartition("/")
    if name not in ABLATIONS or where not in ("", "phantom"):
        raise UserError(miss("ablation", arg, ABLATIONS))
    recipe, changes = ABLATIONS[name]
    config = load(f"phantom:{recipe}" if where else recipe)
    if where:
        changes = {**changes, **ON_PHANTOMS.get(name, {})}
    return override(config, {**changes, "name": f"{config.name}_{name}"})
