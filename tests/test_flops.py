"""Analytic FLOPs beside hand numbers, and beside every product of the traced programs."""

import math

import jax
import jax.numpy as jnp
import pytest

from brgsa_jax import flops
from brgsa_jax.config import get_config
from brgsa_jax.hardware import CHIPS, chip_of
from brgsa_jax.losses.objective import Features, objective
from brgsa_jax.network import build
from brgsa_jax.nn.attention import Placement

SMALL = {"model.text.vocab": 50, "model.text.implementation": "xla"}


def products(jaxpr):
    """FLOPs of all matrix products and convolutions of a program, loops turned out."""
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(
                left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[parameters["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // features
        times = parameters["length"] if name == "scan" else 1
        for inner in jax.tree.leaves(parameters, is_leaf=lambda x: hasattr(x, "eqns")
                                     or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += times * products(inner)
    return total


def traced(function, *examples):
    return products(jax.make_jaxpr(function)(*examples).jaxpr)


def small(name, **changes):
    return get_config(name, **SMALL, **changes)


@pytest.mark.parametrize(("name", "changes"), [
    ("brgsa", {"data.crop": (64, 64, 32), "model.input.shape": (64, 64, 32),
               "model.vision.implementation": "xla"}),
    ("phantom", {"model.vision.implementation": "xla"}),
    ("mgca", {"data.crop": (64, 64), "model.input.shape": (64, 64),
              "model.vision.implementation": "xla"}),
    ("mgca:resnet50", {"model.vision.resize": 0, "data.crop": (97, 64)}),
    ("brgsa:resnet3d18", {"data.crop": (64, 49, 32)}),
    ("brgsa:resnet3d50", {"data.crop": (40, 64, 32)}),
])
def test_forward_is_what_the_programs_multiply(name, changes):
    config = small(name, **changes)
    # Of a device that leaves out tokens in the last block.
    network = build(config.model, placement=Placement("gpu"), tokens=False)
    params, stats = jax.eval_shape(lambda key: (network.init(key), network.init_stats(key)),
                                   jax.random.key(0))
    shape = jax.ShapeDtypeStruct
    volume = shape((1, *config.data.crop), jnp.int16)
    ids = shape((1, config.model.text.max_tokens), jnp.int32)

    def vision(params, stats, volume):
        return network.vision.apply(params["vision"], network.normalize(volume),
                                    stats=stats.get("vision"))

    def text(params, ids):
        return network.text.apply(params["text"], ids, ids)

    def both(params, stats, volume, ids):
        return network.run_heads(params, stats, network.run_towers(
            params, stats, volume, ids, ids, ids, train=False)[0], train=False)[0]

    found = flops.forward(config)
    # The CLS row of the attention and the pooling, which are no model FLOPs, are a hundredth.
    parts = {"vision": traced(vision, params, stats, volume), "text": traced(text, params, ids)}
    for part, wanted in parts.items():
        assert found[part] == pytest.approx(wanted, rel=0.01), part
    words = 2 * ids.shape[1] ** 2 * config.model.text.width
    heads = traced(both, params, stats, volume, ids) - sum(parts.values())
    assert found["heads"] == pytest.approx(heads - words * network.has_tokens, rel=0.01)


@pytest.mark.parametrize(("name", "negatives"), [
    ("brgsa", "global"), ("brgsa", "ring"), ("clip", "global"), ("clip", "ring"),
    ("siglip", "ring"), ("brgsa_mgca", "ring")])
def test_losses_are_what_the_objective_multiplies(name, negatives):
    rows, dim, words, places = 32, 16, 8, 64
    config = small(name, **{"model.embed_dim": dim, "data.crop": (64, 64, 32),
                            "model.text.max_tokens": 1 + words,
                            "model.input.shape": (64, 64, 32)})
    terms = config.losses.to_dict()
    for term, extra in (("knowledge_interaction", {"scale": 1.0, "negatives": negatives}),
                        ("info_nce", {"negatives": negatives}),
                        ("token_alignment", {"cross_attention_heads": 0})):
        if term in terms:
            terms[term].update(extra)
    for term in terms.values():
        if "positives" in term:
            term["positives"] = (0,)

    def array(*dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((rows, *dims), dtype)

    tokens = {"patches": array(places, dim), "patch_attention": array(places),
              "words": array(words, dim), "word_attention": array(words),
              "pad_mask": array(words, dtype=bool)} if config.model.local_head.name else {}
    shared = {"logit": {"log_scale": 0.0, "bias": 0.0}}
    if config.model.prototypes:
        shared["prototypes"] = jnp.zeros((config.model.prototypes, dim))
    features = Features(image=array(dim), text=array(dim), groups=array(1, dtype=jnp.int32),
                        bank=jnp.zeros((config.model.bank.rows, dim)), shared=shared, **tokens)
    found = traced(lambda f: objective(f, terms).total, features)
    # The gathered form computes the similarity once a direction, the ring once.
    pairs = sum({"info_nce": 1, "knowledge_interaction": 2}.get(term, 0) for term in terms)
    again = pairs * 2 * rows**2 * dim if negatives == "global" else 0
    assert flops.losses(config, rows) == found - again


def test_a_vit_by_hand():
    # ViT-B on 224 × 224 × 112 in patches of 16 × 16 × 8: 14³ patches and CLS.
    t, w, m = 2745, 768, 3072
    block = 2 * (4 * t * w * w + 2 * t * t * w + 2 * t * w * m)
    assert flops.transformer(t, w, 12, m) == 12 * block
    assert 12 * block == pytest.approx(0.744e12, rel=1e-3)
    found = flops.forward(get_config("brgsa"))
    # Of the last block, keys and values of all tokens, and the rest for CLS.
    last = 2 * (2 * t * w * w + 2 * w * w + 2 * t * w + 2 * w * m)
    assert found["vision"] == 11 * block + last + 2 * 2744 * 2048 * 768
    whole = flops.forward(get_config("brgsa_mgca"))["vision"]
    assert whole == 12 * block + 2 * 2744 * 2048 * 768
    assert found["heads"] == 2 * 2 * 768 * 768


def test_a_step_counts_three_passes_and_frozen_towers_once():
    config = get_config("clip", **SMALL)
    parts, rows = flops.forward(config), config.data.batch_size
    objective = 2 * rows**2 * 768
    assert flops.step(config) == rows * 3 * sum(parts.values()) + 3 * objective
    frozen = get_config("clip", **SMALL, **{"optim.freeze": ("params/text/.*",)})
    assert flops.step(config) - flops.step(frozen) == 2 * rows * parts["text"]
    partly = get_config("clip", **SMALL, **{"optim.freeze": ("params/text/word/.*",)})
    assert flops.step(partly) == flops.step(config)


def test_resnet50_is_the_well_known_four_gigaflops():
    config = get_config("mgca:resnet50", **{"model.vision.resize": 224})
    # 4.09 G multiply-adds without the classifier.
    assert flops.forward(config)["vision"] == pytest.approx(2 * 4.087e9, rel=0.01)


@pytest.mark.parametrize(("kind", "name"), [
    ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"),
    ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA A100-SXM4-80GB", "a100"),
    ("NVIDIA L4", "l4"), ("NVIDIA L40S", "l40s"), ("TPU v4", "v4"), ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "v7x")])
def test_chips_are_known_by_what_jax_calls_them(kind, name):
    assert chip_of(kind) is CHIPS[name]


def test_other_devices_are_no_chip():
    assert chip_of("cpu") is None
    for chip in CHIPS.values():
        assert 0.7 * chip.memory <= chip.usable < chip.memory
        assert chip.network < chip.link < chip.bandwidth < chip.flops
