"""The weighted sum of terms: what each term passes on, golden totals, the learned scale."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brgsa_jax import losses, registry
from brgsa_jax.config import get_config
from brgsa_jax.losses.objective import Features, diagnostics, objective

B, D, N, T, K = 8, 16, 6, 5, 12
KNOWLEDGE = {"contrast": 1.0, "contrast_reconstructed": 0.7, "reconstruction": 0.3,
             "temperature": 0.2, "scale": 0.5, "negatives": "global", "positives": (0, 1)}
TOKENS = {"temperature": 0.2, "mask_padding": True, "normalize_patch_context": False,
          "bidirectional": True, "word_weights": "attention", "patch_weights": "attention",
          "low": 0.2, "high": 0.8, "cross_attention_heads": 0, "reduction": "sum"}
PROTOTYPES = {"temperature": 0.3, "epsilon": 0.1, "iterations": 2, "codes": "global",
              "normalized_gradient": True, "reduction": "mean"}


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("f4")


def make_features(**changes):
    """Random features of one device with everything any term reads."""
    rng = np.random.default_rng(0)
    pad = np.arange(T)[None] >= rng.integers(2, T + 1, B)[:, None]
    attention = {side: {"in_w": random(3 * D, D, seed=i) / 4, "in_b": random(3 * D, seed=i + 1),
                        "out_w": random(D, D, seed=i + 2) / 4, "out_b": random(D, seed=i + 3)}
                 for i, side in enumerate(("word", "patch"))}
    shared = {"prototypes": random(K, D, seed=10), "cross_attention": attention,
              "logit": {"log_scale": np.float32(np.log(5.0)), "bias": np.float32(-2.0)}}
    values = {
        "image": random(B, D), "text": random(B, D, seed=1), "shared": shared,
        "groups": np.stack([np.arange(B) // 2, np.arange(B) // 3, np.zeros(B, int)], axis=1),
        "patches": random(B, N, D, seed=2), "words": random(B, T, D, seed=3), "pad_mask": pad,
        "patch_attention": rng.random((B, N)).astype("f4"),
        "word_attention": np.where(pad, 0, rng.random((B, T))).astype("f4"),
        "bank": random(K, D, seed=4), "logits": random(B, 3, seed=5),
        "labels": rng.integers(-1, 2, (B, 3))}
    return Features(**{**values, **changes})


def tokens_of(f, patch_weights=None, word_weights=None, **options):
    if word_weights is None:
        word_weights = losses.attention_weights(f.word_attention, low=0.2, high=0.8)
    return losses.token_alignment(
        f.patches, f.words, word_weights=word_weights, patch_weights=patch_weights,
        pad_mask=f.pad_mask, **{"temperature": 0.2, "normalize_patch_context": False, **options})


def patch_weights_of(f):
    return losses.attention_weights(f.patch_attention, low=0.2, high=0.8)


def knowledge_of(f, **options):
    found = losses.knowledge_interaction(f.image, f.text, f.bank, temperature=0.2, scale=0.5,
                                         positives=f.groups[:, :2], **options)
    return {"image_to_text": (1.0, found.contrast[0]), "text_to_image": (1.0, found.contrast[1]),
            "image_to_text_bridged": (0.7, found.contrast_reconstructed[0]),
            "text_to_image_bridged": (0.7, found.contrast_reconstructed[1]),
            "mse_image": (0.3, found.reconstruction[0]),
            "mse_text": (0.3, found.reconstruction[1])}


def pair(names, factor, values):
    return {name: (factor, value) for name, value in zip(names, values, strict=True)}


DIRECTIONS = ("image_to_text", "text_to_image")
# Case -> (term, its options, the loss it wraps with the factor of each part in the total).
CASES = {
    "info_nce": ("info_nce", {"temperature": 0.2, "negatives": "global", "positives": (),
                              "reduction": "sum"},
                 lambda f: pair(DIRECTIONS, 1.0, losses.info_nce(f.image, f.text,
                                                                 temperature=0.2))),
    "info_nce, mean of a learned scale, one column": (
        "info_nce", {"temperature": 0.0, "negatives": "ring", "positives": (1,),
                     "reduction": "mean"},
        lambda f: pair(DIRECTIONS, 0.5, losses.info_nce(f.image, f.text, temperature=1 / 5.0,
                                                        positives=f.groups[:, 1]))),
    "sigmoid": ("sigmoid", {"positives": (0, 2)}, lambda f: {"sigmoid": (1.0, losses.sigmoid(
        f.image, f.text, logit_scale=5.0, logit_bias=-2.0, positives=f.groups[:, [0, 2]]))}),
    "knowledge_interaction": ("knowledge_interaction", KNOWLEDGE, knowledge_of),
    "token_alignment": ("token_alignment", TOKENS, lambda f: pair(
        ("word", "patch"), 1.0, tokens_of(f, patch_weights_of(f)))),
    "token_alignment, switched": (
        "token_alignment", {**TOKENS, "mask_padding": False, "normalize_patch_context": True,
                            "word_weights": "uniform", "patch_weights": "uniform",
                            "cross_attention_heads": 2, "reduction": "mean"},
        lambda f: pair(("word", "patch"), 0.5, tokens_of(
            f, mask_padding=False, normalize_patch_context=True,
            word_weights=~f.pad_mask / (~f.pad_mask).sum(axis=1, keepdims=True),
            cross_attention={**f.shared["cross_attention"], "heads": 2}))),
    "prototype_alignment": ("prototype_alignment", PROTOTYPES, lambda f: pair(
        [f"prototype_{name}" for name in DIRECTIONS], 0.5, losses.prototype_alignment(
            f.image, f.text, f.shared["prototypes"], temperature=0.3, epsilon=0.1, iterations=2,
            normalized_gradient=True))),
    "local_alignment": ("local_alignment", {"temperatures": (3.0, 4.0, 5.0), "aggregate": "mean",
                                            "reduction": "sum"},
                        lambda f: pair([f"local_{name}" for name in DIRECTIONS], 1.0,
                                       losses.local_alignment(
            f.patches.transpose(0, 2, 1).reshape(B, D, 1, 2, 3), f.words.transpose(0, 2, 1),
            (~f.pad_mask).sum(axis=1), temperatures=(3.0, 4.0, 5.0), aggregate="mean"))),
    "classification": ("classification", {"positive_weights": ()},
                       lambda f: {"classification": (1.0, losses.classification(f.logits,
                                                                                f.labels))}),
    "classification, positives weigh more": (
        "classification", {"positive_weights": (1.0, 2.0, 4.0)},
        lambda f: {"classification": (1.0, losses.classification(
            f.logits, f.labels, positive_weights=jnp.array([1.0, 2.0, 4.0])))}),
}


def test_every_registered_term_is_here():
    assert {term for term, *_ in CASES.values()} == set(registry.names("term"))


@pytest.mark.parametrize("case", CASES)
def test_a_term_is_the_weighted_loss_it_wraps(case):
    name, options, parts_of = CASES[case]

    def both(features):
        ours = objective(features, {name: {"weight": 0.25, **options}})
        return ours, parts_of(features)

    # The learned scale is traced in the term and written out in the case.
    ours, parts = jax.tree.map(np.asarray, golden.jit(both)(make_features()))
    assert set(ours.terms) == set(parts)
    for part, (_, value) in parts.items():
        np.testing.assert_allclose(ours.terms[part], value, rtol=1e-6, err_msg=part)
    expected = 0.25 * sum(factor * value for factor, value in parts.values())
    np.testing.assert_allclose(ours.total, expected, rtol=1e-6)
    assert len({float(value) for _, value in parts.values()}) == len(parts) and expected != 0


def test_patches_without_attention_weigh_the_same():
    def word_and_patch(features, weights):
        term = {**TOKENS, "weight": 1.0, "patch_weights": weights}
        return objective(features, {"token_alignment": term}).terms

    features = make_features()
    without = golden.jit(lambda f: word_and_patch(f, "attention"))(
        features._replace(patch_attention=None))
    uniform, attended = golden.jit(lambda f: [word_and_patch(f, w) for w in (
        "uniform", "attention")])(features)
    assert without == uniform and abs(float(attended["patch"] - uniform["patch"])) > 1e-3


def test_terms_of_one_name_keep_apart_and_add_up():
    nce = CASES["info_nce"][1]
    found = golden.jit(lambda f: objective(f, {
        "knowledge_interaction": {"weight": 2.0, **KNOWLEDGE}, "info_nce": {"weight": 1.0, **nce},
    }))(make_features())
    terms = {name: float(value) for name, value in found.terms.items()}
    assert {"image_to_text", "info_nce_image_to_text"} <= set(terms) and len(terms) == 8
    weights = {"image_to_text": 2.0, "text_to_image": 2.0, "image_to_text_bridged": 1.4,
               "text_to_image_bridged": 1.4, "mse_image": 0.6, "mse_text": 0.6,
               "info_nce_image_to_text": 1.0, "info_nce_text_to_image": 1.0}
    np.testing.assert_allclose(found.total, sum(weights[name] * value
                                                for name, value in terms.items()), rtol=1e-6)


def test_weight_zero_skips_a_term_even_without_its_features():
    bare = Features(random(B, D), random(B, D, seed=1))
    nce = {"weight": 1.0, **CASES["info_nce"][1]}
    off = {name: {"weight": 0.0} for name in registry.names("term") if name != "info_nce"}
    alone, more = (objective(bare, chosen) for chosen in ({"info_nce": nce},
                                                          {**off, "info_nce": nce}))
    assert set(more.terms) == set(DIRECTIONS)
    np.testing.assert_array_equal(more.total, alone.total)
    assert objective(bare, off).total == 0 and not objective(bare, {}).terms


def test_wrong_names_list_the_choices():
    features = make_features()
    with pytest.raises(KeyError, match="did you mean 'info_nce'.*sigmoid"):
        objective(features, {"infonce": {"weight": 1.0}})
    with pytest.raises(ValueError, match="reduction='max'.*'sum', 'mean'"):
        objective(features, {"info_nce": {"weight": 1.0, **CASES["info_nce"][1],
                                          "reduction": "max"}})
    with pytest.raises(ValueError, match="patch_weights='cls'.*'attention', 'uniform'"):
        objective(features, {"token_alignment": {"weight": 1.0, **TOKENS, "patch_weights": "cls"}})


@pytest.mark.parametrize("name", ["info_nce", "sigmoid", "knowledge_interaction"])
def test_the_learned_scale_is_trained(name):
    options = dict(CASES[name][1])
    if "temperature" in options:
        options["temperature"] = 0.0
    features = make_features()

    def loss(log_scale):
        logit = {**features.shared["logit"], "log_scale": log_scale}
        mine = features._replace(shared={**features.shared, "logit": logit})
        return objective(mine, {name: {"weight": 1.0, **options}}).total, mine.logit_scale

    run = golden.jit(jax.value_and_grad(loss, has_aux=True))
    (value, scale), slope = run(jnp.log(5.0))
    np.testing.assert_allclose(scale, 5.0, rtol=1e-6)
    difference = (run(jnp.log(5.0) + 0.01)[0][0] - run(jnp.log(5.0) - 0.01)[0][0]) / 0.02
    np.testing.assert_allclose(slope, difference, rtol=2e-3)
    assert abs(float(slope)) > 0.1


def test_diagnostics_are_of_the_bank_only_where_there_is_one():
    features = make_features()
    run = golden.jit(lambda f: diagnostics(f, (0,), bank_scale=0.5))
    found, without = run(features), run(features._replace(bank=None))
    assert {name.split("/")[0] for name in found} == {"batch", "bank"}
    assert set(without) == {name for name in found if name.startswith("batch/")}
    health = losses.bank_health(features.image, features.text, features.bank, scale=0.5)
    np.testing.assert_allclose(found["bank/usage_entropy"], health.usage_entropy, rtol=1e-6)
    np.testing.assert_allclose(found["batch/duplicates"], without["batch/duplicates"])
    many = golden.jit(lambda f: diagnostics(f, (0, 2)))(features)
    assert many["batch/duplicates"] > found["batch/duplicates"]


# --------------------------------------------------------------------------------------------
# The published objectives, by the recipes that name their switches.

MIXES = {"total_111": (1.0, 1.0, 1.0), "total_1_07_05": (1.0, 0.7, 0.5)}


def mgca_losses(meta, weights):
    """Losses of the recipe `mgca_paper` with the hyper-parameters of a golden file."""
    h = meta["hparams"]
    arg = "vit2d" if meta["backbone"] == "vit_base" else "resnet50"
    chosen = get_config(f"mgca_paper:{arg}").losses.to_dict()
    chosen["info_nce"]["temperature"] = h["softmax_temperature"]
    chosen["token_alignment"].update(temperature=h["local_temperature"], cross_attention_heads=0,
                                     bidirectional=h["bidirectional"])
    chosen["prototype_alignment"].update(temperature=h["proto_temperature"], epsilon=h["epsilon"],
                                         iterations=h["sinkhorn_iterations"])
    order = ("info_nce", "token_alignment", "prototype_alignment")
    assert set(chosen) == set(order)
    for name, weight in zip(order, weights, strict=True):
        chosen[name]["weight"] = weight
    return chosen


@pytest.mark.parametrize("dtype", golden.DTYPES)
@pytest.mark.parametrize("path", golden.files("total"), ids=lambda p: p.stem)
def test_the_recipe_of_mgcas_code_has_its_total(path, dtype):
    with jax.enable_x64(dtype == "float64"):
        file = golden.Golden(path, dtype)
        attention = file.inputs("word_attn")["word_attn"]
        patch_attention = None
        if "in_cls_attn" in file.arrays:
            patch_attention = file.inputs("cls_attn")["cls_attn"].mean(axis=1)

        def function(x):
            features = Features(
                x["img_raw"], x["report_raw"], patches=x["patch_raw"], words=x["word_raw"],
                word_attention=attention, patch_attention=patch_attention,
                pad_mask=file["in_pad_mask"], shared={"prototypes": x["proto"]})
            return {name: objective(features, mgca_losses(file.meta, mix)).total
                    for name, mix in MIXES.items()}, None

        inputs = file.inputs("img_raw", "report_raw", "patch_raw", "word_raw", "proto_raw")
        proto = inputs.pop("proto_raw")
        # The stored gradient is taken at the normalised prototypes.
        inputs["proto"] = proto / np.linalg.norm(proto, axis=1, keepdims=True)
        totals, _, grads = golden.differentiate(function, inputs,
                                                {name: {name: 1.0} for name in MIXES})
        for name, total in totals.items():
            file.value(f"loss_{name}", total)
            file.gradients(name, grads[name])
        assert file.worst() <= 1.0, file.deviations


@pytest.mark.parametrize("dtype", golden.DTYPES)
@pytest.mark.parametrize("path", golden.files("cmki"), ids=lambda p: p.stem)
def test_the_recipe_of_brgsas_code_has_its_total(path, dtype):
    config = get_config("brgsa_paper")
    term = {**config.losses.knowledge_interaction.to_dict(), "scale": config.model.bank.scale}
    assert set(config.losses) == {"knowledge_interaction"}
    with jax.enable_x64(dtype == "float64"):
        file = golden.Golden(path, dtype)

        def function(x):
            features = Features(x["img"], x["text"], bank=x["W"])
            return {"loss": objective(features, {"knowledge_interaction": term}).total}, None

        totals, _, grads = golden.differentiate(function, file.inputs("img", "text", "W"),
                                                {"total": {"loss": 1.0}})
        file.value("loss", totals["loss"])
        file.gradients("total", grads["total"])
        assert file.worst() <= 1.0, file.deviations
