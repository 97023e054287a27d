"""Every registered loss: many devices equal one, in value and gradient, in every way to ask.

All cases run together in one program a mode. Their arguments are disjoint, so that the gradient
of the sum is the gradient of each.
"""

from functools import cache
from types import SimpleNamespace

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_tokenwise import MHA, patch_weights_of, reference_switches

from brgsa_jax import losses, registry
from brgsa_jax.losses import attention_weights, info_nce, prototype_alignment, token_alignment
from brgsa_jax.losses.common import axis_tuple

VALUE_RTOL = 1e-6
GRADIENT = 5e-6
B, REAL, D = 16, 13, 6

# What an argument is: sharded with the batch, sharded over the bank's rows, or on every device.
BATCH, ROWS, REPLICATED = "batch", "rows", "replicated"


def case(loss, kinds, fixed=(), columns=None, **options):
    """A loss, which arguments it takes, of which kind each is, and the columns of positives."""
    return SimpleNamespace(
        loss=loss, kinds=kinds, fixed=set(fixed), columns=columns, options=options
    )


PAIR = {"image": BATCH, "text": BATCH}
GROUPED = {"positives": BATCH, "valid": BATCH}
CASES = {
    "info_nce": case("info_nce", PAIR | {"temperature": REPLICATED}),
    "info_nce, ring": case(
        "info_nce", PAIR | GROUPED | {"temperature": REPLICATED}, negatives="ring"
    ),
    "sigmoid": case(
        "sigmoid", PAIR | GROUPED | {"logit_scale": REPLICATED, "logit_bias": REPLICATED}
    ),
    "token_alignment": case(
        "token_alignment",
        {"patches": BATCH, "words": BATCH, "word_weights": BATCH, "pad_mask": BATCH}
        | {"valid": BATCH, "temperature": REPLICATED},
        fixed=["word_weights"],
    ),
    "prototype_alignment": case(
        "prototype_alignment",
        PAIR | {"valid": BATCH, "prototypes": REPLICATED, "temperature": REPLICATED},
        normalized_gradient=True,
    ),
    # Holds two gathered InfoNCE with groups and missing rows as well.
    "knowledge_interaction": case(
        "knowledge_interaction", PAIR | GROUPED | {"bank": ROWS, "temperature": REPLICATED}
    ),
    "local_alignment": case(
        "local_alignment",
        {"image": BATCH, "words": BATCH, "lengths": BATCH, "valid": BATCH},
    ),
    "info_nce, columns": case("info_nce", PAIR | GROUPED | {"temperature": REPLICATED}, columns=2),
    "info_nce, ring, columns": case(
        "info_nce", PAIR | GROUPED | {"temperature": REPLICATED}, columns=2, negatives="ring"
    ),
    "classification": case(
        "classification",
        {"logits": BATCH, "labels": BATCH, "positive_weights": REPLICATED, "valid": BATCH},
        fixed=["positive_weights"],
    ),
}


def arguments(seed=0, rows=B):
    """Random arguments of every case; the last rows of the batch do not exist."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    lengths = rng.integers(1, 5, rows)
    pad = np.arange(5)[None] >= rng.integers(2, 6, rows)[:, None]
    weights = np.where(pad, 0.0, rng.random((rows, 5))).astype(np.float32)
    make = {
        "image": lambda c: normal(rows, D, *((2, 1, 2) if c.loss == "local_alignment" else ())),
        "text": lambda c: normal(rows, D),
        "patches": lambda c: normal(rows, 7, D),
        "words": lambda c: normal(rows, *((D, 4) if c.loss == "local_alignment" else (5, D))),
        "word_weights": lambda c: weights,
        "pad_mask": lambda c: pad,
        "lengths": lambda c: lengths,
        "positives": lambda c: rng.integers(0, 9, (rows, c.columns) if c.columns else rows),
        "valid": lambda c: np.arange(rows) < REAL,
        "bank": lambda c: normal(24, D),
        "prototypes": lambda c: normal(9, D),
        "temperature": lambda c: np.float32(0.2),
        "logit_scale": lambda c: np.float32(5.0),
        "logit_bias": lambda c: np.float32(-3.0),
        "logits": lambda c: normal(rows, 5),
        "labels": lambda c: rng.integers(-1, 2, (rows, 5)),
        "positive_weights": lambda c: np.float32([0.5, 1.0, 2.0, 4.0, 8.0]),
    }
    return {name: {k: make[k](c) for k in c.kinds} for name, c in CASES.items()}


def split(args):
    """Differentiable arguments, and the rest."""
    def smooth(name, key, x):
        return np.issubdtype(np.asarray(x).dtype, np.floating) and key not in CASES[name].fixed

    return tuple(
        {n: {k: x for k, x in a.items() if smooth(n, k, x) == want} for n, a in args.items()}
        for want in (True, False)
    )


def evaluate(smooth, rest, axis_name=None, rows_axis=None):
    """Scalars of every case."""
    values = {}
    for name, c in CASES.items():
        options = dict(c.options)
        if ROWS in c.kinds.values():
            options["rows_axis"] = rows_axis
        loss = registry.get("loss", c.loss)
        out = loss(**smooth[name], **rest[name], **options, axis_name=axis_name)
        values[name] = jnp.stack(jax.tree.leaves(out))
    return values


def total(values):
    """One number in which no two scalars of a loss weigh the same."""
    return sum(jnp.sum(v * (1.0 + jnp.arange(v.size))) for v in values.values())


def differentiate(function):
    """(smooth, rest) -> (values, gradients)."""

    def run(smooth, rest):
        def scalar(smooth):
            values = function(smooth, rest)
            return total(values), values

        grads, values = jax.grad(scalar, has_aux=True)(smooth)
        return values, grads

    return run


one_device = golden.jit(differentiate(evaluate))


def specs(args, axes, rows):
    spec = {BATCH: P(axes), ROWS: P(rows), REPLICATED: P()}
    return {n: {k: spec[CASES[n].kinds[k]] for k in a} for n, a in args.items()}


def make_mesh(shape, names):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def across(mesh, rows, inside, check_vma):
    """The jitted program for one mode."""
    axes = mesh.axis_names
    axes = axes if len(axes) > 1 else axes[0]
    smooth_specs, rest_specs = (specs(a, axes, rows) for a in split(arguments()))

    def local(smooth, rest):
        return evaluate(smooth, rest, axis_name=axes, rows_axis=rows)

    if not inside:
        return golden.jit(
            differentiate(
                jax.shard_map(
                    local,
                    mesh=mesh,
                    in_specs=(smooth_specs, rest_specs),
                    out_specs=P(),
                    check_vma=check_vma,
                )
            )
        )

    def local_gradient(smooth, rest):
        values, grads = differentiate(local)(smooth, rest)
        return values, grads if check_vma else per_contract(grads, mesh.shape, rows)

    return golden.jit(
        jax.shard_map(
            local_gradient,
            mesh=mesh,
            in_specs=(smooth_specs, rest_specs),
            out_specs=(P(), smooth_specs),
            check_vma=check_vma,
        )
    )


def per_contract(grads, sizes, rows):
    """One ``lax.pmean`` where a copy is on several devices; sharded gradients are n-fold."""
    over = {BATCH: tuple(sizes), ROWS: axis_tuple(rows), REPLICATED: ()}

    def reduce(gradient, kind):
        copies = tuple(a for a in sizes if a not in over[kind])
        shards = int(np.prod([sizes[a] for a in over[kind]]))
        return (lax.pmean(gradient, copies) if copies else gradient) / shards

    return {n: {k: reduce(g, CASES[n].kinds[k]) for k, g in a.items()} for n, a in grads.items()}


def with_pmap(smooth, rest, devices=8):
    """Data parallel by ``jax.pmap``; a bank is on every device there."""
    def is_batch(tree):
        return {n: {k: CASES[n].kinds[k] == BATCH for k in a} for n, a in tree.items()}

    def deal(tree):
        return jax.tree.map(
            lambda x, s: x.reshape(devices, -1, *x.shape[1:]) if s else x, tree, is_batch(tree)
        )

    def axes(tree):
        return jax.tree.map(lambda s: 0 if s else None, is_batch(tree))

    def local(smooth, rest):
        function = differentiate(lambda s, r: evaluate(s, r, axis_name="devices"))
        values, grads = function(smooth, rest)
        return values, jax.tree.map(
            lambda g, s: g if s else lax.pmean(g, "devices"), grads, is_batch(grads)
        )

    parallel = jax.pmap(local, axis_name="devices", in_axes=(axes(smooth), axes(rest)))
    dealt = deal(smooth), deal(rest)
    values, grads = parallel.lower(*dealt).compile(golden.quick_compile())(*dealt)
    for v in jax.tree.leaves(values):
        assert np.all(np.asarray(v) == np.asarray(v)[0]), "devices disagree"
    grads = jax.tree.map(
        lambda g, s: np.asarray(g).reshape(B, *g.shape[2:]) / devices if s else np.asarray(g)[0],
        grads,
        is_batch(grads),
    )
    return jax.tree.map(lambda v: np.asarray(v)[0], values), grads


ONE_AXIS = ((8,), ("data",))
TWO_AXES = ((2, 4), ("data", "fsdp"))
MODES = {
    "8, outside, check_vma": lambda: across(make_mesh(*ONE_AXIS), "data", False, True),
    "8, outside": lambda: across(make_mesh(*ONE_AXIS), None, False, False),
    "8, inside, check_vma": lambda: across(make_mesh(*ONE_AXIS), None, True, True),
    "8, inside": lambda: across(make_mesh(*ONE_AXIS), "data", True, False),
    "2x4, outside, check_vma": lambda: across(make_mesh(*TWO_AXES), "fsdp", False, True),
    "2x4, inside": lambda: across(make_mesh(*TWO_AXES), TWO_AXES[1], True, False),
    "pmap": lambda: with_pmap,
}


@cache
def program(mode):
    return MODES[mode]()


@cache
def results(mode):
    """Values and gradients of all cases on the standard arguments, as numpy."""
    run = one_device if mode is None else program(mode)
    return jax.tree.map(np.asarray, run(*split(arguments())))


def compare(ours, expected, name):
    """Holds value and gradient of one case to the stated tolerances; returns the deviations."""
    values, grads = ours[0][name], ours[1][name]
    expected_values, expected_grads = expected[0][name], expected[1][name]
    np.testing.assert_allclose(values, expected_values, rtol=VALUE_RTOL)
    worst = 0.0
    for key, gradient in expected_grads.items():
        largest = np.max(np.abs(gradient))
        assert largest > 0 and np.all(np.isfinite(gradient)), key
        error = np.max(np.abs(grads[key] - gradient)) / largest
        assert error <= GRADIENT, (name, key, error)
        worst = max(worst, error)
    # In float64: a ratio of float32 is rounded by as much as a tenth of the tolerance.
    return np.max(np.abs(np.float64(values) / np.float64(expected_values) - 1)), worst


def test_every_registered_loss_is_here():
    assert losses  # the import registers
    assert set(registry.names("loss")) == {c.loss for c in CASES.values()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", MODES)
def test_devices_equal_one_device(mode, name):
    value, gradient = compare(results(mode), results(None), name)
    assert value <= VALUE_RTOL and gradient <= GRADIENT


def test_columns_of_positives_are_no_partition():
    """Otherwise one column of ids would say the same."""
    for name, args in arguments().items():
        if CASES[name].columns:
            ids = args["positives"][:REAL]
            same = (ids[:, None] == ids[None]).any(-1)
            linked = (same.astype(int) @ same) > 0
            assert np.any(linked & ~same)


def reorder(tree, order):
    return {
        n: {k: x[order] if CASES[n].kinds[k] == BATCH else x for k, x in a.items()}
        for n, a in tree.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_order_of_the_batch_does_not_matter(name):
    values, grads = permuted()
    expected = results(None)
    compare((values, grads), (expected[0], reorder(expected[1], ORDER)), name)


ORDER = np.random.default_rng(5).permutation(B)


@cache
def permuted():
    args = tuple(reorder(part, ORDER) for part in split(arguments()))
    return jax.tree.map(np.asarray, one_device(*args))


@cache
def ragged():
    """NaN where the batch has no rows, on 8 devices, and the short batch on one device."""
    args = arguments()
    padded = {n: dict(a) for n, a in args.items()}
    short = {n: dict(a) for n, a in args.items()}
    for name, c in CASES.items():
        if "valid" not in c.kinds:
            continue
        short[name].pop("valid")
        for key, kind in c.kinds.items():
            if kind == BATCH and key != "valid":
                short[name][key] = args[name][key][:REAL]
                if args[name][key].dtype == np.float32:
                    padded[name][key] = args[name][key].copy()
                    padded[name][key][REAL:] = np.nan
    ours = program("8, outside, check_vma")(*split(padded))
    return jax.tree.map(np.asarray, (ours, golden.jit(differentiate(evaluate))(*split(short))))


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if "valid" in c.kinds])
def test_padding_rows_are_as_if_absent(name):
    (values, grads), expected = ragged()
    kept = {}
    for key, gradient in grads[name].items():
        if CASES[name].kinds[key] == BATCH:
            assert np.all(gradient[REAL:] == 0), key
            gradient = gradient[:REAL]
        kept[key] = gradient
    compare((values, {name: kept}), expected, name)


def hostile(which):
    smooth, rest = split(arguments())
    for name, a in smooth.items():
        batch = [k for k in a if CASES[name].kinds[k] == BATCH]
        if which == "zero vectors":
            for key in batch:
                a[key][:3] = 0.0
        elif which == "identical captions":
            for key in ("text", "words"):
                if key in a:
                    a[key][:] = a[key][:1]
        elif which == "logits of 100":
            for key in batch:
                a[key][1::2] = -a[key][::2]
            for key in ("image", "text"):
                if key in a and "text" in a:
                    a[key][:] = a[key][:1] * np.where(np.arange(B) % 2, -1, 1)[:, None]
            a |= {k: np.float32(0.01) for k in a if k == "temperature"}
            a |= {k: np.float32(100.0) for k in a if k == "logit_scale"}
    return smooth, rest


@pytest.mark.parametrize("which", ["zero vectors", "identical captions", "logits of 100"])
def test_hostile_batches_stay_finite(which):
    smooth, rest = hostile(which)
    values, grads = one_device(smooth, rest)
    for name in CASES:
        for leaf in jax.tree.leaves((values[name], grads[name])):
            assert np.all(np.isfinite(leaf)), name
    if which == "zero vectors":
        for name in (*(n for n in CASES if "info_nce" in n), "sigmoid", "token_alignment"):
            for key, gradient in grads[name].items():
                if CASES[name].kinds[key] == BATCH:
                    assert np.all(np.asarray(gradient)[:3] == 0), (name, key)
                    assert np.any(np.asarray(gradient)[3:] != 0), (name, key)


def test_bfloat16_is_computed_in_float32():
    smooth, rest = split(arguments())
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), smooth)
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float32), half)
    values, grads = one_device(half, rest)
    expected, expected_grads = one_device(rounded, rest)
    for name in CASES:
        assert values[name].dtype == jnp.float32
        # Only the gradients are rounded, once, to the dtype of what they belong to.
        np.testing.assert_allclose(values[name], expected[name], rtol=1e-5)
        for key, gradient in grads[name].items():
            assert gradient.dtype == jnp.bfloat16
            largest = np.max(np.abs(expected_grads[name][key]))
            error = np.abs(np.asarray(gradient, np.float32) - expected_grads[name][key])
            assert np.max(error) <= 2**-7 * largest, (name, key)


def test_local_negatives_are_those_of_each_device():
    smooth, _ = split(arguments())
    image, text = smooth["info_nce"]["image"], smooth["info_nce"]["text"]

    def local(image, text):
        return info_nce(image, text, temperature=0.2, axis_name="data", negatives="local")

    sharded = jax.shard_map(
        local, mesh=make_mesh(*ONE_AXIS), in_specs=P("data"), out_specs=P()
    )
    alone = golden.jit(lambda i, t: info_nce(i, t, temperature=0.2))
    parts = [alone(image[i : i + 2], text[i : i + 2]) for i in range(0, B, 2)]
    np.testing.assert_allclose(
        golden.jit(sharded)(image, text), np.mean(parts, axis=0), rtol=VALUE_RTOL
    )


# --------------------------------------------------------------------------------------------
# The whole of MGCA's objective, weighted, as the reference runs it.


def check_total(file):
    h = file.meta["hparams"]

    def function(x):
        ita = info_nce(x["img_raw"], x["report_raw"], temperature=h["softmax_temperature"])
        weights = attention_weights(file.inputs("word_attn")["word_attn"])
        cta = token_alignment(
            x["patch_raw"],
            x["word_raw"],
            word_weights=weights,
            patch_weights=patch_weights_of(file),
            pad_mask=file["in_pad_mask"],
            **reference_switches(file.meta),
        )
        cpa = prototype_alignment(
            x["img_raw"],
            x["report_raw"],
            x["proto"],
            temperature=h["proto_temperature"],
            epsilon=h["epsilon"],
            iterations=h["sinkhorn_iterations"],
        )
        values = {"ita": sum(ita), "cta": sum(cta), "cpa": 0.5 * sum(cpa)}
        return values, (cta, weights)

    inputs = file.inputs("img_raw", "report_raw", "patch_raw", "word_raw", "proto_raw")
    proto = inputs.pop("proto_raw")
    # The stored gradient is taken at the normalised prototypes.
    inputs["proto"] = proto / np.linalg.norm(proto, axis=1, keepdims=True)
    mixes = {
        "total_111": {"ita": 1.0, "cta": 1.0, "cpa": 1.0},
        "total_1_07_05": {"ita": 1.0, "cta": 0.7, "cpa": 0.5},
    }
    values, (cta, weights), grads = golden.differentiate(function, inputs, mixes)
    for name, value in values.items():
        file.value(f"loss_{name}", value)
    file.value("loss_word", cta.word)
    if h["bidirectional"]:
        file.value("loss_patch", cta.patch)
    file.value("word_weights", weights)
    for name, mix in mixes.items():
        file.value(f"loss_{name}", sum(mix[k] * values[k] for k in mix))
        file.gradients(name, grads[name])
    return file


@pytest.mark.parametrize("dtype", golden.DTYPES)
@pytest.mark.parametrize("path", golden.files("total"), ids=lambda p: p.stem)
def test_total_golden(path, dtype):
    with jax.enable_x64(dtype == "float64"):
        check_total(golden.Golden(path, dtype)).finish()


def test_cross_attention_on_devices_equals_one_device():
    rng = np.random.default_rng(3)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    shapes = {"in_w": (3 * D, D), "in_b": (3 * D,), "out_w": (D, D), "out_b": (D,)}
    assert set(shapes) == set(MHA)
    params = {side: {k: normal(*s) for k, s in shapes.items()} for side in ("word", "patch")}
    smooth, rest = split(arguments())
    batch = smooth["token_alignment"] | rest["token_alignment"]
    batch.pop("temperature")

    def loss(params, batch, axis_name=None):
        mha = params | {"heads": 2}
        return sum(token_alignment(**batch, cross_attention=mha, axis_name=axis_name))

    sharded = jax.shard_map(
        lambda p, b: loss(p, b, "data"),
        mesh=make_mesh(*ONE_AXIS),
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    ours = golden.jit(jax.value_and_grad(sharded))(params, batch)
    expected = golden.jit(jax.value_and_grad(loss))(params, batch)
    np.testing.assert_allclose(ours[0], expected[0], rtol=VALUE_RTOL)
    largest = max(np.max(np.abs(g)) for g in jax.tree.leaves(expected[1]))
    for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=GRADIENT * largest)
